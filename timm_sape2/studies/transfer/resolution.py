"""Study: accuracy at other image sizes than the one of training."""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._arguments import positive_float
from ..._figure import new_figure
from ..._table import markdown_table
from ...trained.accuracy import evaluate
from ..accuracy.training_grid import check_model, train_run
from ..report import (
    by_model,
    draw_line,
    grouped,
    line_styles,
    models_in_words,
    plus_minus,
    spread_over_seeds,
    title_of_lines,
    without_options,
)
from ..runner import unit_names
from ..study import Row, Study, Unit
from .runs import TrainedRun, add_runs_argument, open_runs, run_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MULTIPLES = (1, 1.5, 2, 3, 4.5)
FACTORS = ('encoding', 'layer_scale', 'distance_scale')


class Resolution(Study):
    """Take models to other image sizes, as they are and after an epoch of training there."""

    name = 'resolution'
    summary = 'take trained models to other image sizes'
    description = """\
Validate trained models at other image sizes, also non-square ones, first as
they are, then after one epoch of training at that size. Learned position
embeddings and bias tables are resampled bicubically; SaPE2 is tried with both
settings of distance_scale. The two columns are never mixed."""
    examples = """\
  timm-sape2 study resolution --runs output/studies/compare
  timm-sape2 study resolution --runs output/train/mine --sizes 192 256 192x256 \\
      --no-fine-tune"""

    def __init__(self, arguments: argparse.Namespace, flags: Sequence[str]) -> None:
        self.runs = open_runs(arguments.runs, flags)
        self.fine_tune_lr = arguments.fine_tune_lr
        asked = [read_size(text) for text in arguments.sizes or ()]
        self.units = [
            {
                **run.factors,
                'distance_scale': distance_scale,
                'size': f'{height}x{width}',
                'training': 'one epoch' if fine_tune else 'none',
            }
            for fine_tune in ((False, True) if arguments.fine_tune else (False,))
            for run in self.runs
            for height, width in asked or multiples(run)
            for distance_scale in distance_scales(run)
        ]
        self.units.sort(key=lambda unit: (unit['training'] != 'none', read_size(unit['size'])))
        for unit in self.units:
            run = run_of(unit, self.runs)
            check_model(run.arguments_at(read_size(unit['size'])), changed_model_kwargs(run, unit))
        data = {name: getattr(self.runs[0].args, name) for name in ('data_dir', 'train_num_samples', 'val_num_samples')}
        self.configuration = {**data, 'fine_tune_lr': self.fine_tune_lr}

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        add_runs_argument(parser)
        parser.add_argument(
            '--sizes',
            nargs='+',
            metavar='N',
            help='sides, or HEIGHTxWIDTH, in pixels (default: 1, 1.5, 2, 3 and 4.5 times the size of training)',
        )
        parser.add_argument(
            '--fine-tune',
            action=argparse.BooleanOptionalAction,
            default=True,
            help='validate after an epoch of training too (default: yes)',
        )
        parser.add_argument(
            '--fine-tune-lr', type=positive_float, default=1e-4, metavar='X', help='its rate (default: 1e-4)'
        )

    def run(self, unit: Unit, folder: Path) -> list[Row]:
        run, size = run_of(unit, self.runs), read_size(unit['size'])
        if unit['training'] == 'one epoch':
            (name,) = unit_names([unit])
            args = run.arguments_at(size, changed_model_kwargs(run, unit))
            args.epochs, args.warmup_epochs, args.lr, args.val_interval = 1, 0, self.fine_tune_lr, 1
            args.output, args.experiment, args.resume = str(folder / 'runs'), name, 'auto'
            (row,) = train_run(args)
            return [{**unit, 'top1': row['top1'], 'loss': row['eval_loss']}]
        device, autocast = run.set_up_device()
        model = run.model_at(size, changed_model_kwargs(run, unit)).to(device)
        metrics = evaluate(model, run.validation_loader(model, size, device), device, autocast)
        assert metrics is not None
        return [{**unit, 'top1': metrics['top1'], 'loss': metrics['loss']}]

    def report(self, rows: list[Row]) -> str:
        parts = []
        for (training,), of_training in grouped(rows, 'training').items():
            sizes = sizes_of(of_training)
            table = []
            for factors, of_model in by_model(of_training, 'distance_scale').items():
                top1 = top1_by_size(of_model)
                table.append(
                    dict(zip(FACTORS, factors, strict=True)) | {size: plus_minus(top1.get(size, [])) for size in sizes}
                )
            title = 'As trained, no further training' if training == 'none' else 'After one epoch at the size'
            parts.append(f'## {title}\n\n{markdown_table(table)}')
        explanation = (
            'Top-1 accuracy in % by image size (height x width), mean ± standard deviation over seeds. Images are '
            'resized, and cropped at the center where the size is not square.'
        )
        return '\n\n'.join([explanation, *parts])

    @staticmethod
    def plots(rows: list[Row], configuration: Mapping[str, Any]) -> 'dict[str, Figure]':
        by_training = grouped(rows, 'training')
        models = list(by_model(rows, 'distance_scale'))
        styles = dict(zip(models, line_styles([encoding for encoding, *_ in models]), strict=True))
        names = models_in_words(models)
        figure = new_figure(5 * len(by_training) + 3.5, 5)
        panels = figure.subplots(1, len(by_training), sharey=True, squeeze=False)[0]
        for axes, ((training,), of_training) in zip(panels, by_training.items(), strict=True):
            sizes = sizes_of(of_training)
            num_square = sum(height == width for height, width in map(read_size, sizes))
            places = [*range(num_square), math.nan, *range(num_square, len(sizes))]  # the line ends with square sizes
            axes.set_xticks(range(len(sizes)), sizes)
            for factors, of_model in by_model(of_training, 'distance_scale').items():
                top1 = top1_by_size(of_model)
                spreads = [spread_over_seeds(top1.get(size, [math.nan])) for size in sizes]
                spreads.insert(num_square, spread_over_seeds([math.nan]))
                draw_line(axes, places, spreads, names[factors], styles[factors])
            axes.set(title='as trained' if training == 'none' else 'after one epoch at the size', xlabel='image size')
            axes.grid(alpha=0.3)
        panels[0].set_ylabel('top-1 in %')
        figure.suptitle(title_of_lines('Does accuracy hold at other image sizes?', rows))
        lines = {line.get_label(): line for axes in panels for line in axes.lines}
        ordered = [lines[names[factors]] for factors in models]
        figure.legend(handles=ordered, loc='outside right center', fontsize=8)
        return {'sizes': figure}


