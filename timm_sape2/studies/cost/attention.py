"""Study: what attention with SaPE2 costs by itself, in each of its implementations."""

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._arguments import positive_int
from ..._figure import new_figure
from ..._table import markdown_table
from ...data.memory import free_memory
from ...ops import sape2 as ops
from ...training.hardware import device_name, set_up_device
from ..report import grouped, three_digits
from ..study import Row, Study, Unit
from .correctness import PREFIX, Attention, Grid, Inputs, check_attention, output_and_gradients, sape2_by
from .measure import Step, peak_memory, ratio_quartiles, seconds_in_turns
from .settings import (
    SETTINGS,
    add_measuring_arguments,
    chip_name,
    image_and_patch,
    is_out_of_memory,
    refuse_too_large,
    too_large,
    units_at,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ATTENTION_TOLERANCE = {'float32': 1e-4, 'TF32': 2e-2, 'bfloat16': 1e-1}
"""Largest error of the output and of gradients, as a norm relative to theirs; float32 is TF32 on a GPU."""

NAMES = ('plain', 'reference', 'compiled reference', 'cpu', 'triton')
PLAIN, REFERENCE, COMPILED = NAMES[:3]

COLORS = {name: f'C{i}' for i, name in enumerate(NAMES)}
IN_WORDS = {PLAIN: "PyTorch's attention without a bias", 'cpu': 'SaPE2: C for CPUs', 'triton': 'SaPE2: Triton for GPUs'}

FORWARD, BOTH = 'forward', 'forward + backward'

STORED = {FORWARD: 3.2, BOTH: 6.5}
"""Numbers of four bytes that the reference stores at its peak, for every pair of tokens of every head."""


class AttentionCost(Study):
    """Measure time and memory of attention with SaPE2 from queries, keys, values and tables."""

    name = 'attention-cost'
    summary = "measure SaPE2's attention alone, in each implementation"
    description = """\
Measure what attention with SaPE2 costs by itself, from queries, keys, values
and two tables, forward and with backward: time and peak memory of each
implementation that can run here, beside PyTorch's attention without a bias
and the reference. All are measured in turns in one process. An implementation
that needs more memory than is free is left out, and the report says so. One
that gives wrong numbers is not measured: the study stops."""
    examples = """\
  timm-sape2 study attention-cost
  timm-sape2 study attention-cost --settings 1024/16 --heads 12 --rounds 3
  timm-sape2 study attention-cost --device cuda --amp --batch-size 4"""
    takes_flags = False
    one_process = True

    def __init__(self, arguments: argparse.Namespace, flags: Sequence[str]) -> None:
        self.device, self.amp = device_name(arguments.device), arguments.amp
        self.rounds, self.heads, self.head_dim = arguments.rounds, arguments.heads, arguments.head_dim
        self.units = [
            {**unit, 'pass': phase}
            for unit in units_at(arguments.settings, arguments.batch_size, self.device)
            for phase in (FORWARD, BOTH)
        ]
        self.configuration = {
            'heads': self.heads,
            'head_dim': self.head_dim,
            'rounds': self.rounds,
            'device': chip_name(self.device),
            'amp': self.amp,
        }

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        add_measuring_arguments(parser, (*SETTINGS, '1024/16'), 'inputs in bfloat16')
        add = parser.add_argument
        add('--heads', type=positive_int, default=6, metavar='N', help='attention heads (default: %(default)s)')
        add('--head-dim', type=positive_int, default=64, metavar='N', help='channels of a head (default: %(default)s)')

    def run(self, unit: Unit, folder: Path) -> list[Row]:
        device, _ = set_up_device(self.device)
        image, patch = image_and_patch(unit['setting'])
        grid = (image // patch, image // patch)
        dtype = torch.bfloat16 if self.amp else torch.float32
        torch.manual_seed(0)
        torch.compiler.reset()
        pairs = (PREFIX + math.prod(grid)) ** 2
        if 2 * 4 * STORED[BOTH] * pairs > free_memory(device):
            raise too_large(unit, device)  # for the check of one head, which is in float64
        with refuse_too_large(unit, device):
            inputs = draw_inputs(unit['batch_size'], self.heads, self.head_dim, grid, dtype, device)
            rows = self.measure_implementations(inputs, grid, unit)
        return [unit | {'patches': math.prod(grid)} | row for row in rows]

    def measure_implementations(self, inputs: Inputs, grid: Grid, unit: Unit) -> list[Row]:
        """Check all implementations that can run, measure them in turns, and return their rows."""
        device, phase = inputs.query.device, unit['pass']
        found = attentions()
        skipped = {name: why_not(name, inputs, grid, phase) for name in found}
        skipped[COMPILED] = skipped[COMPILED] or why_not_compiled(found[COMPILED], inputs, grid)
        measured = {name: attention for name, attention in found.items() if skipped[name] is None}
        precision = 'bfloat16' if self.amp else 'TF32' if device.type == 'cuda' else 'float32'
        for name, attention in measured.items():
            if name != PLAIN:
                check_attention(name, attention, inputs, grid, ATTENTION_TOLERANCE[precision])
        make_step = forward_step if phase == FORWARD else backward_step
        steps = {name: make_step(attention, inputs, grid) for name, attention in measured.items()}
        seconds = seconds_in_turns(steps, self.rounds, device, f'{unit["setting"]} {phase}')
        peaks = {name: peak_memory(step, device) for name, step in steps.items()}
        rows: list[Row] = []
        for name in measured:
            row: Row = {'implementation': name, 'seconds': statistics.median(seconds[name]), 'peak_bytes': peaks[name]}
            for base in (PLAIN, REFERENCE):
                if base in measured:
                    low, median, high = ratio_quartiles(seconds[name], seconds[base])
                    row |= {f'time_to_{base}': median, f'time_to_{base}_q1': low, f'time_to_{base}_q3': high}
                    row[f'memory_to_{base}'] = peaks[name] / peaks[base]
            rows.append(row)
        return rows + [{'implementation': name, 'skipped': reason} for name, reason in skipped.items() if reason]

    def report(self, rows: list[Row]) -> str:
        sections: list[str] = []
        for (setting, batch_size, patches), of_setting in grouped(rows, 'setting', 'batch_size', 'patches').items():
            skipped = [row for row in of_setting if row.get('skipped')]
            sections += [
                f'## {setting}, {patches} patches, batches of {batch_size}',
                markdown_table([implementation_line(row) for row in of_setting if not row.get('skipped')]),
                '\n'.join(f'- {skipped_line(row)}' for row in skipped),
            ]
        return f"""\
What attention with SaPE2 costs by itself, from queries, keys, values and two tables: {self.heads} heads of \
{self.head_dim}, a class token beside the patches, {'bfloat16' if self.amp else 'float32'}, \
{self.configuration['device']}. `{PLAIN}` is PyTorch's attention without a bias, `{REFERENCE}` SaPE2 in plain \
PyTorch, which stores the bias.

Times are taken in turns, {self.rounds} of every implementation: the median of a call, and the median, and the \
quartiles, of the ratios to the turn of `{PLAIN}` and of `{REFERENCE}` in the same round. Backward gives the \
gradients of queries, keys, values and tables. Memory is what PyTorch allocates at the peak of a call, results \
included. The plot shows time and memory of a batch, divided by its size.

""" + '\n\n'.join(sections)

    @staticmethod
    def plots(rows: list[Row], configuration: Mapping[str, Any]) -> 'dict[str, Figure]':
        figure = new_figure(11, 4.5)
        both = [row for row in rows if row['pass'] == BOTH and not row.get('skipped')]
        both.sort(key=lambda row: row['patches'])
        panels = {'ms': ('seconds', 1e-3), 'MiB': ('peak_bytes', 2**20)}
        for axes, (unit, (column, factor)) in zip(figure.subplots(1, 2), panels.items(), strict=True):
            for (implementation,), of_implementation in grouped(both, 'implementation').items():
                patches = [row['patches'] for row in of_implementation]
                values = [row[column] / row['batch_size'] / factor for row in of_implementation]
                label = IN_WORDS.get(implementation, f'SaPE2: {implementation}')
                axes.plot(patches, values, '.-', color=COLORS.get(implementation), label=label)
            axes.set(xscale='log', yscale='log', xlabel='patches of an image', ylabel=f'{unit} for an image')
            ticks = sorted({row['patches'] for row in both})
            axes.set_xticks(ticks, ticks)
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        figure.suptitle(
            'How do time and memory of attention grow with the image? '
            f'({BOTH}, {configuration["heads"]} heads of {configuration["head_dim"]})'
        )
        figure.legend(*axes.get_legend_handles_labels(), loc='outside right center')
        return {'growth': figure}


def plain_attention(inputs: Inputs, grid: Grid) -> Tensor:
    """Attention without a bias."""
    return F.scaled_dot_product_attention(inputs.query, inputs.key, inputs.value)


def attentions() -> dict[str, Attention]:
    """Return all implementations by name; what is to be compiled is so at the first call."""
    return {
        PLAIN: plain_attention,
        REFERENCE: sape2_by('reference'),
        COMPILED: torch.compile(sape2_by('reference'), fullgraph=True, dynamic=False),
        'cpu': sape2_by('cpu'),
        'triton': sape2_by('triton'),
    }


def why_not(name: str, inputs: Inputs, grid: Grid, phase: str) -> str | None:
    """Tell why an implementation cannot run at speed, None if it can or only trying will tell."""
    if name in (REFERENCE, COMPILED):
        batch, heads, tokens, _ = inputs.query.shape
        needed, free = 4 * STORED[phase] * batch * heads * tokens**2, free_memory(inputs.query.device)
        return f'it needs {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free' if needed > free else None
    if name == 'triton' and not inputs.query.is_cuda:  # its interpreter runs on a CPU
        return 'not a CUDA tensor'
    return ops.why_not(inputs.query, grid)[name] if name in ('cpu', 'triton') else None


def draw_inputs(
    batch_size: int,
    heads: int,
    head_dim: int,
    grid: Grid,
    dtype: torch.dtype,
    device: torch.device,
) -> Inputs:
    """Draw inputs from a normal distribution, laid out as in a model: views of one projection."""
    height, width = grid
    qkv = torch.randn(batch_size, PREFIX + height * width, 3, heads, head_dim, dtype=dtype, device=device)
    tables = 0.1 * torch.randn(2, 10, head_dim, device=device)
    return Inputs(*qkv.permute(2, 0, 3, 1, 4), *tables)


def implementation_line(row: Row) -> dict[str, str]:
    """Return the line of the table."""
    line = {
        'pass': row['pass'],
        'implementation': row['implementation'],
        'time': f'{three_digits(1e3 * row["seconds"])} ms',
        'memory': f'{three_digits(row["peak_bytes"] / 2**20)} MiB',
    }
    for base in (PLAIN, REFERENCE):
        line |= {f'time to {base}': '', f'memory to {base}': ''}
        if f'time_to_{base}' in row:
            low, median, high = (row[f'time_to_{base}{end}'] for end in ('_q1', '', '_q3'))
            line[f'time to {base}'] = f'{median:.2f} ({low:.2f} to {high:.2f})'
            line[f'memory to {base}'] = f'{row[f"memory_to_{base}"]:.3f}'
    return line


def skipped_line(row: Row) -> str:
    """Return why there is no line for an implementation."""
    return f'`{row["implementation"]}`, {row["pass"]}, cannot run here: {row["skipped"]}'


def why_not_compiled(attention: Attention, inputs: Inputs, grid: Grid) -> str | None:
    """Tell why torch.compile fails, None if it does not."""
    try:
        output_and_gradients(attention, inputs, grid, torch.ones_like(inputs.query))
    except RuntimeError as error:  # as all errors of torch.compile are
        if is_out_of_memory(error):
            raise
        return f'torch.compile: {str(error).strip().partition(chr(10))[0]}'
    return None


def forward_step(attention: Attention, inputs: Inputs, grid: Grid) -> Step:
    """Return a function that computes attention."""

    @torch.inference_mode()
    def step() -> None:
        attention(inputs, grid)

    return step


def backward_step(attention: Attention, inputs: Inputs, grid: Grid) -> Step:
    """Return a function that computes attention and the gradients of all that goes into it."""
    inputs = Inputs(*(x.detach().requires_grad_() for x in inputs))
    batch, heads, tokens, dim = inputs.query.shape
    grad_output = inputs.query.new_empty(batch, tokens, heads, dim).normal_().transpose(1, 2)

    def step() -> None:
        torch.autograd.grad(attention(inputs, grid), inputs, grad_output, allow_unused=True)

    return step
