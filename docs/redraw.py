"""Draw the plots of finished studies anew, from their results.csv and run.json alone.

python docs/redraw.py docs/studies/compare docs/results/resolution
"""

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm_sape2.studies import STUDIES
from timm_sape2.studies.runner import draw_plots


def plain_value(text: str) -> Any:
    """Return a cell of results.csv as the number or the text that it was, None if it is empty."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text or None


def main(folders: Sequence[str]) -> None:
    for folder in map(Path, folders):
        configuration = json.loads((folder / 'run.json').read_text())['configuration']
        with open(folder / 'results.csv', newline='') as file:
            rows = [{name: plain_value(text) for name, text in row.items()} for row in csv.DictReader(file)]
        plots = draw_plots(STUDIES[configuration['study']], folder, rows, configuration)
        print(*(folder / f'{name}.png' for name in plots))


if __name__ == '__main__':
    main(sys.argv[1:])
