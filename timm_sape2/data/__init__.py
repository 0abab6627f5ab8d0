"""Data sets: opened by name, the digits of scikit-learn, and those that fit in memory."""
