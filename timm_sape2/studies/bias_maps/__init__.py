"""The position biases of a model, computed and drawn."""
