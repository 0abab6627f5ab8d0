"""Tables and plots of results."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..positions import ENCODINGS
from .study import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def encoding_place(position: str) -> tuple[int, list[int]]:
    """Return a key that sorts encodings as `ENCODINGS` has them, and those that are joined after them."""
    places = [list(ENCODINGS).index(name) if name in ENCODINGS else len(ENCODINGS) for name in position.split('+')]
    return len(places), places


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows of the same columns as a Markdown table."""
    lines = [list(rows[0]), ['---'] * len(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def grouped(rows: Iterable[Row], *factors: str) -> dict[tuple, list[Row]]:
    """Return the rows by their values of some factors, in the order of their first appearance."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[factor] for factor in factors), []).append(row)
    return groups


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the sample standard deviation, which is NaN for a single value."""
    mean = sum(values) / len(values)
    return mean, statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan


def plus_minus(values: Sequence[float], digits: int = 2) -> str:
    """Return 'mean ± standard deviation', or only the value if there is one."""
    mean, deviation = mean_and_deviation(values)
    return f'{mean:.{digits}f}' if math.isnan(deviation) else f'{mean:.{digits}f} ± {deviation:.{digits}f}'


def three_digits(value: float) -> str:
    """Return a number rounded to three significant digits, such as '2910' or '0.0123'."""
    return f'{float(f"{value:.3g}"):g}'


def new_figure(width: float = 8, height: float = 4) -> 'Figure':
    """Return an empty figure, inches wide and high, that needs no screen."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout='constrained')


def dot_plot(groups: Mapping[str, Mapping[str, Sequence[float]]], label: str) -> 'Figure':
    """Draw values as dots in lines, with their mean as a stroke and their standard deviation.

    Args:
        groups: Values by name of the line, by series; every series is a colour.
        label: What the values are, with their unit.
    """
    names = list(dict.fromkeys(name for series in groups.values() for name in series))
    figure = new_figure(8, 1 + 0.32 * len(names) * len(groups) ** 0.5)
    axes = figure.subplots()
    for i, (series, values_by_name) in enumerate(groups.items()):
        shift = 0.8 * ((i + 0.5) / len(groups) - 0.5)
        lines = [names.index(name) + shift for name in values_by_name]
        means, deviations = zip(*map(mean_and_deviation, values_by_name.values()), strict=True)
        style: dict[str, Any] = {'marker': '|', 'markersize': 14, 'capsize': 3, 'linestyle': 'none', 'color': f'C{i}'}
        axes.errorbar(means, lines, xerr=[0 if math.isnan(d) else d for d in deviations], label=series, **style)
        for line, values in zip(lines, values_by_name.values(), strict=True):
            axes.plot(values, [line] * len(values), '.', color=f'C{i}', alpha=0.6)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.grid(alpha=0.3)
    if len(groups) > 1:
        axes.legend()
    return figure
