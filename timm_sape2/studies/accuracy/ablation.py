"""Study: what each part of SaPE2 contributes."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._arguments import whole_number
from ..._figure import new_figure
from ..._table import markdown_table
from ...positions import parse_position
from ..report import (
    TOP1_OF_SEEDS,
    draw_dots,
    encoding_color,
    grouped,
    improvement,
    plus_minus,
    spread_over_seeds,
)
from ..study import Row, Study, Unit
from .training_grid import check_model, last_epochs, parse_training_flags, recipe_of, train, with_seeds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEQUENCE = 'sequence order'
OPTIONS: dict[str, dict[str, Any]] = {
    'as in the paper': {},
    'gating none': {'gating': 'none'},
    'axes x': {'axes': 'x'},
    'axes y': {'axes': 'y'},
    'target q': {'target': 'q'},
    'target qk': {'target': 'qk'},
    'gate_source separate': {'gate_source': 'separate'},
    'gate_source value': {'gate_source': 'value'},
    'num_positions 2': {'num_positions': 2},
    'num_positions 4': {'num_positions': 4},
    'num_positions 16': {'num_positions': 16},
}
VARIANTS = (*OPTIONS, SEQUENCE)


class Ablation(Study):
    """Train SaPE2 with one part changed at a time."""

    name = 'ablation'
    summary = 'train SaPE2 with one part changed at a time'
    description = """\
Train SaPE2 as in the paper (gates from keys, rows and columns, embedding on
keys, 10 positions), and with one part changed at a time: without gating, one
axis, another target, another source of the gates, fewer and more positions,
and positions in sequence order instead of on the grid, which is CoPE. Batches,
order and shared initial weights are the same for one seed."""
    examples = """\
  timm-sape2 study ablation
  timm-sape2 study ablation --variants 'as in the paper' 'gating none' \\
      --seeds 0 1 --data-dir cifar10 --epochs 100
  timm-sape2 study ablation --position learned+sape2 --experiment with-learned"""

    def __init__(self, arguments: argparse.Namespace, flags: Sequence[str]) -> None:
        self.args = parse_training_flags(flags)
        self.position = arguments.position
        if 'sape2' not in parse_position(self.position):
            raise ValueError(f"--position must have 'sape2' in it, not {self.position!r}")
        for variant in arguments.variants:
            if variant not in VARIANTS:
                raise ValueError(f'unknown variant {variant!r}; there are: {", ".join(VARIANTS)}')
            check_model(self.args, self.model_kwargs(variant))
        self.units = with_seeds([{'variant': variant} for variant in arguments.variants], arguments.seeds)
        self.configuration = {**recipe_of(self.args), 'position': self.position}

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument('--position', default='sape2', metavar='NAME', help='the whole encoding (default: sape2)')
        parser.add_argument(
            '--variants',
            nargs='+',
            default=list(VARIANTS),
            metavar='NAME',
            help=f'of: {", ".join(VARIANTS)} (default: all)',
        )
        parser.add_argument(
            '--seeds', nargs='+', type=whole_number, default=[0, 1, 2], metavar='N', help='seeds (default: 0 1 2)'
        )

    def model_kwargs(self, variant: str) -> dict[str, Any]:
        """Return the arguments of the model for a variant."""
        if variant == SEQUENCE:
            return {'position': self.position.replace('sape2', 'cope')}
        return {'position': self.position, 'position_args': {'sape2': OPTIONS[variant]}}

    def run(self, unit: Unit, folder: Path) -> list[Row]:
        name = f'{unit["variant"].replace(" ", "-")}_seed{unit["seed"]}'
        rows = train(self.args, name, self.model_kwargs(unit['variant']), unit['seed'], folder)
        return [unit | row for row in rows]

    def report(self, rows: list[Row]) -> str:
        last = last_epochs(rows, ('variant', 'seed'))
        by_variant = grouped(last, 'variant')
        table = [
            {
                'variant': variant,
                'top-1': plus_minus([row['top1'] for row in runs]),
                'less "as in the paper"': improvement(runs, by_variant.get(('as in the paper',), [])),
                'seeds': ', '.join(str(row['seed']) for row in runs),
            }
            for (variant,), runs in by_variant.items()
        ]
        return (
            f'Top-1 accuracy in % of variants of `{self.position}` on the validation images after the last epoch, '
            'mean ± standard deviation over seeds; differences are between runs with the same seed.\n\n'
            f'{markdown_table(table)}'
        )

    @staticmethod
    def plots(rows: list[Row], configuration: Mapping[str, Any]) -> 'dict[str, Figure]':
        last = last_epochs(rows, ('variant', 'seed'))
        colors = {SEQUENCE: encoding_color('cope')}
        dots = {
            name: spread_over_seeds([row['top1'] for row in runs]) for (name,), runs in grouped(last, 'variant').items()
        }
        figure = new_figure(8, 1.2 + 0.35 * len(dots))
        axes = figure.subplots()
        draw_dots(axes, {'a seed': dots}, lambda name: colors.get(name, encoding_color('sape2')))
        axes.set(title=f'What does each part of {configuration["position"]} contribute?', xlabel=TOP1_OF_SEEDS)
        return {'accuracy': figure}
