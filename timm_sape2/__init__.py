"""SaPE2 and other position encodings for timm's vision transformers. Importing registers the models with timm."""

from . import models as models
from .models import PositionVisionTransformer as PositionVisionTransformer
from .models import equip as equip
from .models import why_not_equip as why_not_equip
from .positions import ENCODINGS as ENCODINGS
from .positions import PositionEncoding as PositionEncoding
from .positions.sape2 import SaPE2 as SaPE2
from .version import __version__ as __version__
