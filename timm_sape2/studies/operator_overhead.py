"""Study: what attention with SaPE2 costs by itself, in each of its implementations."""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import sape2 as ops
from ..training.hardware import check_device, set_up_device
from .correctness import PREFIX, Attention, Grid, Inputs, check_attention, output_and_gradients
from .measure import Step, peak_memory, ratio_quartiles, seconds_in_turns
from .report import grouped, markdown_table, new_figure, three_digits
from .settings import (
    SETTINGS,
    device_name,
    image_and_patch,
    is_out_of_memory,
    refuse_flags,
    refuse_too_large,
    units_of,
)
from .study import Row, Study, Unit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOLERANCE = {'float32': 1e-4, 'TF32': 2e-2, 'bfloat16': 1e-1}
"""Largest error of the output and of gradients, as a norm relative to theirs; float32 is TF32 on a GPU."""

NAMES = ('plain', 'reference', 'compiled reference', 'cpu', 'cpu, recompute', 'triton')
BASELINE, REFERENCE, COMPILED = NAMES[:3]

COLORS = {name: f'C{i}' for i, name in enumerate(NAMES)}

FORWARD, BOTH = 'forward', 'forward + backward'


class OperatorOverhead(Study):
    """Measure time and memory of attention with SaPE2 from queries, keys, values and tables."""

    HEADS = 6
    HEAD_DIM = 64

    name = 'overhead'
    summary = description = examples = ''  # those of `Overhead`, of which this is the flag --op
    takes_flags = False
    one_process = True

    def __init__(self, arguments: argparse.Namespace, flags: Sequence[str]) -> None:
        refuse_flags(arguments, ('model', 'encodings', 'baseline', 'compile'), 'not with --op')
        self.args = argparse.Namespace(device=arguments.device, amp=arguments.amp, amp_dtype='bfloat16')
        check_device(self.args)
        self.rounds = arguments.rounds
        self.heads, self.head_dim = arguments.heads or self.HEADS, arguments.head_dim or self.HEAD_DIM
        self.units = units_of(arguments.settings or (*SETTINGS, '1024/16'), arguments.batch_size, self.args.device)
        self.configuration = {
            'what': 'attention alone',
            'heads': self.heads,
            'head_dim': self.head_dim,
            'rounds': self.rounds,
            'device': device_name(self.args.device),
            'amp': self.args.amp,
        }

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Nothing to add: the arguments are those of `Overhead`."""

    def run(self, unit: Unit, folder: Path) -> list[Row]:
        device = set_up_device(self.args)
        image, patch = image_and_patch(unit['setting'])
        grid = (image // patch, image // patch)
        dtype = torch.bfloat16 if self.args.amp else torch.float32
        torch.manual_seed(0)
        torch.compiler.reset()
        with refuse_too_large(unit, device):
            inputs = draw_inputs(unit['batch_size'], self.heads, self.head_dim, grid, dtype, device)
            rows = self.measure(inputs, grid, unit['setting'])
        return [unit | {'patches': grid[0] * grid[1]} | row for row in rows]

    def measure(self, inputs: Inputs, grid: Grid, setting: str) -> list[Row]:
        """Check all implementations that can run, measure them in turns, and return their rows."""
        device = inputs.query.device
        found = attentions()
        skipped = {name: why_not(name, inputs, grid) for name in found}
        skipped[COMPILED] = why_not_compiled(found[COMPILED], inputs, grid)
        measured = {name: attention for name, attention in found.items() if skipped[name] is None}
        precision = 'bfloat16' if self.args.amp else 'TF32' if device.type == 'cuda' else 'float32'
        for name, attention in measured.items():
            if name != BASELINE:
                check_attention(name, attention, inputs, grid, TOLERANCE[precision])
        rows: list[Row] = []
        for phase, make_step in ((FORWARD, forward_step), (BOTH, backward_step)):
            steps = {name: make_step(attention, inputs, grid) for name, attention in measured.items()}
            seconds = seconds_in_turns(steps, self.rounds, device, f'{setting} {phase}')
            peaks = {name: peak_memory(step, device) for name, step in steps.items()}
            for name in measured:
                row = {'pass': phase, 'implementation': name, 'seconds': statistics.median(seconds[name])}
                for base in (BASELINE, REFERENCE):
                    low, median, high = ratio_quartiles(seconds[name], seconds[base])
                    row |= {f'time_to_{base}': median, f'time_to_{base}_q1': low, f'time_to_{base}_q3': high}
                row['peak_bytes'] = peaks[name]
                row |= {f'memory_to_{base}': peaks[name] / peaks[base] for base in (BASELINE, REFERENCE)}
                rows.append(row)
        return rows + [{'implementation': name, 'skipped': reason} for name, reason in skipped.items() if reason]

    def report(self, rows: list[Row]) -> str:
        sections: list[str] = []
        for (setting, batch_size, patches), of_setting in grouped(rows, 'setting', 'batch_size', 'patches').items():
            measured, skipped = ([row for row in of_setting if ('skipped' in row) is out] for out in (False, True))
            sections += [
                f'## {setting}, {patches} patches, batches of {batch_size}',
                markdown_table([describe(row) for row in measured]),
                '\n'.join(f'- `{row["implementation"]}` cannot run here: {row["skipped"]}' for row in skipped),
            ]
        return f"""\
