"""Opening, measuring and using what was trained."""
