"""A picture of many heads: a small panel for each, side by side."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..._figure import new_figure
from .drawing import (
    DPI,
    UNSEEN_COLOR,
    Grid,
    Patch,
    color_scale,
    draw_image,
    frame_patch,
    mosaic,
    words_of_colors,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

COLUMNS = 6  # of heads, beside the image
SIDE = 1.9  # inches of a panel


class HeadMaps(NamedTuple):
    """The biases of several attention heads for one image."""

    title: str
    image: np.ndarray
    """The image as the model sees it, (height, width, 3), from 0 to 1."""

    heads: Sequence[tuple[str, np.ndarray]]
    """What each is called, and its bias from every query patch to every key patch, (H, W, H, W)."""


def draw_head_grid(maps: Sequence[HeadMaps], patches: Sequence[Patch] = ()) -> 'Figure':
    """Draw the image and, beside it, a panel for each head: the map of a query patch, or small ones of all of them.

    One colour scale with white for 0 is shared by the whole picture.

    Args:
        maps: What to draw, with the same number of heads, on grids of one size.
        patches: Query patches (row, column), each of which gets panels of its own; none for all of them in one panel.
    """
    heads = len(maps[0].heads)
    grid = maps[0].heads[0][1].shape[:2]
    columns = min(heads, COLUMNS)
    lines = math.ceil(heads / columns)
    queries: Sequence[Patch | None] = patches or [None]
    groups = [(head_maps, patch) for head_maps in maps for patch in queries]
    side = SIDE if patches else min(max(SIDE, max(grid) * (max(grid) + 1) / DPI), 3 * SIDE)
    height = max((side * grid[0] / max(grid) + 0.5) * lines * len(groups) + (0.3 if patches else 0.6) * len(groups), 3)
    if height * DPI >= 2**16:  # matplotlib draws no larger picture
        raise ValueError(f'{len(groups)} grids of heads do not fit into one picture: choose fewer images or blocks')
    figure = new_figure((side * grid[1] / max(grid) + 0.25) * (columns + 1) + 1.2, height)
    color = color_scale([bias for head_maps in maps for _, bias in head_maps.heads])
    all_axes = figure.subplots(len(groups) * lines, columns + 1, squeeze=False)
    for axes in all_axes.flat:
        axes.set_axis_off()
    for index, (head_maps, patch) in enumerate(groups):
        group_axes = all_axes[index * lines : (index + 1) * lines]
        draw_query(group_axes[0, 0], head_maps.title, head_maps.image, grid, patch)
        # the last line may have room for more heads
        for axes, (name, bias) in zip(group_axes[:, 1:].flat, head_maps.heads, strict=False):
            drawn = draw_head(axes, name, bias, patch, color)
    bar = figure.colorbar(drawn, ax=all_axes, fraction=0.03, aspect=30, pad=0.01)
    bar.set_label(words_of_colors(color), fontsize=9)
    return figure


def draw_query(axes: 'Axes', title: str, image: np.ndarray, grid: Grid, patch: Patch | None) -> None:
    """Draw the image, and say which query patch the panels beside it are of."""
    axes.set_axis_on()
    draw_image(axes, title, image, grid, [] if patch is None else [patch])
    axes.set(xticks=[], yticks=[], ylabel='')
    every = 'every query patch has a\nsmall map at its place'
    axes.set_xlabel(every if patch is None else f'from row {patch[0]}, column {patch[1]}', fontsize=9)
    axes.title.set_fontsize(9)


def draw_head(axes: 'Axes', name: str, bias: np.ndarray, patch: Patch | None, color: dict[str, Any]) -> 'AxesImage':
    """Draw the map of a query patch, or small ones of all of them, and return it."""
    axes.set_axis_on()
    axes.set_facecolor(UNSEEN_COLOR)
    axes.set(xticks=[], yticks=[])
    axes.set_title(name, fontsize=9)
    if patch is not None:
        frame_patch(axes, patch)
    return axes.imshow(mosaic(bias) if patch is None else bias[patch], interpolation='nearest', **color)
