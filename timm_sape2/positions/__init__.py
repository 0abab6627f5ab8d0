"""Position encodings, one file each; `compose` has their names and joins them."""

from .base import HostShape as HostShape
from .base import PositionEncoding as PositionEncoding
from .compose import ENCODINGS as ENCODINGS
from .compose import Positions as Positions
from .compose import all_encodings as all_encodings
from .compose import facts as facts
from .compose import has_learned_embedding as has_learned_embedding
from .compose import parse_position as parse_position
from .compose import valid_options as valid_options
