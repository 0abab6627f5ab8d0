"""Figures of matplotlib, which is imported when the first one is made."""

import functools
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_matplotlib() -> None:
    """Raise a ValueError that says what to install if there is nothing to draw plots with."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("plots need matplotlib: pip install 'timm_sape2[studies]'") from None


def new_figure(width: float = 8, height: float = 4) -> 'Figure':
    """Return an empty figure, inches wide and high, that needs no screen and that a notebook shows."""
    return _figure_class()(figsize=(width, height), layout='constrained')


@functools.cache
def _figure_class() -> 'type[Figure]':
    from matplotlib.figure import Figure

    class ShownFigure(Figure):
        """A figure that a notebook shows as it is, while those of matplotlib must be made by pyplot for that."""

        def _repr_png_(self) -> bytes:
            buffer = io.BytesIO()
            self.savefig(buffer, format='png')
            return buffer.getvalue()

    return ShownFigure
