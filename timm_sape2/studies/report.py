"""Tables and plots of results."""

import math
import re
import statistics
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..positions import ENCODINGS
from .study import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {
    'nope': '#7f7f7f',
    'learned': '#1f77b4',
    'sincos': '#17becf',
    'relbias': '#2ca02c',
    'cpe': '#8c564b',
    'rope': '#ff7f0e',
    'rope_mixed': '#ffbb33',
    'liere': '#b8860b',
    'alibi': '#8fd67f',
    'lookhere': '#006d2c',
    'fire': '#bcbd22',
    'pape': '#e377c2',
    'shaw': '#08306b',
    'cope': '#9467bd',
    'axial_cope': '#c2a5dd',
    'sape2': '#d62728',
    'learned+sape2': '#800020',
}
"""Of the encodings, in every plot. Others, and other joined ones, get that of their last part."""

TOP1_OF_SEEDS = 'validation top-1 in %\n(a dot: a seed; stroke and bar: mean ± standard deviation)'

DASHES = ('-', '--', ':', '-.')
MARKERS = ('o', 's', '^', 'D')


class Spread(NamedTuple):
    """A value with bounds, and the single values that it stands for."""

    low: float
    middle: float
    high: float
    values: Sequence[float] = ()


def encoding_place(position: str) -> tuple[int, list[int]]:
    """Return a key that sorts encodings as `ENCODINGS` has them, and those that are joined after them."""
    names = without_options(position).split('+')
    places = [list(ENCODINGS).index(name) if name in ENCODINGS else len(ENCODINGS) for name in names]
    return len(places), places


def by_encoding(row: Row) -> tuple:
    """Return a key that sorts rows by encoding, those without LayerScale first, and by seed."""
    return encoding_place(row['encoding']), row['layer_scale'] != 'off', row['seed']


def without_options(position: str) -> str:
    """Return an encoding without options in brackets and without the implementation after a colon."""
    return re.sub(r'\([^()]*\)', '', position).partition(':')[0]


def grouped(rows: Iterable[Row], *factors: str) -> dict[tuple, list[Row]]:
    """Return the rows by their values of some factors, in the order of their first appearance."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[factor] for factor in factors), []).append(row)
    return groups


def by_model(rows: Iterable[Row], *factors: str) -> dict[tuple, list[Row]]:
    """Return the rows by encoding, LayerScale and further factors, encodings in the order of their table."""
    groups = grouped(rows, 'encoding', 'layer_scale', *factors)
    return dict(sorted(groups.items(), key=lambda group: encoding_place(group[0][0])))


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the sample standard deviation, which is NaN for a single value."""
    mean = sum(values) / len(values)
    return mean, statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan


def plus_minus(values: Sequence[float], digits: int = 2) -> str:
    """Return 'mean ± standard deviation', only the value if there is one, and an empty text if there is none."""
    if not values:
        return ''
    mean, deviation = mean_and_deviation(values)
    return f'{mean:.{digits}f}' if math.isnan(deviation) else f'{mean:.{digits}f} ± {deviation:.{digits}f}'


def improvement(runs: Iterable[Row], baseline: Iterable[Row]) -> str:
    """Return by how much the accuracy of runs is above that of a baseline with the same seeds, as `plus_minus` does."""
    top1 = {row['seed']: row['top1'] for row in baseline}
    return plus_minus([row['top1'] - top1[row['seed']] for row in runs if row['seed'] in top1])


def three_digits(value: float) -> str:
    """Return a number rounded to three significant digits, such as '2910' or '0.0123'."""
    return f'{float(f"{value:.3g}"):g}'


def spread_over_seeds(values: Sequence[float]) -> Spread:
    """Return the mean of values, a standard deviation around it, and the values."""
    mean, deviation = mean_and_deviation(values)
    deviation = 0 if math.isnan(deviation) else deviation
    return Spread(mean - deviation, mean, mean + deviation, values)


