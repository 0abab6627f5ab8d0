"""SaPE2 and other position encodings for timm's vision transformers. Importing registers the models with timm."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import models as models
from .models import PositionVisionTransformer as PositionVisionTransformer
from .models import equip as equip
from .models import why_not_equip as why_not_equip
from .positions import ENCODINGS as ENCODINGS
from .positions import PositionEncoding as PositionEncoding
from .positions.sape2 import SaPE2 as SaPE2
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .models.encoding_table import encodings as encodings
    from .studies.bias_maps.of_images import bias_maps as bias_maps
    from .trained.prediction import predict as predict

# What commands do, for notebooks. Their modules need more than timm and torch, so they are imported when asked for.
_ON_DEMAND = {
    'bias_maps': '.studies.bias_maps.of_images',
    'encodings': '.models.encoding_table',
    'predict': '.trained.prediction',
}


def __getattr__(name: str) -> Any:
    if name not in _ON_DEMAND:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(_ON_DEMAND[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_DEMAND})
