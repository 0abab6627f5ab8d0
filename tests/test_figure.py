"""Figures of matplotlib."""

import io

import matplotlib.figure
import numpy as np
from PIL import Image

from timm_sape2._figure import new_figure


def test_a_figure_that_notebooks_show():
    """IPython shows what `_repr_png_` returns."""
    figure = new_figure(3, 2)
    assert isinstance(figure, matplotlib.figure.Figure) and type(new_figure()) is type(figure)
    figure.subplots().plot([1, 2])
    shown = Image.open(io.BytesIO(figure._repr_png_()))
    assert shown.format == 'PNG' and shown.size == (300, 200) and np.asarray(shown).std() > 0
