"""What train.py is built from, beside timm: one idea in each module."""
