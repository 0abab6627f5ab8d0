"""No position encoding."""

from .base import PositionEncoding


class NoPosition(PositionEncoding):
    """No position encoding: patches are a set, apart from what convolutional stems leak.

    Prefix tokens are treated like patches. There are no parameters, and any grid will do.
    """
