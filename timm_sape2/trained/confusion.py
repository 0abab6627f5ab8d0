"""Which classes a model confuses: counts, a table and a picture."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._figure import new_figure
from .._table import text_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_NUMBERS = 20  # classes up to which the picture has numbers in its cells
MOST_NAMES = 60  # classes up to which it names them


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

    def per_class(self) -> list[dict[str, Any]]:
        """Return a row for each class, in their order.

        A row has 'index' and 'name' of the class, the number of its 'images', 'top1' (percent of its images that are
        taken for it, None if there are none), 'precision' (percent of what is taken for it that is of it, None if
        nothing is), 'mistaken_for' (the other class that most of its images are taken for, None if there is none) and
        'mistaken' (how many these are).
        """
        images, taken = self.counts.sum(1).tolist(), self.counts.sum(0).tolist()
        right = self.counts.diagonal().tolist()
        mistaken, worst = (part.tolist() for part in self.counts.clone().fill_diagonal_(0).max(1))
        return [
            {
                'index': index,
                'name': name,
                'images': images[index],
                'top1': round(100 * right[index] / images[index], 4) if images[index] else None,
                'precision': round(100 * right[index] / taken[index], 4) if taken[index] else None,
                'mistaken_for': self.names[worst[index]] if mistaken[index] else None,
                'mistaken': mistaken[index],
            }
            for index, name in enumerate(self.names)
        ]

    def table(self) -> str:
        """Return the rows as text, the class that is recognised worst first."""
        rows = [('class', 'images', 'top-1', 'precision', 'most often mistaken for')]
        for row in sorted(self.per_class(), key=lambda row: 101 if row['top1'] is None else row['top1']):
            mistake = f'{row["mistaken_for"]} ({row["mistaken"]})' if row['mistaken'] else ''
            rows.append((row['name'], f'{row["images"]:,}', percent(row['top1']), percent(row['precision']), mistake))
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
