"""The curves of a run, loss and accuracy by epoch, as a picture."""

import csv
import functools
import logging
from pathlib import Path
from typing import Any

from .run_folder import atomic_write

_logger = logging.getLogger(__name__)


def draw_curves(folder: Path) -> None:
    """Draw summary.csv of a run as curves.png beside it; without matplotlib, say once how to get it."""
    figure_class = _figure_class()
    if figure_class is None:
        return
    with open(folder / 'summary.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    epochs = [int(row['epoch']) for row in rows]
    figure = figure_class(figsize=(9, 4), layout='constrained')
    for axes, title, columns in zip(
        figure.subplots(1, 2),
        ('loss', 'accuracy in %'),
        (('train_loss', 'eval_loss'), ('eval_top1', 'eval_top5')),
        strict=True,
    ):
        for column in columns:
            axes.plot(epochs, [float(row[column]) for row in rows], marker='.', label=LABELS[column])
        axes.set(title=title, xlabel='epoch')
        axes.grid(alpha=0.3)
        axes.legend()
    with atomic_write(folder / 'curves.png') as path:
        figure.savefig(path, dpi=120)


LABELS = {'train_loss': 'training', 'eval_loss': 'validation', 'eval_top1': 'top-1', 'eval_top5': 'top-5'}


@functools.cache
def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        _logger.warning("No curves.png without matplotlib: pip install 'timm_sape2[demo]'")
        return None
    return Figure
