"""What a trained model is worth: its accuracy on a data set, its predictions for images."""
