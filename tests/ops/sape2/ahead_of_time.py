"""Compile every kernel that SaPE2 attention launches, for GPUs that are not here, and say what comes out.

Attention runs on small tensors, forward and backward, under a driver that says it is a GPU of the kind asked for. Each
launch is compiled as Triton would for that GPU, with its own choice of specialisation, and then not made; of a kernel
that Triton tunes all configurations are compiled. So nothing here knows the kernels by name.

    python tests/ops/sape2/ahead_of_time.py            all that the choice lets through, on all targets
    python tests/ops/sape2/ahead_of_time.py sm_90 --cases bfloat16,14x14,64

prints a line a kernel: registers, bytes of the stack, where registers that are spilled go, shared memory, instructions
of a lane for a pair of tokens. It must run in a process of its own: the rest of the tests has Triton in its
interpreter. Exit status 1: something does not compile, spills, or takes more shared memory than the GPU has.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

INTERPRETER = 'TRITON_INTERPRET'
KIB = 1024


class Target(NamedTuple):
    """A kind of GPU: the backend of Triton with its architecture and lanes, and shared memory of a program in bytes."""

    backend: str
    arch: int | str
    lanes: int
    shared: int


TARGETS = {
    'sm_80': Target('cuda', 80, 32, 163 * KIB),
    'sm_86': Target('cuda', 86, 32, 99 * KIB),
    'sm_89': Target('cuda', 89, 32, 99 * KIB),
    'sm_90': Target('cuda', 90, 32, 227 * KIB),
    'sm_100': Target('cuda', 100, 32, 227 * KIB),
    'sm_120': Target('cuda', 120, 32, 99 * KIB),
    'gfx942': Target('hip', 'gfx942', 64, 64 * KIB),
}


class Case(NamedTuple):
    """Inputs of attention: dtype, rows and columns of patches, channels of a head, tables, and options."""

    dtype: str
    grid: tuple[int, int]
    dim: int
    axes: str = 'xy'
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        more = [self.axes] * (self.axes != 'xy') + [f'{name}={value}' for name, value in self.options]
        return ','.join([self.dtype, f'{self.grid[0]}x{self.grid[1]}', str(self.dim), *more])


def all_cases() -> list[Case]:
    """What the choice lets through: dtypes, sizes, head dimensions, axes, and options."""
    half = 'bfloat16'
    sizes = [(8, 8), (7, 9), (14, 14), (16, 24), (24, 24), (32, 32), (37, 37), (64, 64), (1, 64)]
    dims = [16, 24, 32, 48, 72, 80, 96, 128]
    cases = [Case(half, grid, 64) for grid in sizes]
    cases += [Case(half, (14, 14), dim) for dim in dims]
    cases += [Case(half, (24, 24), 48)]
    cases += [Case(half, grid, dim) for grid in ((24, 24), (32, 32)) for dim in (80, 128)]
    for dtype in ('float16', 'float32'):
        cases += [Case(dtype, grid, 64) for grid in ((8, 8), (14, 14), (24, 24), (64, 64))]
    cases += [Case('float16', (16, 16), 80), Case('float16', (32, 32), 128), Case(half, (1, 32), 128)]
    cases += [Case(half, (37, 37), 80), Case(half, (64, 64), 96)]
    cases += [Case(half, (14, 14), 64, axes) for axes in ('x', 'y')]
    options = [('target', 'q'), ('gated', False), ('rotated', True)]
    return cases + [Case(half, (14, 14), 64, options=(option,)) for option in options]


class Compiled(NamedTuple):
    """What the machine code of a kernel needs.

    Configurations of one launch, of which Triton takes the fastest, share `launch`. `instructions` is
    the number that a lane needs for a pair of tokens in its loops, None where loops are nested or tiles unknown.
    """

    target: str
    case: str
    phase: str = ''
    launch: int = 0
    kernel: str = ''
    settings: str = ''
    registers: int | None = None
    stack: int | None = None
    shared: int | None = None
    instructions: float | None = None
    error: str | None = None
    refused: str | None = None

    @property
    def faults(self) -> list[str]:
        """What is wrong with it."""
        limit = TARGETS[self.target].shared
        found = [] if self.error is None else [self.error]
        if self.stack:
            found.append(f'spills {self.stack} bytes')
        if self.shared is not None and self.shared > limit:
            found.append(f'takes {self.shared} bytes of shared memory of {limit}')
        return found

    def __str__(self) -> str:
        if self.refused is not None:
            return f'{self.target}  {self.case}  refused: {self.refused}'
        pair = '' if self.instructions is None else f'  {self.instructions:.1f} instructions a pair'
        numbers = f'registers {self.registers}  stack {self.stack}  shared {self.shared}{pair}'
        faults = ''.join(f'  FAULT: {fault}' for fault in self.faults)
        return f'{self.target}  {self.case}  {self.phase}  {self.kernel}  {self.settings}  {numbers}{faults}'


def compile_case(target: str, case: Case) -> list[Compiled]:
    """Compile what attention launches, forward and backward."""
    import torch
    import triton
    from triton.runtime import Autotuner, JITFunction

    from timm_sape2.ops.sape2 import sape2_attention, why_not

    found: dict[tuple[str, str], Compiled] = {}
    phase, launch = 'forward', 0
    compile_now = JITFunction.run

    def compile_one(self: Any, *args: Any, grid: Any = None, warmup: bool = False, **kwargs: Any) -> None:
        constants = {name: value for name, value in kwargs.items() if name.isupper() or name.startswith('num_')}
        settings = ' '.join(f'{name}={value}' for name, value in constants.items())
        if (self.__name__, settings) in found:
            return
        try:
            compiled = compile_now(self, *args, grid=grid, warmup=True, **kwargs)
            what = inspect(compiled, constants, TARGETS[target])
        except Exception as error:  # all that a compiler may raise is to be reported
            what = {'error': f'{type(error).__name__}: {" ".join(str(error).split())[:300]}'}
        found[self.__name__, settings] = Compiled(target, str(case), phase, launch, self.__name__, settings, **what)

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal launch
        launch += 1
        compile_one(self, *args, **kwargs)

    def run_tuned(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal launch
        launch += 1
        self.nargs = dict(zip(self.arg_names, args, strict=False))  # the names left over are in kwargs
        for config in self.prune_configs(kwargs):
            compile_one(self.fn, *args, **{**kwargs, **config.all_kwargs()})

    tune_now = Autotuner.run
    JITFunction.run, Autotuner.run = run, run_tuned
    triton.runtime.driver.set_active(driver_of(TARGETS[target]))
    query, key, value, logit_query, logit_key = draw_inputs(case)
    row_table, column_table = (
        torch.randn(10, case.dim, requires_grad=True) if axis in case.axes else None for axis in 'xy'
    )
    options = dict(case.options)
    gate_key = key if options.pop('gated', True) else None
    if options.pop('rotated', False):
        options |= {'logit_query': logit_query, 'logit_key': logit_key}
    os.environ[INTERPRETER] = '1'  # so that the choice takes tensors in the memory of the CPU
    try:
        reason = why_not(query, case.grid, options.get('target', 'k'))['triton']
        if reason is not None:
            return [Compiled(target, str(case), refused=reason)]
        output = sape2_attention(
            query, key, value, gate_key, row_table, column_table, case.grid, 1, implementation='triton', **options
        )
        phase = 'backward'
        output.backward(torch.ones_like(output))
    finally:
        del os.environ[INTERPRETER]
        JITFunction.run, Autotuner.run = compile_now, tune_now
    return list(found.values())


def draw_inputs(case: Case) -> 'Iterator[Any]':
    """Queries, keys and values as attention has them, views of one projection, and queries and keys of the logits."""
    import torch

    tokens = 1 + case.grid[0] * case.grid[1]
    qkv = torch.randn(2, tokens, 5, 2, case.dim, dtype=getattr(torch, case.dtype), requires_grad=True)
    return iter(qkv.permute(2, 0, 3, 1, 4).unbind(0))


def driver_of(target: Target) -> Any:
    """Return a driver of Triton for a GPU that is not there."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import GPUDriver

    class Absent(GPUDriver):
        def __init__(self) -> None:
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0
            self.get_device_capability = lambda *_: divmod(target.arch, 10)

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_current_target(self) -> Any:
            return GPUTarget(target.backend, target.arch, target.lanes)

        def get_active_torch_device(self) -> Any:
            return torch.device('cpu')

        def get_benchmarker(self) -> Any:
            raise NotImplementedError  # nothing runs, so nothing is timed

    if target.backend == 'hip':
        torch.version.hip = '6.4'
    else:
        torch.cuda.get_device_capability = lambda *_: divmod(target.arch, 10)
    return Absent()


