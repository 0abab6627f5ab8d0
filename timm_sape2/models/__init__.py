"""Vision transformers with swappable position encodings. Importing registers them with timm."""

from . import vision_transformer_sape2 as vision_transformer_sape2
from .vit import PositionVisionTransformer as PositionVisionTransformer
