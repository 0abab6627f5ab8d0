"""Study: what each position encoding costs."""

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model_cost import count_flops, count_parameters, input_size
from ..positions import ENCODINGS, parse_position
from ..training.arguments import positive_int
from ..training.hardware import check_device, mixed_precision, set_up_device
from ..vit import PositionVisionTransformer
from .correctness import check_bias, check_logits
from .measure import Step, peak_memory, ratio_quartiles, seconds_in_turns
from .report import grouped, markdown_table, new_figure
from .study import Row, Study, Unit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASELINE = 'nope'
SETTINGS = ('32/4', '224/16', '384/16', '512/16')
TOKENS = {'cpu': 1024, 'cuda': 16384}
"""Patch tokens that a batch has at most, unless `--batch-size` says else."""

TOLERANCE = {False: 5e-3, True: 5e-2}
"""Largest error of SaPE2's bias relative to its largest value: in float32, which is TF32 on a GPU, and in bfloat16."""

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
turns in one process, and reported relative to no encoding (`nope`). A model
that gives wrong numbers is not measured: the study stops."""
    examples = """\
  timm-sape2 study overhead
  timm-sape2 study overhead --model vit_compact_pos_nope_patch4_32 \\
      --settings 32/4 64/4 --encodings learned sape2 --batch-size 32 8
  timm-sape2 study overhead --device cuda --amp --compile --rounds 30"""
    takes_flags = False
    one_process = True

    def __init__(self, arguments: argparse.Namespace, flags: Sequence[str]) -> None:
        self.args = argparse.Namespace(device=arguments.device, amp=arguments.amp, amp_dtype='bfloat16')
        check_device(self.args)
        self.model, self.rounds, self.compile = arguments.model, arguments.rounds, arguments.compile
        self.encodings = list(dict.fromkeys((BASELINE, *arguments.encodings)))
        sizes = arguments.batch_size or [None]
        if len(sizes) not in (1, len(arguments.settings)):
            raise ValueError(f'--batch-size takes 1 number or {len(arguments.settings)}, one for each of --settings')
        for encoding in self.encodings:
            parse_position(encoding)
            for setting in arguments.settings:
                create_model(self.model, encoding, setting, torch.device('meta'))
        self.units = [
            {'setting': setting, 'batch_size': size or default_batch_size(setting, self.args.device)}
            for setting, size in zip(arguments.settings, sizes * (len(arguments.settings) // len(sizes)), strict=True)
        ]
        self.configuration = {
            'model': self.model,
            'encodings': self.encodings,
            'rounds': self.rounds,
            'device': device_name(self.args.device),
            'amp': self.args.amp,
            'compile': self.compile,
        }

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add(
            '--model',
            default='vit_small_pos_nope',
            metavar='NAME',
            help='model of this package that gives width and depth (default: %(default)s)',
        )
        add(
            '--encodings',
            nargs='+',
            default=[*ENCODINGS, 'learned+sape2'],
            metavar='NAME',
            help="names as in position=, joined by '+' (default: all, and learned+sape2); "
            f'{BASELINE} is always measured',
        )
        add(
            '--settings',
            nargs='+',
            default=list(SETTINGS),
            metavar='IMAGE/PATCH',
            help=f'sides of image and patch in pixels (default: {" ".join(SETTINGS)})',
        )
        add(
            '--batch-size',
            nargs='+',
            type=positive_int,
            metavar='N',
            help='images of a batch, for all settings or for each '
            f'(default: at most {TOKENS["cpu"]} patches, on a GPU {TOKENS["cuda"]})',
        )
        add(
            '--rounds', type=positive_int, default=7, metavar='N', help='turns of every encoding (default: %(default)s)'
        )
        add('--device', metavar='NAME', help='cpu, cuda or cuda:N (default: a GPU if there is one)')
        add('--amp', action='store_true', help='mixed precision in bfloat16')
        add('--compile', action='store_true', help='measure models compiled by torch.compile')

    def run(self, unit: Unit, folder: Path) -> list[Row]:
        device = set_up_device(self.args)
        torch.manual_seed(0)
        models = {encoding: create_model(self.model, encoding, unit['setting'], device) for encoding in self.encodings}
        images = torch.randn(unit['batch_size'], *input_size(models[BASELINE]), device=device)
        torch.compiler.reset()
        try:
            with torch._dynamo.config.patch(recompile_limit=8 * len(models)):
                rows = self.measure(models, images, unit['setting'])
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f'{unit["setting"]} with batches of {unit["batch_size"]} is too large for {device}: lower --batch-size'
            ) from error
        return [unit | row for row in rows]

    def measure(self, models: dict[str, Any], images: Tensor, setting: str) -> list[Row]:
        """Check all models on a batch, measure them in turns, and return a row for each."""
        autocast, _ = mixed_precision(self.args, images.device)
        measured = dict(models)
        if self.compile:
            measured = {name: torch.compile(model, fullgraph=True, dynamic=False) for name, model in models.items()}
        for name, model in models.items():
            with autocast(), torch.inference_mode():
                check_logits(name, measured[name].eval(), images, model.num_classes)
                check_bias(name, model, images[:1], TOLERANCE[self.args.amp])
        rows: dict[str, Row] = {name: {'encoding': name} for name in models}
        add_ratios(rows, 'parameters', {name: count_parameters(model) for name, model in models.items()})
        add_ratios(rows, 'flops', {name: flops_of(self.model, name, setting) for name in models})
        for phase, make_step in (('inference', inference_step), ('training', training_step)):
            steps = {name: make_step(model, images, autocast) for name, model in measured.items()}
            seconds = seconds_in_turns(steps, self.rounds, images.device, f'{setting} {phase}')
            for name, row in rows.items():
                row[f'{phase}_images_per_second'] = len(images) / statistics.median(seconds[name])
                low, median, high = ratio_quartiles(seconds[name], seconds[BASELINE])
                row |= {f'{phase}_time_ratio': median, f'{phase}_time_ratio_q1': low, f'{phase}_time_ratio_q3': high}
            add_ratios(
                rows, f'{phase}_peak_bytes', {name: peak_memory(step, images.device) for name, step in steps.items()}
            )
        return list(rows.values())

    def report(self, rows: list[Row]) -> str:
        sections = []
        for (setting, batch_size), of_setting in grouped(rows, 'setting', 'batch_size').items():
            table = [describe_baseline(row) if row['encoding'] == BASELINE else describe(row) for row in of_setting]
            sections.append(f'## {setting}, batches of {batch_size}\n\n{markdown_table(table)}')
        return f"""\
