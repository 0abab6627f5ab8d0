"""Study: accuracy at other image sizes than the one of training."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..trained.accuracy import evaluate
from ..training.arguments import positive_float
from .report import encoding_place, grouped, markdown_table, mean_and_deviation, new_figure, plus_minus
from .runner import unit_names
from .study import Row, Study, Unit
from .trained import TrainedRun, open_runs
from .training_grid import check_model, train_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
        sizes = [read_size(text) for text in arguments.sizes]
        self.units = [
            {
                **run.factors,
                'distance_scale': distance_scale,
                'size': f'{height}x{width}',
                'training': 'one epoch' if fine_tune else 'none',
            }
            for fine_tune in ((False, True) if arguments.fine_tune else (False,))
            for height, width in sizes
            for run in self.runs
            for distance_scale in distance_scales(run)
        ]
        for unit in self.units:
            run = self.run_of(unit)
            check_model(run.arguments_at(read_size(unit['size'])), model_kwargs(run, unit))
        data = {name: getattr(self.runs[0].args, name) for name in ('data_dir', 'train_num_samples', 'val_num_samples')}
        self.configuration = {**data, 'fine_tune_lr': self.fine_tune_lr}

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            '--runs', nargs='+', required=True, metavar='DIR', help='runs of train.py, or studies that trained some'
        )
        parser.add_argument(
            '--sizes',
            nargs='+',
            default=['24', '28', '32', '40', '48', '64', '32x48'],
            metavar='N',
            help='sides, or HEIGHTxWIDTH, in pixels (default: 24 28 32 40 48 64 32x48)',
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

    def run_of(self, unit: Unit) -> TrainedRun:
        """Return the run that a unit is about."""
        return next(run for run in self.runs if run.factors.items() <= unit.items())

    def run(self, unit: Unit, folder: Path) -> list[Row]:
        run, size = self.run_of(unit), read_size(unit['size'])
        if unit['training'] == 'one epoch':
            (name,) = unit_names([unit])
            args = run.arguments_at(size, model_kwargs(run, unit))
            args.epochs, args.warmup_epochs, args.lr, args.val_interval = 1, 0, self.fine_tune_lr, 1
            args.output, args.experiment, args.resume = str(folder / 'runs'), name, 'auto'
            (row,) = train_run(args)
            return [{**unit, 'top1': row['top1'], 'loss': row['eval_loss']}]
        device, autocast = run.set_up_device()
        model = run.model_at(size, model_kwargs(run, unit)).to(device)
        metrics = evaluate(model, run.validation_loader(model, size, device), device, autocast)
        assert metrics is not None
        return [{**unit, 'top1': metrics['top1'], 'loss': metrics['loss']}]

    def report(self, rows: list[Row]) -> str:
        parts = []
        for (training,), of_training in grouped(rows, 'training').items():
            sizes = sizes_of(of_training)
            table = []
            for factors, of_model in by_model(of_training).items():
                top1 = top1_by_size(of_model)
                table.append(
                    dict(zip(FACTORS, factors, strict=True))
                    | {size: plus_minus(top1[size]) if size in top1 else '' for size in sizes}
                )
            title = 'As trained, no further training' if training == 'none' else 'After one epoch at the size'
            parts.append(f'## {title}\n\n{markdown_table(table)}')
        explanation = (
            'Top-1 accuracy in % by image size (height x width), mean ± standard deviation over seeds. Images are '
            'resized, and cropped at the center where the size is not square.'
        )
        return '\n\n'.join([explanation, *parts])

    def plots(self, rows: list[Row]) -> 'dict[str, Figure]':
        by_training = grouped(rows, 'training')
        models = list(by_model(rows))
        figure = new_figure(5.5 * len(by_training) + 1.5, 4.5)
        panels = figure.subplots(1, len(by_training), sharey=True, squeeze=False)[0]
        for axes, ((training,), of_training) in zip(panels, by_training.items(), strict=True):
            sizes = sizes_of(of_training)
            for factors, of_model in by_model(of_training).items():
                top1, place = top1_by_size(of_model), models.index(factors)
                means = [mean_and_deviation(top1[size])[0] if size in top1 else float('nan') for size in sizes]
                label = ', '.join(factor for factor in factors if factor)
                style = ('-', '--')[place // 10 % 2]
                axes.plot(sizes, means, marker='.', color=f'C{place % 10}', linestyle=style, label=label)
            axes.set(title='as trained' if training == 'none' else 'after one epoch', xlabel='image size')
            axes.grid(alpha=0.3)
        panels[0].set_ylabel('top-1 in %')
        lines = {line.get_label(): line for axes in panels for line in axes.lines}
        panels[-1].legend(handles=list(lines.values()), fontsize=7, loc='center left', bbox_to_anchor=(1, 0.5))
        return {'sizes': figure}


def by_model(rows: Sequence[Row]) -> dict[tuple, list[Row]]:
    """Return the rows by model, encodings in the order of their table."""
    groups = grouped(rows, *FACTORS)
    return dict(sorted(groups.items(), key=lambda group: encoding_place(group[0][0])))


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


def distance_scales(run: TrainedRun) -> tuple[str, ...]:
    """Return the settings of SaPE2's `distance_scale` to try with a model, an empty one for other encodings."""
    return ('none', 'grid') if 'sape2' in str(run.factors['encoding']).split('+') else ('',)


def model_kwargs(run: TrainedRun, unit: Unit) -> dict[str, Any]:
    """Return what a unit changes in the model."""
    if not unit['distance_scale']:
        return {}
    position_args: dict[str, Any] = dict(run.args.model_kwargs.get('position_args') or {})
    sape2 = {**position_args.get('sape2', {}), 'distance_scale': unit['distance_scale']}
    return {'position_args': {**position_args, 'sape2': sape2}}
