"""Which classes a model confuses: counts, a table and a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._figure import new_figure
from .._table import text_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_NUMBERS = 20  # classes up to which the picture has numbers in its cells
MOST_NAMES = 60  # classes up to which it names them


@dataclass(frozen=True)
class ClassAccuracy:
    """How well a class is recognised."""

    index: int
    name: str
    images: int

    top1: float | None
    """Percent of its images that are taken for it, None if there are none."""

    precision: float | None
    """Percent of what is taken for it that is of it, None if nothing is."""

    mistaken_for: str | None
    """The class that most others of its images are taken for, None if there are no mistakes."""

    mistaken: int
    """How many of its images are taken for that."""


class Confusion:
    """Counts what images of each class are taken for.

    Args:
        names: Names of the classes.
    """

    def __init__(self, names: Sequence[str]):
        self.names = list(names)
        self.counts = torch.zeros(len(self.names), len(self.names), dtype=torch.long)
        """Images by their class (rows) and by the class that they are taken for (columns)."""

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Count a batch: logits (B, classes) and classes (B,)."""
        # of equal logits timm's top-1 takes the first of the top five, which need not be the one that argmax takes
        taken_for = logits.float().topk(min(5, logits.shape[1])).indices[:, 0]
        cells = targets * len(self.names) + taken_for
        self.counts += torch.bincount(cells, minlength=self.counts.numel()).view_as(self.counts).cpu()

    def per_class(self) -> list[ClassAccuracy]:
        """Return a row for each class, in their order."""
        mistakes = self.counts.clone().fill_diagonal_(0)
        rows = []
        for index, name in enumerate(self.names):
            right, images, taken = (
                int(part) for part in (self.counts[index, index], self.counts[index].sum(), self.counts[:, index].sum())
            )
            worst = int(mistakes[index].argmax())
            mistaken = int(mistakes[index, worst])
            rows.append(
                ClassAccuracy(
                    index,
                    name,
                    images,
                    round(100 * right / images, 4) if images else None,
                    round(100 * right / taken, 4) if taken else None,
                    self.names[worst] if mistaken else None,
                    mistaken,
                )
            )
        return rows

    def table(self) -> str:
        """Return the rows as text, the class that is recognised worst first."""
        rows = [('class', 'images', 'top-1', 'precision', 'most often mistaken for')]
        for row in sorted(self.per_class(), key=lambda row: 101 if row.top1 is None else row.top1):
            mistake = f'{row.mistaken_for} ({row.mistaken})' if row.mistaken else ''
            rows.append((row.name, f'{row.images:,}', percent(row.top1), percent(row.precision), mistake))
        return text_table(rows)

    def figure(self) -> 'Figure':
        """Draw the matrix: a row for each class, whose colours are the shares of its images; needs matplotlib."""
        count = len(self.names)
        side = min(max(3.0, 0.5 * count), 12.0)
        figure = new_figure(side + 2.5, side + 1.2)
        axes = figure.subplots()
        shares = (100 * self.counts / self.counts.sum(1, keepdim=True).clamp(min=1)).numpy()
        drawn = axes.imshow(shares, cmap='Blues', vmin=0, vmax=100)
        if count <= MOST_NAMES:
            axes.set_xticks(range(count), self.names, rotation=90 if max(map(len, self.names)) > 3 else 0)
            axes.set_yticks(range(count), self.names)
        if count <= MOST_NUMBERS:
            for row, column in self.counts.nonzero().tolist():
                color = 'white' if shares[row, column] > 50 else 'black'
                number = f'{self.counts[row, column]}'
                axes.text(column, row, number, ha='center', va='center', color=color, fontsize=8)
        axes.set(title='What are images of each class taken for?', xlabel='taken for', ylabel='class of the image')
        figure.colorbar(drawn, ax=axes, label='% of the images of the class', shrink=0.8)
        return figure


def percent(value: float | None) -> str:
    """Return a percentage as text, '-' for none."""
    return '-' if value is None else f'{value:.2f} %'