What an encoding costs relative to `{BASELINE}`, whose own numbers are in its line: {self.model}, \
{'bfloat16 mixed precision' if self.args.amp else 'float32'}, {'torch.compile' if self.compile else 'not compiled'}, \
{self.configuration['device']}.

Times are taken in turns, {self.rounds} of every encoding: the median, and the quartiles, of the ratios to the turn of \
`{BASELINE}` in the same round. A training step is forward, loss, backward and AdamW. Memory is what PyTorch allocates \
at the peak of a step, beyond the weights and the state of the optimizer. FLOPs are those of one image in inference \
that `torch.utils.flop_counter` counts, 2 for a multiply-accumulate: matrix products, attention and convolutions, \
without element-wise work, gathers and the distances of SaPE2.

""" + '\n\n'.join(sections)

    def plots(self, rows: list[Row]) -> 'dict[str, Figure]':
        figure = new_figure(11, 7)
        groups = list(grouped(rows, 'setting', 'batch_size'))
        encodings = grouped((row for row in rows if row['encoding'] != BASELINE), 'encoding')
        width = 0.8 / max(1, len(encodings))
        for axes, column in zip(figure.subplots(2, 2).flat, list(RATIOS)[2:], strict=True):
            axes.axhline(1, color='black', linestyle=':', label=BASELINE)
            for i, ((encoding,), of_encoding) in enumerate(encodings.items()):
                shift = (i - (len(encodings) - 1) / 2) * width
                places = [groups.index((row['setting'], row['batch_size'])) + shift for row in of_encoding]
                axes.bar(places, [row[column] for row in of_encoding], width * 0.9, color=f'C{i % 10}', label=encoding)
            axes.set(title=f'{RATIOS[column]}, {BASELINE} = 1')
            axes.set_xticks(range(len(groups)), [f'{setting}\nbatch {batch_size}' for setting, batch_size in groups])
            axes.grid(axis='y', alpha=0.3)
        figure.supxlabel('image/patch in pixels')
        figure.legend(*axes.get_legend_handles_labels(), loc='outside right center')
        return {'ratios': figure}


def add_ratios(rows: dict[str, Row], quantity: str, values: dict[str, int]) -> None:
    """Add a quantity, and its ratio to the baseline's, to the row of every encoding."""
    for name, row in rows.items():
        row |= {quantity: values[name], f'{quantity}_ratio': values[name] / values[BASELINE]}


