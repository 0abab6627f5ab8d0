"""Training under one recipe: every encoding, and SaPE2 with one part changed at a time."""
