"""SaPE2 and other position encodings for timm's vision transformers. Importing registers the models with timm."""

from . import vision_transformer_sape2 as vision_transformer_sape2
from .factory import create_model as create_model
from .version import __version__ as __version__
from .vit import PositionVisionTransformer as PositionVisionTransformer
