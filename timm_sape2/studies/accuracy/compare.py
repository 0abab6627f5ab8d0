"""Study: accuracy of the position encodings under one recipe, LayerScale as a second factor."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._arguments import whole_number
from ..._figure import new_figure
from ..._table import markdown_table
from ...positions import ENCODINGS
from ..report import (
    TOP1_OF_SEEDS,
    by_encoding,
    draw_dots,
    draw_line,
    grouped,
    improvement,
    layer_scale_in_words,
    line_styles,
    models_in_words,
    plus_minus,
    spread_over_seeds,
    title_of_lines,
)
from ..study import Row, Study, Unit
from .training_grid import (
    check_model,
    encoding_arguments,
    last_epochs,
    parse_training_flags,
    recipe_of,
    train,
    with_seeds,
)

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
  timm-sape2 study compare --encodings rope 'rope(coordinates=max, jitter=2)'
  timm-sape2 study compare -c recipe.yaml --data-dir photos --experiment photos"""

    def __init__(self, arguments: argparse.Namespace, flags: Sequence[str]) -> None:
        self.args = parse_training_flags(flags)
        variants = [
            {'encoding': encoding, 'layer_scale': 'off' if value is None else f'{value:g}'}
            for encoding in arguments.encodings
            for value in map(initial_layer_scale, arguments.layer_scale)
        ]
        for encoding in arguments.encodings:
            check_model(self.args, encoding_arguments(encoding))
        if 'init_values' in self.args.model_kwargs:
            raise ValueError('--model-kwargs init_values=... is what the study varies; use --layer-scale')
        self.units = with_seeds(variants, arguments.seeds)
        self.configuration = recipe_of(self.args)

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            '--encodings',
            nargs='+',
            default=[*ENCODINGS, 'learned+sape2'],
            metavar='NAME',
            help="names as in position=, joined by '+', with options in brackets (default: all, and learned+sape2)",
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
        model_kwargs = encoding_arguments(unit['encoding'])
        if unit['layer_scale'] != 'off':
            model_kwargs['init_values'] = initial_layer_scale(unit['layer_scale'])
        name = f'{unit["encoding"]}_{unit["layer_scale"]}_seed{unit["seed"]}'
        return [unit | row for row in train(self.args, name, model_kwargs, unit['seed'], folder)]

    def report(self, rows: list[Row]) -> str:
        last = sorted(last_epochs(rows, ('encoding', 'layer_scale', 'seed')), key=by_encoding)
        scales = list(grouped(last, 'layer_scale'))
        table = []
        for (encoding,), of_encoding in grouped(last, 'encoding').items():
            line = {'encoding': encoding}
            for (scale,) in scales:
                runs = [row for row in of_encoding if row['layer_scale'] == scale]
                baseline = [row for row in last if (row['encoding'], row['layer_scale']) == (BASELINE, scale)]
                line[f'top-1, LayerScale {scale}'] = plus_minus([row['top1'] for row in runs]) or 'not run'
                line[f'less {BASELINE}, LayerScale {scale}'] = improvement(runs, baseline)
            line['seeds'] = ', '.join(str(seed) for (seed,) in grouped(of_encoding, 'seed'))
            table.append(line)
        return (
            'Top-1 accuracy in % on the validation images after the last epoch, mean ± standard deviation over seeds; '
            f'"less {BASELINE}" is the mean of the differences of runs with the same seed.\n\n{markdown_table(table)}'
        )

    @staticmethod
    def plots(rows: list[Row], configuration: Mapping[str, Any]) -> 'dict[str, Figure]':
        last = sorted(last_epochs(rows, ('encoding', 'layer_scale', 'seed')), key=by_encoding)
        scales = sorted({row['layer_scale'] for row in last}, key=lambda scale: (scale != 'off', scale))
        dots = {
            layer_scale_in_words(scale): {
                encoding: spread_over_seeds([row['top1'] for row in runs if row['layer_scale'] == scale])
                for (encoding,), runs in grouped(last, 'encoding').items()
                if any(row['layer_scale'] == scale for row in runs)
            }
            for scale in scales
        }
        names = grouped(last, 'encoding')
        figure = new_figure(8, 1.2 + 0.35 * len(names) * len(dots) ** 0.5)
        axes = figure.subplots()
        draw_dots(axes, dots)
        epochs = 1 + max(row['epoch'] for row in last)
        axes.set(title=f'Which encoding is the most accurate after {epochs} epochs?', xlabel=TOP1_OF_SEEDS)
        if len(dots) > 1:
            axes.legend()
        figures = {'accuracy': figure}
        return figures | {'curves': Compare.curves(rows)} if len(grouped(rows, 'epoch')) > 1 else figures

    @staticmethod
    def curves(rows: list[Row]) -> 'Figure':
        """Draw training loss and accuracy by epoch."""
        models = grouped(sorted(rows, key=by_encoding), 'encoding', 'layer_scale')
        figure = new_figure(12, 5)
        panels = figure.subplots(1, 2)
        styles = line_styles([encoding for encoding, _ in models])
        names = models_in_words(models)
        for (model, of_model), style in zip(models.items(), styles, strict=True):
            epochs = sorted(grouped(of_model, 'epoch').items())
            for axes, value in zip(panels, ('train_loss', 'top1'), strict=True):
                spreads = [spread_over_seeds([row[value] for row in runs]) for _, runs in epochs]
                draw_line(axes, [epoch for (epoch,), _ in epochs], spreads, names[model], style)
        for axes, label in zip(panels, ('training loss', 'validation top-1 in %'), strict=True):
            axes.set(xlabel='epoch', ylabel=label)
            axes.grid(alpha=0.3)
            axes.xaxis.get_major_locator().set_params(integer=True)
        figure.suptitle(title_of_lines('How does each encoding learn?', rows))
        figure.legend(*panels[0].get_legend_handles_labels(), loc='outside right center', fontsize=8)
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
