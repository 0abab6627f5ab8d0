"""Tables and plots of results."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .study import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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


def new_figure(width: float = 8, height: float = 4) -> 'Figure':
    """Return an empty figure, inches wide and high, that needs no screen."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout='constrained')


def bar_plot(groups: Mapping[str, Mapping[str, Sequence[float]]], label: str) -> 'Figure':
    """Draw horizontal bars of the mean of values, with their standard deviation and each value as a dot.

    Args:
        groups: Values by name of the bar, by series; every series is a colour.
        label: What the values are, with their unit.
    """
    names = list(dict.fromkeys(name for series in groups.values() for name in series))
    figure = new_figure(8, 1 + 0.32 * len(names) * len(groups) ** 0.5)
    axes = figure.subplots()
    height = 0.8 / len(groups)
    shown: list[float] = []
    for i, (series, values_by_name) in enumerate(groups.items()):
        for name, values in values_by_name.items():
            mean, deviation = mean_and_deviation(values)
            y = names.index(name) + (i - (len(groups) - 1) / 2) * height
            first = name == next(iter(values_by_name))
            axes.barh(y, mean, height * 0.9, color=f'C{i}', alpha=0.6, label=series if first else None)
            if not math.isnan(deviation):
                axes.errorbar(mean, y, xerr=deviation, color='black', capsize=2, linewidth=1)
            axes.plot(values, [y] * len(values), '.', color='black', markersize=4)
            shown += [value for value in values if math.isfinite(value)]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    if shown:
        margin = 0.15 * (max(shown) - min(shown)) or 1
        axes.set_xlim(max(0, min(shown) - margin) if min(shown) >= 0 else None, max(shown) + margin)
    axes.grid(axis='x', alpha=0.3)
    if len(groups) > 1:
        axes.legend()
    return figure
