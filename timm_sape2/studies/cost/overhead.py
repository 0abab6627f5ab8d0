"""Study: what each position encoding costs."""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._compat import compiled_at_most
from ..._figure import new_figure
from ..._table import markdown_table
from ...models.flops import count_flops, count_parameters, input_size
from ...positions import ENCODINGS
from ...training.hardware import device_name, mixed_precision, set_up_device
from ..report import Spread, draw_dots, grouped, three_digits
from ..study import Row, Study, Unit
from .correctness import check_against_reference, check_bias, check_fused, check_logits
from .measure import Step, peak_memory, ratio_quartiles, seconds_in_turns
from .settings import SETTINGS, add_measuring_arguments, chip_name, refuse_too_large, units_at
from .variants import IMPLEMENTATIONS, create_at_setting, create_variant, draw_tables, parse_variant

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEFAULT_MODEL = 'vit_small_pos_nope'
DEFAULT_BASELINE = 'nope'
DEFAULT_ENCODINGS = (*ENCODINGS, 'learned+sape2', 'sape2:reference')

MODEL_TOLERANCE = {False: 5e-3, True: 5e-2}
"""Largest error of SaPE2's bias, of attention and of logits, relative to what is right: in float32, which is TF32 on a
GPU, and in bfloat16."""

TABLE_STD = 0.25
"""Of SaPE2's tables: with those of a new model the bias is so small that errors would not show."""

RATIOS = {
    'parameters_ratio': 'parameters',
    'flops_ratio': 'FLOPs',
    'inference_time_ratio': 'inference time',
    'training_time_ratio': 'training step time',
    'inference_peak_bytes_ratio': 'inference memory',
    'training_peak_bytes_ratio': 'training step memory',
}