def inspect(compiled: Any, constants: dict[str, Any], target: Target) -> dict[str, Any]:
    """Read what a kernel needs from its machine code."""
    if target.backend == 'hip':
        assembly = compiled.asm['amdgcn']
        (registers,) = re.findall(r'^\s*\.vgpr_count:\s*(\d+)', assembly, flags=re.MULTILINE)
        (stack,) = re.findall(r'^\s*\.private_segment_fixed_size:\s*(\d+)', assembly, flags=re.MULTILINE)
        return {'registers': int(registers), 'stack': int(stack), 'shared': compiled.metadata.shared}
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(compiled.asm['cubin'])
        file.flush()
        usage = run_tool('cuobjdump', '-res-usage', file.name)
        sass = run_tool('cuobjdump', '-sass', file.name)
    match = re.search(r'REG:(\d+) STACK:(\d+)', usage)
    assert match is not None, usage
    tile = [value for name, value in constants.items() if re.fullmatch(r'(BLOCK_)?(OWN|OTHER)', name)]
    in_loops = loop_instructions(sass)
    instructions = None
    if len(tile) == 2 and in_loops is not None:
        instructions = in_loops * target.lanes * constants['num_warps'] / (tile[0] * tile[1])
    return {
        'registers': int(match[1]),
        'stack': int(match[2]),
        'shared': compiled.metadata.shared,
        'instructions': instructions,
    }


