"""Trained models on what they were not trained on: shifted images and other sizes."""