def encoding_color(position: str) -> str:
    """Return the colour of an encoding, which is the same with any options and in any implementation."""
    names = sorted(without_options(position).split('+'), key=encoding_place)
    unknown = f'C{zlib.crc32(names[-1].encode()) % 10}'
    return COLORS.get('+'.join(names), COLORS.get(names[-1], unknown))


def line_styles(positions: Sequence[str]) -> list[dict[str, Any]]:
    """Return how to draw a line for each encoding; those of one colour differ in dashes and markers."""
    colors = [encoding_color(position) for position in positions]
    ranks = [colors[:i].count(color) % len(DASHES) for i, color in enumerate(colors)]
    return [
        {'color': color, 'linestyle': DASHES[rank], 'marker': MARKERS[rank], 'markersize': 3.5}
        for color, rank in zip(colors, ranks, strict=True)
    ]


def layer_scale_in_words(value: Any) -> str:
    """Return a setting of LayerScale, its initial value or 'off', for a legend."""
    return 'without LayerScale' if value == 'off' else f'LayerScale from {value}'


def models_in_words(models: Iterable[tuple]) -> dict[tuple, str]:
    """Return names of models for a legend; LayerScale is in them if it differs.

    Args:
        models: Encoding, LayerScale, and perhaps `distance_scale` of each.
    """
    names = {}
    models = list(models)
    for model in models:
        words = [model[0]]
        if len({layer_scale for _, layer_scale, *_ in models}) > 1:
            words.append(layer_scale_in_words(model[1]))
        if 'grid' in model[2:]:
            words.append('distances scaled by the grid')
        names[model] = ', '.join(words)
    return names


def title_of_lines(question: str, rows: Iterable[Row]) -> str:
    """Return the question that a plot of lines answers, and what the bands are, if there are several seeds."""
    several = len({row['seed'] for row in rows}) > 1
    return question + (' (mean over seeds, band: ± standard deviation)' if several else '')


def draw_line(
    axes: 'Axes', places: Sequence[Any], spreads: Sequence[Spread], label: str, style: Mapping[str, Any]
) -> None:
    """Draw a line through the middles, and what is between the bounds as a band with a stroke at each place."""
    axes.plot(places, [spread.middle for spread in spreads], label=label, **style)
    low, high = [spread.low for spread in spreads], [spread.high for spread in spreads]
    axes.fill_between(places, low, high, color=style['color'], alpha=0.1, linewidth=0)
    axes.vlines(places, low, high, color=style['color'], alpha=0.5, linewidth=1)


def draw_dots(
    axes: 'Axes',
    groups: Mapping[str, Mapping[str, Spread]],
    color: Callable[[str], str] = encoding_color,
) -> None:
    """Draw a line of the plot for every name: its middle as a stroke, a bar between the bounds, and its values as dots.

    Args:
        axes: Where to draw.
        groups: By series, of which each has a marker, and by name.
        color: Colour of a name.
    """
    names = list(dict.fromkeys(name for series in groups.values() for name in series))
    for i, (series, spreads) in enumerate(groups.items()):
        shift = 0.8 * ((i + 0.5) / len(groups) - 0.5)
        marker: dict[str, Any] = {'marker': MARKERS[i % len(MARKERS)], 'markersize': 4.5, 'linestyle': 'none'}
        axes.plot([], [], label=series, color='black', **marker, fillstyle='none' if i else 'full')
        for name, (low, middle, high, values) in spreads.items():
            line, own = names.index(name) + shift, color(name)
            bar = [[middle - low], [high - middle]]
            axes.errorbar([middle], [line], xerr=bar, color=own, marker='|', markersize=12, capsize=3, alpha=0.7)
            dots = list(values) or [middle]
            axes.plot(dots, [line] * len(dots), color=own, **marker, fillstyle='none' if i else 'full')
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(alpha=0.3)
