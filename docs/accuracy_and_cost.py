"""Draw accuracy against the cost of training, from what `study compare` and `study overhead` measured.

python docs/accuracy_and_cost.py docs/results/screening docs/studies/overhead docs/results/accuracy_and_cost.png

Encodings that only one of the two studies has are left out, and named.
"""

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm_sape2._figure import new_figure
from timm_sape2.studies.accuracy.training_grid import last_epochs
from timm_sape2.studies.report import encoding_color, encoding_place, grouped, spread_over_seeds


def read_rows(folder: Path) -> list[dict[str, Any]]:
    with open(folder / 'results.csv', newline='') as file:
        return list(csv.DictReader(file))


def accuracy_by_encoding(folder: Path) -> dict[str, list[float]]:
    """Return top-1 in percent after the last epoch, a value a seed, without LayerScale."""
    rows = [row | {'epoch': int(row['epoch'])} for row in read_rows(folder) if row['layer_scale'] == 'off']
    runs = grouped(last_epochs(rows, ('encoding', 'seed')), 'encoding')
    return {encoding: [float(row['top1']) for row in of_encoding] for (encoding,), of_encoding in runs.items()}


def main(arguments: Sequence[str]) -> None:
    accuracy_folder, cost_folder, picture = map(Path, arguments)
    accuracy = accuracy_by_encoding(accuracy_folder)
    cost = {row['encoding']: float(row['training_time_ratio']) for row in read_rows(cost_folder)}
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    shown = sorted(accuracy.keys() & cost.keys(), key=cost.__getitem__)
    for number, encoding in enumerate(shown):
        top1, color = spread_over_seeds(accuracy[encoding]), encoding_color(encoding)
        errors = [[top1.middle - top1.low], [top1.high - top1.middle]]
        axes.errorbar(cost[encoding], top1.middle, errors, fmt='o', color=color, capsize=3)
        label_place = (6, 4 if number % 2 else -12)
        axes.annotate(encoding, (cost[encoding], top1.middle), label_place, textcoords='offset points', color=color)
    axes.set_title('What does accuracy cost in training?', loc='left')
    axes.set_xlabel('time of a training step, relative to no encoding')
    axes.set_ylabel('validation top-1 in %')
    axes.grid(alpha=0.3)
    axes.margins(x=0.2, y=0.1)
    figure.savefig(picture, dpi=120)
    print(picture)
    missing = sorted(accuracy.keys() ^ cost.keys(), key=encoding_place)
    if missing:
        print('left out:', *missing)


if __name__ == '__main__':
    main(sys.argv[1:])
