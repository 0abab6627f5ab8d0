"""Pictures of attention biases: which patches does a patch prefer, by position alone?"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..._figure import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

Grid = tuple[int, int]
Patch = tuple[int, int]

DPI = 120
SIDE = 3.6  # inches of a panel
TITLE_WIDTH = 2.8
QUERY_COLOR = 'deepskyblue'
UNSEEN_COLOR = '0.6'


class BiasMap(NamedTuple):
    """The bias of one attention head, or the mean of several, for one image."""

    title: str
    image: np.ndarray
    """The image as the model sees it, (height, width, 3), from 0 to 1."""

    bias: np.ndarray
    """From every query patch (row, column) to every key patch, (H, W, H, W); NaN for one that is not seen at all."""


def draw_bias_maps(maps: Sequence[BiasMap], patches: Sequence[Patch] = ()) -> 'Figure':
    """Draw bias maps, a line for each: the image, the maps of all query patches, and some of them enlarged.

    The map of a query patch stands at the place that the patch has in the image. One colour scale with white for 0 is
    shared by the whole picture.

    Args:
        maps: What to draw, on grids of any size.
        patches: Query patches (row, column) to enlarge.
    """
    rows, columns = maps[0].bias.shape[:2]
    side, overview = panel_sides((rows, columns))
    flat, narrow = rows / max(rows, columns), columns / max(rows, columns)
    widths = [max(inches * narrow, TITLE_WIDTH) for inches in (side, overview, *[side] * len(patches))]
    height = max((overview * flat + 1) * len(maps), 3)
    if height * DPI >= 2**16:  # matplotlib draws no larger picture
        raise ValueError(f'{len(maps)} lines of maps do not fit into one picture: choose fewer images, blocks or heads')
    figure = new_figure(sum(widths) + 0.6 * len(widths) + 1.2, height)
    figure.set_layout_engine('constrained', h_pad=0.1)
    color = color_scale([bias_map.bias for bias_map in maps])
    all_axes = figure.subplots(len(maps), len(widths), squeeze=False, width_ratios=widths)
    for axes, bias_map in zip(all_axes, maps, strict=True):
        draw_image(axes[0], bias_map.title, bias_map.image, bias_map.bias.shape[:2], patches)
        drawn = draw_overview(axes[1], bias_map, color)
        for detail, patch in zip(axes[2:], patches, strict=True):
            draw_detail(detail, bias_map, patch, color)
    bar = figure.colorbar(drawn, ax=all_axes, fraction=0.03, aspect=30, pad=0.01)
    bar.set_label(words_of_colors(color))
    return figure


def panel_sides(grid: Grid) -> tuple[float, float]:
    """Return the longer side, in inches, of a panel and of the one with small maps.

    The latter grows so that each cell of a small map has two pixels, as far as a picture can reasonably be large.
    """
    side = max(grid)
    return SIDE, min(max(1.25 * SIDE, 2 * side * (side + 1) / DPI), 24.0)


def color_scale(biases: Sequence[np.ndarray]) -> dict[str, Any]:
    """Return the colours of all biases: white for 0, blue below if there is anything below, red above."""
    lowest = min(float(np.nanmin(bias)) for bias in biases)
    largest = max(float(np.nanmax(np.abs(bias))) for bias in biases) or 1.0
    if lowest < 0:
        return {'cmap': 'seismic', 'vmin': -largest, 'vmax': largest}
    return {'cmap': 'gist_heat_r', 'vmin': 0.0, 'vmax': largest}


def words_of_colors(color: dict[str, Any]) -> str:
    """Return what the colours of `color_scale` mean."""
    effect = 'red = more, blue = less' if color['vmin'] < 0 else 'dark = more attention'
    return f'bias added to the attention logits\nwhite = 0, {effect}'


def draw_image(axes: 'Axes', title: str, image: np.ndarray, grid: Grid, patches: Sequence[Patch]) -> None:
    """Draw an image with lines between its patches, and frames around some of them."""
    rows, columns = grid
    axes.imshow(image, extent=(-0.5, columns - 0.5, rows - 0.5, -0.5), interpolation='nearest')
    axes.vlines(np.arange(1, columns) - 0.5, -0.5, rows - 0.5, color='white', linewidth=0.4)
    axes.hlines(np.arange(1, rows) - 0.5, -0.5, columns - 0.5, color='white', linewidth=0.4)
    for patch in patches:
        frame_patch(axes, patch)
    label_patches(axes, grid)
    axes.set(title=title, xlabel='column', ylabel='row')


def draw_overview(axes: 'Axes', bias_map: BiasMap, color: dict[str, Any]) -> 'AxesImage':
    """Draw the small maps of all query patches, each at the place of its patch, and return them."""
    rows, columns = bias_map.bias.shape[:2]
    axes.set_facecolor(UNSEEN_COLOR)
    drawn = axes.imshow(mosaic(bias_map.bias), interpolation='nearest', **color)
    label_patches(axes, (rows, columns), tile=(rows, columns), gap=1)
    axes.set(title='every query patch', xlabel='column of the query patch', ylabel='row of the query patch')
    return drawn


def mosaic(bias: np.ndarray) -> np.ndarray:
    """Put the maps of all query patches, (H, W, H, W), side by side with a line of NaN between them.

    Returns:
        Picture of the height H * (H + 1) - 1 and the width W * (W + 1) - 1.
    """
    rows, columns = bias.shape[:2]
    tiles = np.pad(bias, [(0, 0), (0, 0), (0, 1), (0, 1)], constant_values=np.nan)
    return tiles.transpose(0, 2, 1, 3).reshape(rows * (rows + 1), columns * (columns + 1))[:-1, :-1]


def draw_detail(axes: 'Axes', bias_map: BiasMap, patch: Patch, color: dict[str, Any]) -> None:
    """Draw the map of one query patch, with a frame around the patch itself."""
    axes.set_facecolor(UNSEEN_COLOR)
    axes.imshow(bias_map.bias[patch], interpolation='nearest', **color)
    frame_patch(axes, patch)
    label_patches(axes, bias_map.bias.shape[:2])
    axes.set(title=f'query patch: row {patch[0]}, column {patch[1]}', xlabel='column', ylabel='row')


def frame_patch(axes: 'Axes', patch: Patch) -> None:
    """Draw a frame around a patch."""
    from matplotlib.patches import Rectangle

    row, column = patch
    axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=QUERY_COLOR, linewidth=2))


def label_patches(axes: 'Axes', grid: Grid, tile: Grid = (1, 1), gap: int = 0) -> None:
    """Number rows and columns of patches, a dozen of each at most; a patch is a tile of pixels, with gaps between."""
    for axis, count, pixels in ((axes.yaxis, grid[0], tile[0]), (axes.xaxis, grid[1], tile[1])):
        numbers = range(0, count, math.ceil(count / 12))
        axis.set_ticks([number * (pixels + gap) + (pixels - 1) / 2 for number in numbers], list(map(str, numbers)))
    axes.tick_params(length=0, labelsize=8)
