"""The first ten minutes on a GPU: is the compiled kernel right, what does it cost, and all of it in one folder.

    python docs/benchmarks/gpu.py                     everything, the most telling first, up to ten minutes
    python docs/benchmarks/gpu.py --minutes 40        again, with more time: what is finished is not done again
    python docs/benchmarks/gpu.py --small             every part in its smallest form, on a CPU too

Each part is a command of its own, with a log and a limit of time; what fails or takes too long does not keep the others
from running. docs/gpu.md says what to read in the folder.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from timm_sape2 import provenance
from timm_sape2._arguments import positive_int
from timm_sape2._files import atomic_write, write_json
from timm_sape2._table import markdown_table

ROOT = Path(__file__).resolve().parents[2]
DONE, FAILED, LATE, SKIPPED = 'done', 'failed', 'stopped', 'not run'
SETTINGS = {'224/16': 256, '384/16': 64, '32/4': 256, '512/16': 16, '1024/16': 1}
"""Images of a batch by size, the most telling sizes first."""

KERNEL_TESTS = ('test_triton_kernel.py', 'test_operator.py', 'test_attention.py')


class Part(NamedTuple):
    """A command, its name, and the seconds that it may take."""

    name: str
    command: list[str]
    limit: float


def parts(folder: Path, small: bool, device: str, smaller: int) -> list[Part]:
    """Return all parts, in the order in which they run.

    Args:
        folder: Where studies write.
        small: The smallest form of each.
        device: Where to run, such as 'cuda'.
        smaller: What batches are divided by.
    """
    python = sys.executable
    pytest = [python, '-m', 'pytest', '-n', '0', '-q', '-rs', '-p', 'no:cacheprovider']
    tests = [str(ROOT / 'tests/ops/sape2' / name) for name in KERNEL_TESTS]
    found = [Part('tests', pytest + ([f'{tests[0]}::test_two_patches_by_hand'] if small else tests), 240)]

    def study(which: str, name: str, limit: float, *arguments: str) -> Part:
        output = ('--device', device, '--output', str(folder), '--experiment', name)
        return Part(name, [python, '-m', 'timm_sape2', 'study', which, *arguments, *output], limit)

    sizes = {'8/4': 2} if small else {size: max(1, batch // smaller) for size, batch in SETTINGS.items()}
    rounds = ('--rounds', '1' if small else '10')
    every = (*('--settings', *sizes), *('--batch-size', *map(str, sizes.values())))
    found.append(study('attention-cost', 'tune', 180, '--amp', *every, '--rounds', '1'))
    found.append(study('attention-cost', 'attention_bfloat16', 180, '--amp', *every, *rounds))

    model = ('--model', 'test_vit_sape2') if small else ()
    baseline = () if small else ('--baseline', 'vit_small_patch16_224')
    encodings = ('sape2', 'sape2:reference') if small else ('learned+sape2', 'learned+sape2:reference')
    for precision, amp in (('bfloat16', ('--amp',)), ('float32', ())):
        if not amp:
            found.append(study('attention-cost', 'attention_float32', 180, *every, *rounds))
        for size, batch in sizes.items():
            for mode, compiled in (('compiled', ('--compile',)), ('eager', ())):
                setting = ('--settings', size, '--batch-size', str(batch))
                name = f'model_{size.replace("/", "_")}_{precision}_{mode}'
                arguments = (*model, *baseline, '--encodings', *encodings, *setting, *amp, *compiled, *rounds)
                limit = (300 if small else 150) if compiled else 90  # compilers for CPUs are slower
                found.append(study('overhead', name, limit, *arguments))
    return found


def run_part(part: Part, folder: Path, seconds_left: float) -> dict[str, object]:
    """Run a part, with its output in a log, and return what became of it.

    Args:
        part: The part.
        folder: Where the log goes.
        seconds_left: Of all parts together; the limit of the part is not more.
    """
    limit = min(part.limit, seconds_left)
    row: dict[str, object] = {'part': part.name, 'command': part.command}
    if limit <= 0:
        return row | {'result': SKIPPED, 'why': 'no time is left'}
    environment = {
        'TRITON_PRINT_AUTOTUNING': '1',  # the log says which tiles are the fastest
        'TRITON_CACHE_AUTOTUNING': '1',  # and the next part knows them
        'PYTHONPATH': os.pathsep.join(filter(None, (str(ROOT), os.environ.get('PYTHONPATH')))),
    }
    start = time.monotonic()
    with open(folder / f'{part.name}.log', 'w') as log:
        process = subprocess.Popen(
            part.command,
            cwd=ROOT,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    row['seconds'] = round(time.monotonic() - start, 1)
    if code is None:
        return row | {'result': LATE, 'why': f'after {limit:.0f} seconds'}
    if code:
        lines = (folder / f'{part.name}.log').read_text(errors='replace').strip().splitlines()
        return row | {'result': FAILED, 'why': lines[-1] if lines else f'exit status {code}'}
    return row | {'result': DONE}


def summary(rows: Sequence[dict[str, object]]) -> str:
    """Return a table of all parts as Markdown."""
    cells = [{name: row.get(name, '') for name in ('part', 'result', 'seconds', 'why')} for row in rows]
    return f'# First minutes on a GPU\n\n{markdown_table(cells)}\n'


def run_all(found: Sequence[Part], folder: Path, minutes: float) -> list[dict[str, object]]:
    """Run all parts that are not finished in the folder; what is there is written after each."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / 'parts.json'
    old = {row['part']: row for row in json.loads(file.read_text())} if file.exists() else {}
    rows = {
        part.name: old[part.name]
        if old.get(part.name, {}).get('result') == DONE and old[part.name]['command'] == part.command
        else {'part': part.name, 'command': part.command, 'result': SKIPPED}
        for part in found
    }
    end = time.monotonic() + 60 * minutes
    for part in found:
        if rows[part.name]['result'] != DONE:
            print(f'{part.name} ...', end=' ', flush=True)
            rows[part.name] = run_part(part, folder, end - time.monotonic())
            print(rows[part.name]['result'], rows[part.name].get('why', ''), flush=True)
        write_json(file, list(rows.values()))
        with atomic_write(folder / 'summary.md') as temporary:
            temporary.write_text(summary(list(rows.values())))
    return list(rows.values())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description='Test, tune and measure SaPE2 on a GPU; one folder has all that comes out.',
    )
    add = parser.add_argument
    add('--output', default='output/gpu', metavar='DIR', help='folder (default: %(default)s)')
    add('--minutes', type=float, default=10, metavar='N', help='of all parts together (default: %(default)s)')
    add('--device', metavar='NAME', help='cpu, cuda or cuda:N (default: cuda, with --small a GPU if there is one)')
    add('--smaller', type=positive_int, default=1, metavar='N', help='divide batches by this, for GPUs below 80 GB')
    add('--small', action='store_true', help='every part in its smallest form, to try the script')
    args = parser.parse_args(argv)

    has_gpu = torch.cuda.is_available()
    if not has_gpu and not args.small:
        parser.error('there is no GPU; --small tries the script on a CPU')
    if has_gpu:
        torch.cuda.init()  # machine.json names a GPU that is in use
    folder = Path(args.output).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    machine = {
        'time': provenance.now(),
        'commit': provenance.commit(),
        'versions': provenance.versions(),
        'hardware': provenance.hardware(),
    }
    write_json(folder / 'machine.json', machine)
    device = args.device or ('cuda' if has_gpu else 'cpu')
    rows = run_all(parts(folder, args.small, device, args.smaller), folder, args.minutes)
    print(f'{folder / "summary.md"}')
    return int(any(row['result'] != DONE for row in rows))


if __name__ == '__main__':
    sys.exit(main())
