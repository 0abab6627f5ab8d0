"""SaPE2 attention: the reference of its bias, and implementations that need not store it."""

from .choice import is_being_exported as is_being_exported
from .choice import sape2_attention as sape2_attention
from .choice import why_not_triton as why_not_triton
from .eager import eager_attention as eager_attention
from .eager import release_buffers as release_buffers
from .eager import why_not_eager as why_not_eager
from .reference import sape2_bias as sape2_bias
from .reference import sape2_signatures as sape2_signatures
