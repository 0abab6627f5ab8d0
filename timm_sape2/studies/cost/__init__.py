"""Time, memory, parameters and FLOPs, of models and of attention alone."""