def sizes_of(rows: Sequence[Row]) -> list[str]:
    """Return the sizes, square ones first and then by height."""
    sizes = {size: read_size(size) for (size,) in grouped(rows, 'size')}
    return sorted(sizes, key=lambda size: (sizes[size][0] != sizes[size][1], sizes[size]))


def top1_by_size(rows: Sequence[Row]) -> dict[str, list[float]]:
    """Return the accuracies at each size."""
    return {size: [row['top1'] for row in at_size] for (size,), at_size in grouped(rows, 'size').items()}


def read_size(text: str) -> tuple[int, int]:
    """Read '48' or '32x48' as height and width."""
    sides = text.split('x')
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise ValueError(f'a size is a side or HEIGHTxWIDTH in pixels, not {text!r}')
    return int(sides[0]), int(sides[-1])


def multiples(run: TrainedRun) -> list[tuple[int, int]]:
    """Return the sizes to try by default, `MULTIPLES` of the size of training in whole patches, each once."""
    patch = check_model(run.arguments_at(run.img_size), {}).patch_embed.patch_size
    sizes = [[round(factor * s / p) * p for s, p in zip(run.img_size, patch, strict=True)] for factor in MULTIPLES]
    return list(dict.fromkeys((height, width) for height, width in sizes))


def distance_scales(run: TrainedRun) -> tuple[str, ...]:
    """Return the settings of SaPE2's `distance_scale` to try with a model, an empty one for other encodings."""
    return ('none', 'grid') if 'sape2' in without_options(run.encoding).split('+') else ('',)


def changed_model_kwargs(run: TrainedRun, unit: Unit) -> dict[str, Any]:
    """Return what a unit changes in the model."""
    if not unit['distance_scale']:
        return {}
    position_args: dict[str, Any] = dict(run.args.model_kwargs.get('position_args') or {})
    sape2 = {**position_args.get('sape2', {}), 'distance_scale': unit['distance_scale']}
    return {'position_args': {**position_args, 'sape2': sape2}}
