"""Study: accuracy of the position encodings under one recipe, LayerScale as a second factor."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..positions import ENCODINGS, parse_position
from ..training.arguments import whole_number
from .report import dot_plot, encoding_place, grouped, markdown_table, new_figure, plus_minus
from .study import Row, Study, Unit
from .training_grid import check_model, configuration_of, last_epochs, parse_training_flags, train, units_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASELINE = 'learned'


class Compare(Study):
    """Train every encoding under one recipe with several seeds, without LayerScale and with it."""

    name = 'compare'
    summary = 'train every encoding under one recipe and several seeds'
    description = """\
Train one vision transformer with each position encoding, all else equal: the
recipe, and for one seed the batches, their order, and the initial weights of
all that the variants share. LayerScale is a second factor, because published
comparisons changed it together with the encoding. Reported is the last epoch."""
    examples = """\
  timm-sape2 study compare
  timm-sape2 study compare --encodings learned sape2 learned+sape2 \\
      --layer-scale off 1e-4 --seeds 0 1 2 --data-dir cifar10 --epochs 100
  timm-sape2 study compare -c recipe.yaml --data-dir photos --experiment photos"""

    def __init__(self, arguments: argparse.Namespace, flags: Sequence[str]) -> None:
        self.args = parse_training_flags(flags)
        variants = [
            {'encoding': encoding, 'layer_scale': 'off' if value is None else f'{value:g}'}
            for encoding in arguments.encodings
            for value in map(initial_layer_scale, arguments.layer_scale)
        ]
        for encoding in arguments.encodings:
            parse_position(encoding)
            check_model(self.args, {'position': encoding})
        if 'init_values' in self.args.model_kwargs:
            raise ValueError('--model-kwargs init_values=... is what the study varies; use --layer-scale')
        self.units = units_of(variants, arguments.seeds)
        self.configuration = configuration_of(self.args)

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            '--encodings',
            nargs='+',
            default=[*ENCODINGS, 'learned+sape2'],
            metavar='NAME',
            help="names as in position=, joined by '+' (default: all, and learned+sape2)",
        )
        parser.add_argument(
            '--layer-scale',
            nargs='+',
            default=['off', '1e-4'],
            metavar='X',
            help="initial values of LayerScale, or 'off' (default: off 1e-4)",
        )
        parser.add_argument(
            '--seeds', nargs='+', type=whole_number, default=[0, 1, 2], metavar='N', help='seeds (default: 0 1 2)'
        )

    def run(self, unit: Unit, folder: Path) -> list[Row]:
        model_kwargs: dict[str, Any] = {'position': unit['encoding']}
        if unit['layer_scale'] != 'off':
            model_kwargs['init_values'] = initial_layer_scale(unit['layer_scale'])
        name = f'{unit["encoding"]}_{unit["layer_scale"]}_seed{unit["seed"]}'
        return [unit | row for row in train(self.args, name, model_kwargs, unit['seed'], folder)]

    def report(self, rows: list[Row]) -> str:
        last = self.last(rows)
        scales = list(grouped(last, 'layer_scale'))
        table = []
        for (encoding,), of_encoding in grouped(last, 'encoding').items():
            line = {'encoding': encoding}
            for (scale,) in scales:
                runs = [row for row in of_encoding if row['layer_scale'] == scale]
                differences = self.differences(runs, last)
                line[f'top-1, LayerScale {scale}'] = plus_minus([row['top1'] for row in runs]) if runs else 'not run'
                line[f'less {BASELINE}, LayerScale {scale}'] = plus_minus(differences) if differences else ''
            line['seeds'] = ', '.join(str(seed) for (seed,) in grouped(of_encoding, 'seed'))
            table.append(line)
        return (
            'Top-1 accuracy in % on the validation images after the last epoch, mean ± standard deviation over seeds; '
            f'"less {BASELINE}" is the mean of the differences of runs with the same seed.\n\n{markdown_table(table)}'
        )

    @staticmethod
    def last(rows: list[Row]) -> list[Row]:
        """Return the last epochs, in the order of the table of encodings, those without LayerScale first."""
        last = last_epochs(rows, ('encoding', 'layer_scale', 'seed'))
        return sorted(last, key=lambda row: (encoding_place(row['encoding']), row['layer_scale'] != 'off', row['seed']))

    @staticmethod
    def differences(runs: list[Row], last: list[Row]) -> list[float]:
        """Return by how much runs are better than the baseline with the same seed and LayerScale."""
        baseline = {(row['layer_scale'], row['seed']): row['top1'] for row in last if row['encoding'] == BASELINE}
        pairs = [(row['top1'], baseline.get((row['layer_scale'], row['seed']))) for row in runs]
        return [top1 - base for top1, base in pairs if base is not None]

    def plots(self, rows: list[Row]) -> 'dict[str, Figure]':
        last = self.last(rows)
        dots = {
            f'LayerScale {scale}': {
                encoding: [row['top1'] for row in runs] for (encoding,), runs in grouped(of_scale, 'encoding').items()
            }
            for (scale,), of_scale in grouped(last, 'layer_scale').items()
        }
        return {'accuracy': dot_plot(dots, 'top-1 in %'), 'curves': self.curves(rows)}

    @staticmethod
    def curves(rows: list[Row]) -> 'Figure':
        """Draw training loss and accuracy by epoch, the mean over seeds."""
        figure = new_figure(11, 4.5)
        left, right = figure.subplots(1, 2)
        for i, ((encoding,), of_encoding) in enumerate(grouped(rows, 'encoding').items()):
            for (scale,), of_scale in grouped(of_encoding, 'layer_scale').items():
                epochs = grouped(of_scale, 'epoch')
                style = {'color': f'C{i % 10}', 'linestyle': '-' if scale == 'off' else '--', 'marker': '.'}
                for axes, value in ((left, 'train_loss'), (right, 'top1')):
                    means = [sum(row[value] for row in runs) / len(runs) for runs in epochs.values()]
                    axes.plot([epoch for (epoch,) in epochs], means, label=f'{encoding}, {scale}', **style)
        left.set(xlabel='epoch', ylabel='training loss')
        right.set(xlabel='epoch', ylabel='top-1 in %')
        right.legend(fontsize=7, loc='center left', bbox_to_anchor=(1, 0.5))
        return figure


def initial_layer_scale(text: str) -> float | None:
    """Read a value of `--layer-scale`."""
    if text == 'off':
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise ValueError(f"--layer-scale must be 'off' or a number above 0, not {text!r}")
    return value
