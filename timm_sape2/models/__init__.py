"""Vision transformers with swappable position encodings. Importing registers them with timm."""

from . import vision_transformer_sape2 as vision_transformer_sape2
from .equip import equip as equip
from .equip import why_not_equip as why_not_equip
from .vit import PositionVisionTransformer as PositionVisionTransformer