class Overhead(Study):
    """Measure time, memory, parameters and FLOPs of every encoding at several image sizes."""

    name = 'overhead'
    summary = 'measure time and memory of every encoding, relative to none'
    description = """\
Measure what each position encoding costs in one and the same transformer:
parameters, FLOPs, images a second in inference and in training (forward, loss,
backward, AdamW), and the memory that both take. All encodings are measured in
turns in one process, and reported relative to no encoding (`nope`) or another
model. What gives wrong numbers is not measured: the study stops.
`attention-cost` measures attention alone."""
    examples = """\
  timm-sape2 study overhead
  timm-sape2 study overhead --baseline vit_small_patch16_224 \\
      --encodings sape2 sape2:reference sape2:compiled
  timm-sape2 study overhead --model vit_compact_pos_nope_patch4_32 \\
      --settings 32/4 64/4 --encodings learned sape2 --batch-size 32 8
  timm-sape2 study overhead --device cuda --amp --compile --rounds 30"""
    takes_flags = False
    one_process = True

    def __init__(self, arguments: argparse.Namespace, flags: Sequence[str]) -> None:
        self.device, self.amp = device_name(arguments.device), arguments.amp
        self.rounds, self.compile = arguments.rounds, arguments.compile
        self.model, self.baseline = arguments.model, arguments.baseline
        self.units = units_at(arguments.settings, arguments.batch_size, self.device)
        names = (DEFAULT_BASELINE, *arguments.encodings) if self.baseline == DEFAULT_BASELINE else arguments.encodings
        self.variants = {name: parse_variant(name) for name in names}
        for name in (self.baseline, *self.variants):
            for setting in arguments.settings:
                self.create(name, setting, torch.device('meta'))
        self.configuration = {
            'model': self.model,
            'baseline': self.baseline,
            'encodings': list(self.variants),
            'rounds': self.rounds,
            'device': chip_name(self.device),
            'amp': self.amp,
            'compile': self.compile,
        }

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        add_measuring_arguments(parser, SETTINGS, 'mixed precision in bfloat16')
        add = parser.add_argument
        add(
            '--model',
            default=DEFAULT_MODEL,
            metavar='NAME',
            help='model of this package that gives width and depth (default: %(default)s)',
        )
        add(
            '--encodings',
            nargs='+',
            default=DEFAULT_ENCODINGS,
            metavar='NAME',
            help="names as in position=, joined by '+', and an implementation after ':' where the usual one is not "
            f'meant: {"; ".join(f"{name}, {what}" for name, what in IMPLEMENTATIONS.items())} '
            '(default: all encodings, learned+sape2 and sape2:reference)',
        )
        add(
            '--baseline',
            default=DEFAULT_BASELINE,
            metavar='NAME',
            help='what all is relative to: one of --encodings, or a model of timm that takes image and patch size '
            '(default: %(default)s)',
        )
        add('--compile', action='store_true', help='measure all models compiled by torch.compile')

    def create(self, name: str, setting: str, device: torch.device) -> Any:
        """Create the model that a line of the table is about."""
        if name in self.variants:
            return create_variant(self.model, self.variants[name], setting, device)
        return create_at_setting(name, setting, device, f'--baseline: cannot create {name}')

    def run(self, unit: Unit, folder: Path) -> list[Row]:
        device, _ = set_up_device(self.device)
        torch.manual_seed(0)
        torch.compiler.reset()
        names = list(dict.fromkeys((self.baseline, *self.variants)))
        with refuse_too_large(unit, device), compiled_at_most(8 * len(names)):
            models = {name: self.create(name, unit['setting'], device) for name in names}
            for model in models.values():
                draw_tables(model, TABLE_STD)
            size = input_size(models[next(iter(self.variants))])
            images = torch.randn(unit['batch_size'], *size, device=device)
            rows = self.measure_models(models, images, unit['setting'])
        return [unit | row for row in rows]

    def measure_models(self, models: dict[str, Any], images: Tensor, setting: str) -> list[Row]:
        """Check all models on a batch, measure them in turns, and return a row for each."""
        autocast, _ = mixed_precision(images.device, self.amp, 'bfloat16')
        compiled = [name for name in models if self.compile or name.endswith(':compiled')]
        measured = models | {name: torch.compile(models[name], fullgraph=True, dynamic=False) for name in compiled}
        for name, model in models.items():
            with autocast(), torch.inference_mode():
                check_logits(name, measured[name].eval(), images, model.num_classes)
                check_against_reference(name, measured[name], model, images, MODEL_TOLERANCE[self.amp])
                if name in self.variants:
                    check_bias(name, model, images[:1], MODEL_TOLERANCE[self.amp])
                    check_fused(name, model, images, MODEL_TOLERANCE[self.amp])
        rows: dict[str, Row] = {name: {'encoding': name} for name in models}
        self.add_ratios(rows, 'parameters', {name: count_parameters(model) for name, model in models.items()})
        size = (images.shape[1], images.shape[2], images.shape[3])
        self.add_ratios(rows, 'flops', {name: count_flops(model, size) for name, model in models.items()})
        for phase, make_step in (('inference', inference_step), ('training', training_step)):
            steps = {name: make_step(model, images, autocast) for name, model in measured.items()}
            seconds = seconds_in_turns(steps, self.rounds, images.device, f'{setting} {phase}')
            for name, row in rows.items():
                row[f'{phase}_images_per_second'] = len(images) / statistics.median(seconds[name])
                low, median, high = ratio_quartiles(seconds[name], seconds[self.baseline])
                row |= {f'{phase}_time_ratio': median, f'{phase}_time_ratio_q1': low, f'{phase}_time_ratio_q3': high}
            peaks = {name: peak_memory(step, images.device) for name, step in steps.items()}
            self.add_ratios(rows, f'{phase}_peak_bytes', peaks)
        return list(rows.values())

    def add_ratios(self, rows: dict[str, Row], quantity: str, values: dict[str, int]) -> None:
        """Add a quantity, and its ratio to the baseline's, to the row of every model."""
        for name, row in rows.items():
            row |= {quantity: values[name], f'{quantity}_ratio': values[name] / values[self.baseline]}

    def report(self, rows: list[Row]) -> str:
        sections = []
        for (setting, batch_size), of_setting in grouped(rows, 'setting', 'batch_size').items():
            table = [baseline_line(row) if row['encoding'] == self.baseline else ratio_line(row) for row in of_setting]
            sections.append(f'## {setting}, batches of {batch_size}\n\n{markdown_table(table)}')
        used = {variant.implementation for variant in self.variants.values()}
        suffixes = [f'`:{name}` is {what}' for name, what in IMPLEMENTATIONS.items() if name in used]
        return f"""\
What an encoding costs in {self.model} relative to `{self.baseline}`, whose own numbers are in its line: \
{'bfloat16 mixed precision' if self.amp else 'float32'}, {'torch.compile' if self.compile else 'not compiled'}, \
{self.configuration['device']}.{''.join(f' {text}.' for text in suffixes)}

Times are taken in turns, {self.rounds} of every encoding: the median, and the quartiles, of the ratios to the turn of \
`{self.baseline}` in the same round. A training step is forward, loss, backward and AdamW. Memory is what PyTorch \
allocates at the peak of a step, beyond the weights and the state of the optimizer. FLOPs are those of one image in \
inference, 2 for a multiply-accumulate: matrix products, attention included, and convolutions, without element-wise \
work, gathers and the distances of SaPE2, which is counted as its reference computes it.

""" + '\n\n'.join(sections)

    @staticmethod
    def plots(rows: list[Row], configuration: Mapping[str, Any]) -> 'dict[str, Figure]':
        baseline = configuration['baseline']
        compared = [row for row in rows if row['encoding'] != baseline]
        groups = grouped(compared, 'setting', 'batch_size')
        names = grouped(compared, 'encoding')
        figure = new_figure(13, 1.8 + 0.28 * len(names) * max(1, len(groups)) ** 0.5)
        panels = figure.subplots(1, 4, sharey=True)
        for axes, column in zip(panels, list(RATIOS)[2:], strict=True):
            dots = {
                f'{setting}, batches of {batch_size}': {row['encoding']: quartiles(row, column) for row in of_group}
                for (setting, batch_size), of_group in groups.items()
            }
            axes.axvline(1, color='black', linewidth=0.8)
            draw_dots(axes, dots)
            axes.set(title=RATIOS[column])
        figure.suptitle(f'What does each encoding cost, relative to {baseline}? (times: median and quartiles of turns)')
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc='outside lower center', ncols=4, title='image/patch in pixels')
        return {'ratios': figure}


