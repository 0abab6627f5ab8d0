"""SaPE2 and other position encodings for timm's vision transformers. Importing registers the models with timm."""

from . import models as models
from .models import PositionVisionTransformer as PositionVisionTransformer
from .version import __version__ as __version__