def run_tool(name: str, *arguments: str) -> str:
    """Return what a tool of Triton's wheel prints."""
    process = subprocess.run([tool(name), *arguments], capture_output=True, text=True)
    return process.stdout + process.stderr


def tool(name: str) -> Path:
    """Path of a tool of Triton's wheel, where it may not be."""
    from triton.backends import nvidia

    return Path(next(iter(nvidia.__path__)), 'bin', name)


def loop_instructions(sass: str) -> int | None:
    """Count the instructions in the loops of machine code, as `cuobjdump -sass` prints it; None if loops are nested.

    Loops one after the other, such as two walks over the tokens, are added up.
    """
    code = re.findall(r'/\*([0-9a-f]{4,})\*/\s+([^;]*);', sass)
    index = {int(address, 16): i for i, (address, _) in enumerate(code)}
    ends: dict[int, int] = {}
    for i, (_, text) in enumerate(code):
        jump = re.search(r'\bBRA\b.*?\b0x([0-9a-f]+)', text)
        start = None if jump is None else index.get(int(jump[1], 16))
        if start is not None and start < i:  # the code ends with a jump to itself
            ends[start] = i
    loops = sorted(ends.items())
    if any(start <= end_before for (_, end_before), (start, _) in itertools.pairwise(loops)):
        return None
    return sum(end - start + 1 for start, end in loops)


def compile_all(targets: list[str], cases: list[Case]) -> Iterator[Compiled]:
    """Compile cases for targets in as many processes as there are cores."""
    import timm_sape2.ops.sape2.triton_kernel  # noqa: F401  processes that are forked have it

    jobs = [(target, case) for case in cases for target in targets]
    with multiprocessing.get_context('fork').Pool(min(os.cpu_count() or 1, len(jobs)), maxtasksperchild=1) as pool:
        for compiled in pool.imap(compile_job, jobs, chunksize=1):
            yield from compiled


def compile_job(job: tuple[str, Case]) -> list[Compiled]:
    return compile_case(*job)


def main() -> int:
    parser = argparse.ArgumentParser(description='Compile the kernels of SaPE2 attention for GPUs that are not here.')
    parser.add_argument('targets', nargs='*', metavar='TARGET', help=f'of {", ".join(TARGETS)} (default: all)')
    parser.add_argument('--cases', nargs='+', metavar='DTYPE,HxW,DIM', help='default: all that the choice lets through')
    parser.add_argument('--json', action='store_true', help='print a JSON list a line in place of words')
    args = parser.parse_args()
    unknown = [name for name in args.targets if name not in TARGETS]
    if unknown:
        parser.error(f'{unknown[0]!r} is none of {", ".join(TARGETS)}')
    cases = [read_case(text) for text in args.cases] if args.cases else all_cases()
    count = bad = 0
    for compiled in compile_all(args.targets or list(TARGETS), cases):
        print(json.dumps(compiled) if args.json else compiled, flush=True)
        count, bad = count + 1, bad + bool(compiled.faults)
    if not args.json:
        print(f'{count} kernels, {bad} with a fault')
    return int(bad > 0 or count == 0)


def read_case(text: str) -> Case:
    """Read a value of `--cases`: as a line has it, or any dtype, grid and head dimension."""
    named = {str(case): case for case in all_cases()}
    if text in named:
        return named[text]
    dtype, grid, dim = text.split(',')
    height, width = grid.split('x')
    return Case(dtype, (int(height), int(width)), int(dim))


if __name__ == '__main__':
    os.environ.pop(INTERPRETER, None)
    import torch

    torch.set_num_threads(1)
    sys.exit(main())
