"""No position encoding."""

from .base import PositionEncoding


class NoPosition(PositionEncoding):
    """No position encoding: `softmax(q k^T / sqrt(d)) v` treats patches as a set (arXiv 1706.03762, section 3.5).

    Prefix tokens are treated like patches. There are no parameters, and any grid will do as it is.
    """

    kind = 'none'
