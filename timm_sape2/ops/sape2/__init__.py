"""SaPE2 attention: the reference of its bias, and implementations that need not store it."""

from .attention import IMPLEMENTATIONS as IMPLEMENTATIONS
from .attention import choose as choose
from .attention import sape2_attention as sape2_attention
from .attention import why_not as why_not
from .reference import sape2_bias as sape2_bias