def describe_baseline(row: Row) -> dict[str, str]:
    """Return the line of the table with absolute numbers."""
    numbers = (
        f'{row["parameters"] / 1e6:.2f} M',
        f'{row["flops"] / 1e9:.3g} G',
        f'{row["inference_images_per_second"]:.3g} images/s',
        f'{row["training_images_per_second"]:.3g} images/s',
        f'{row["inference_peak_bytes"] / 2**20:.3g} MiB',
        f'{row["training_peak_bytes"] / 2**20:.3g} MiB',
    )
    return {'encoding': row['encoding'], **dict(zip(RATIOS.values(), numbers, strict=True))}


def describe(row: Row) -> dict[str, str]:
    """Return the line of the table with ratios."""
    line = {'encoding': row['encoding']}
    for column, title in RATIOS.items():
        line[title] = f'{row[column]:.3f}'
        if f'{column}_q1' in row:
            line[title] = f'{row[column]:.2f} ({row[f"{column}_q1"]:.2f} to {row[f"{column}_q3"]:.2f})'
    return line


def create_model(name: str, encoding: str, setting: str, device: torch.device) -> Any:
    """Create a model with another position encoding, image and patch size.

    Raises:
        ValueError: The setting is not IMAGE/PATCH or cannot be, or the model is not one of this package.
    """
    image, patch = image_and_patch(setting)
    try:
        model = timm.create_model(name, position=encoding, img_size=image, patch_size=patch, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f'cannot create {name} with {encoding} at {setting}: {error}') from error
    if not isinstance(model, PositionVisionTransformer):
        raise ValueError(f"--model {name} has no exchangeable position encoding; 'timm-sape2 list' shows those")
    return model


def image_and_patch(setting: str) -> tuple[int, int]:
    """Read a value of `--settings`."""
    image, _, patch = setting.partition('/')
    if not (image.isdecimal() and patch.isdecimal() and int(image) and int(patch)):
        raise ValueError(f'--settings takes IMAGE/PATCH in pixels such as 224/16, not {setting!r}')
    if int(image) % int(patch):
        raise ValueError(f'--settings {setting}: patches of {patch} do not divide images of {image}')
    return int(image), int(patch)


def default_batch_size(setting: str, device: str) -> int:
    """Return the largest power of two of images whose patches the device may be given in a batch."""
    image, patch = image_and_patch(setting)
    return 2 ** max(0, int(math.log2(TOKENS[device.partition(':')[0]] / (image // patch) ** 2)))


def device_name(device: str) -> str:
    """Return the name of a GPU, or 'cpu'."""
    return torch.cuda.get_device_name(device) if device.startswith('cuda') else device


def flops_of(name: str, encoding: str, setting: str) -> int:
    """Return the FLOPs of a model for one image, without computing anything."""
    return count_flops(create_model(name, encoding, setting, torch.device('meta')).eval())


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
