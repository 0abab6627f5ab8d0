"""Models on the Hugging Face Hub: package a checkpoint, push it, pull it, verify it."""