What attention with SaPE2 costs by itself, from queries, keys, values and two tables: {self.heads} heads of \
{self.head_dim}, a class token beside the patches, {'bfloat16' if self.args.amp else 'float32'}, \
{self.configuration['device']}. `{BASELINE}` is PyTorch's attention without a bias, `{REFERENCE}` SaPE2 in plain \
PyTorch, which stores the bias.

Times are taken in turns, {self.rounds} of every implementation: the median of a call, and the median, and the \
quartiles, of the ratios to the turn of `{BASELINE}` and of `{REFERENCE}` in the same round. Backward gives the \
gradients of queries, keys, values and tables. Memory is what PyTorch allocates at the peak of a call, results and the \
buffers that an implementation keeps between calls included. The plot shows time and memory of a batch, divided by its \
size.

""" + '\n\n'.join(sections)

    def plots(self, rows: list[Row]) -> 'dict[str, Figure]':
        figure = new_figure(11, 4.5)
        both = sorted((row for row in rows if row.get('pass') == BOTH), key=lambda row: row['patches'])
        panels = {'ms': ('seconds', 1e-3), 'MiB': ('peak_bytes', 2**20)}
        for axes, (unit, (column, factor)) in zip(figure.subplots(1, 2), panels.items(), strict=True):
            for (implementation,), of_implementation in grouped(both, 'implementation').items():
                patches = [row['patches'] for row in of_implementation]
                values = [row[column] / row['batch_size'] / factor for row in of_implementation]
                axes.plot(patches, values, '.-', color=COLORS[implementation], label=implementation)
            axes.set(xscale='log', yscale='log', xlabel='patches of an image', ylabel=f'{unit} for an image')
            ticks = sorted({row['patches'] for row in both})
            axes.set_xticks(ticks, ticks)
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        figure.suptitle(f'{BOTH}, {self.heads} heads of {self.head_dim}')
        figure.legend(*axes.get_legend_handles_labels(), loc='outside right center')
        return {'growth': figure}


def plain_attention(inputs: Inputs, grid: Grid) -> Tensor:
    """Attention without a bias."""
    return F.scaled_dot_product_attention(inputs.query, inputs.key, inputs.value)


def sape2_by(implementation: str, recompute: bool = False) -> Attention:
    """Return attention with SaPE2 by one of the implementations."""

    def attention(inputs: Inputs, grid: Grid) -> Tensor:
        query, key, value, row_table, column_table = inputs
        return ops.sape2_attention(
            query,
            key,
            value,
            key,
            row_table,
            column_table,
            grid,
            PREFIX,
            recompute=recompute,
            implementation=implementation,
        )

    return attention


def attentions() -> dict[str, Attention]:
    """Return all implementations by name; what is to be compiled is so at the first call."""
    functions = (
        plain_attention,
        sape2_by('reference'),
        torch.compile(sape2_by('reference'), fullgraph=True, dynamic=False),
        sape2_by('cpu'),
        sape2_by('cpu', recompute=True),
        sape2_by('triton'),
    )
    return dict(zip(NAMES, functions, strict=True))


def why_not(name: str, inputs: Inputs, grid: Grid) -> str | None:
    """Tell why an implementation cannot run at speed, None if it can or only trying will tell."""
    query, key, value = inputs[:3]
    if name == 'triton' and not query.is_cuda:  # its interpreter runs on a CPU
        return 'not a CUDA tensor'
    return ops.why_not(query, key, value, key, grid).get(name.partition(',')[0])


def draw_inputs(
    batch_size: int,
    heads: int,
    head_dim: int,
    grid: Grid,
    dtype: torch.dtype,
    device: torch.device,
    num_positions: int = 10,
    table_std: float = 0.1,
) -> Inputs:
    """Draw inputs from a normal distribution, laid out as in a model: views of one projection."""
    height, width = grid
    qkv = torch.randn(batch_size, PREFIX + height * width, 3, heads, head_dim, dtype=dtype, device=device)
    tables = table_std * torch.randn(2, num_positions, head_dim, device=device)
    return Inputs(*qkv.permute(2, 0, 3, 1, 4), *tables)


def describe(row: Row) -> dict[str, str]:
    """Return the line of the table."""
    line = {
        'pass': row['pass'],
        'implementation': row['implementation'],
        'time': f'{three_digits(1e3 * row["seconds"])} ms',
        'memory': f'{three_digits(row["peak_bytes"] / 2**20)} MiB',
    }
    for base in (BASELINE, REFERENCE):
        low, median, high = (row[f'time_to_{base}{end}'] for end in ('_q1', '', '_q3'))
        line[f'time to {base}'] = f'{median:.2f} ({low:.2f} to {high:.2f})'
        line[f'memory to {base}'] = f'{row[f"memory_to_{base}"]:.3f}'
    return line


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