def quartiles(row: Row, column: str) -> Spread:
    """Return a ratio between its quartiles, where it has some."""
    low, high = (row.get(f'{column}_{end}') for end in ('q1', 'q3'))
    return Spread(low or row[column], row[column], high or row[column])


def baseline_line(row: Row) -> dict[str, str]:
    """Return the line of the table with absolute numbers."""
    numbers = (
        f'{row["parameters"] / 1e6:.2f} M',
        f'{three_digits(row["flops"] / 1e9)} G',
        f'{three_digits(row["inference_images_per_second"])} images/s',
        f'{three_digits(row["training_images_per_second"])} images/s',
        f'{three_digits(row["inference_peak_bytes"] / 2**20)} MiB',
        f'{three_digits(row["training_peak_bytes"] / 2**20)} MiB',
    )
    return {'encoding': row['encoding'], **dict(zip(RATIOS.values(), numbers, strict=True))}


def ratio_line(row: Row) -> dict[str, str]:
    """Return the line of the table with ratios."""
    line = {'encoding': row['encoding']}
    for column, title in RATIOS.items():
        line[title] = f'{row[column]:.3f}'
        if f'{column}_q1' in row:
            line[title] = f'{row[column]:.2f} ({row[f"{column}_q1"]:.2f} to {row[f"{column}_q3"]:.2f})'
    return line


def inference_step(model: nn.Module, images: Tensor, autocast: Callable) -> Step:
    """Return a function that classifies a batch."""
    model.eval()

    @torch.inference_mode()
    def step() -> None:
        with autocast():
            model(images)

    return step


def training_step(model: nn.Module, images: Tensor, autocast: Callable) -> Step:
    """Return a function that trains a model on a batch: forward, loss, backward, update."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    classes = torch.zeros(len(images), dtype=torch.long, device=images.device)

    def step() -> None:
        with autocast():
            loss = F.cross_entropy(model(images), classes)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
