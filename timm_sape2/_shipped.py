"""What comes with the package for its models: configurations, recipes, cards, and weights where they are small."""

from importlib.resources import files
from pathlib import Path

WEIGHTS = 'model.safetensors'


def shipped() -> Path:
    """Return the folder that has a folder for each model: inside the package, in a checkout beside it."""
    inside = Path(str(files(__package__) / 'hub_configs'))
    return inside if inside.is_dir() else inside.parents[1] / 'hub_configs'
