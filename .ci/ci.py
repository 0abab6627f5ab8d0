"""Continuous integration: all of it with the newest versions, the contract with every version that is supported.

With the newest versions on the package index come the README's two commands, as they stand there and in a fresh
environment, lint, types, the API page, and Debian's Chromium where it can be installed, for a page that is tested in a
browser. The contract is what a timm model passes, with kernels, encodings and trained models, but for tests that depend
on no version (marked `once`). It is tested with the oldest versions (`floor.txt`) on the oldest Python that is found
here, and with the newest patch of every minor version of torch before the newest, each on another Python that is found
here, the newest with the newest (of one that the oldest versions had, the kernels alone). Each environment is removed
after use. All parts run even if one fails, but a contract that would start after 65 minutes does not, and the table at
the end says so; it has versions, result and seconds of each part.
"""

import csv
import glob
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEST_COMMAND = "pip install -e '.[test]' && python -m pytest"
DEMO_COMMAND = "pip install -e '.[demo]' && python train.py"
API_COMMAND = "pdoc --docformat google timm_sape2 '!timm_sape2.commands'"
LEAST_TOP1 = 95.0
LIMIT = 30 * 60.0  # seconds for one command, such as all tests
LAST_START = 65 * 60.0  # seconds after which no contract starts: a runner that ends at 90 minutes shows no table
CONTRACT = ('tests/models', 'tests/ops', 'tests/positions', 'tests/trained')
KERNELS = ('tests/ops',)
PACKAGES = ('torch', 'torchvision', 'triton', 'numpy')
ASK_VERSIONS = f"""
import json, platform
from importlib import metadata
found = {{package.metadata['Name'].lower(): package.version for package in metadata.distributions()}}
print(json.dumps({{'python': platform.python_version()}} | {{name: found.get(name, '-') for name in {PACKAGES}}}))
"""
ASK_PYTHON = 'import ctypes, sqlite3, ssl, sys, venv; print(*sys.version_info[:2], sys.version_info.releaselevel)'


@dataclass
class Part:
    """A line of the table at the end."""

    name: str
    versions: dict[str, str]
    result: str
    seconds: float
    is_good: bool


class Run:
    """The parts that have run, and what their commands share."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.uv = scratch / 'tools' / 'bin' / 'uv'
        self.begin = time.monotonic()
        self.parts: list[Part] = []
        self.versions: dict[str, str] = {}

    def part(self, name: str, *actions: Callable[[], str]) -> bool:
        """Run the actions of a part up to the first that fails; its result is what the last one says."""
        start = time.monotonic()
        print(f'\n== {name} ({start - self.begin:.0f} s)', flush=True)
        result, is_good = '', True
        try:
            for action in actions:
                result = action()
        except (subprocess.CalledProcessError, OSError, ValueError) as error:
            result, is_good = f'FAILED: {error}', False
            print(result, flush=True)
        self.parts.append(Part(name, dict(self.versions), result, time.monotonic() - start, is_good))
        return is_good

    def say(self, name: str, result: str) -> None:
        """Add a line to the table for what has not run."""
        print(f'\n== {name}: {result}', flush=True)
        self.parts.append(Part(name, {}, result, 0.0, True))

    def table(self) -> str:
        """All parts with their versions, results and seconds."""
        rows: list[tuple[str, ...]] = [('part', 'Python', *PACKAGES, 'seconds', 'result')]
        for part in self.parts:
            versions = [part.versions.get(name, '') for name in ('python', *PACKAGES)]
            rows.append((part.name, *versions, f'{part.seconds:.0f}', part.result))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return '\n'.join('  '.join(map(str.ljust, row, widths)).rstrip() for row in rows)

    def make_tools(self) -> str:
        """Install uv."""
        execute([sys.executable, '-m', 'venv', self.scratch / 'tools'])
        return execute([self.scratch / 'tools' / 'bin' / 'python', '-m', 'pip', 'install', '-q', 'uv'])

    def listed(self, package: str) -> list[str]:
        """Versions of a package on the index for this Python."""
        python = self.scratch / 'tools' / 'bin' / 'python'
        listing = subprocess.check_output([python, '-m', 'pip', 'index', 'versions', package], text=True)
        (versions,) = re.findall(r'^Available versions: (.*)$', listing, flags=re.MULTILINE)
        return versions.split(', ')


def execute(command: Sequence[str | Path], environment: Mapping[str, str] | None = None, limit: float = LIMIT) -> str:
    """Run a command, show what it prints, and return the last line of that; it is stopped after `limit` seconds."""
    print('$', *command, flush=True)
    last, is_late = '', threading.Event()
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors='replace',
        start_new_session=True,
    ) as process:

        def stop() -> None:
            is_late.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(limit, stop)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end='', flush=True)
                last = line.strip(' =\n') or last
            process.wait()
        finally:
            timer.cancel()
    if is_late.is_set():
        raise ValueError(f'stopped after {limit:.0f} seconds')
    if process.returncode:
        raise ValueError(last or f'exit status {process.returncode}')
    return last


def split_version(version: str) -> tuple[int, ...]:
    """Numbers of a release, () for a pre-release; a local part such as `+cpu` is dropped."""
    release = version.split('+')[0]
    return tuple(map(int, release.split('.'))) if re.fullmatch(r'\d+(\.\d+)*', release) else ()


def newest_patches(versions: Iterable[str], floor: str) -> list[str]:
    """Return the newest patch of every minor version, from that of `floor` on, the oldest first."""
    newest: dict[tuple[int, ...], tuple[int, ...]] = {}
    for version in versions:
        numbers = split_version(version)
        if numbers >= split_version(floor):
            newest[numbers[:2]] = max(newest.get(numbers[:2], ()), numbers)
    return ['.'.join(map(str, newest[minor])) for minor in sorted(newest)]


def take_turns(torches: Sequence[str], pythons: Mapping[tuple[int, int], str]) -> list[tuple[str, str]]:
    """Give each version of torch, the oldest first, an interpreter: the newest to the newest, and so on in turn."""
    newest_first = [pythons[version] for version in sorted(pythons, reverse=True)]
    return list(zip(reversed(torches), itertools.cycle(newest_first)))


def pinned(constraints: str) -> dict[str, str]:
    """Versions by package in the text of a file of constraints."""
    return dict(re.findall(r'^(\w[\w.-]*)==([\w.]+)', constraints, flags=re.MULTILINE))


def oldest_python() -> tuple[int, int]:
    """The oldest Python that the package supports."""
    (minor,) = re.findall(r'requires-python = ">=3\.(\d+)"', (ROOT / 'pyproject.toml').read_text())
    return 3, int(minor)


def find_pythons() -> dict[tuple[int, int], str]:
    """Interpreters on this machine that are supported, complete and released, by version."""
    oldest = oldest_python()
    versions = Path(os.environ.get('PYENV_ROOT', Path.home() / '.pyenv')) / 'versions'
    candidates = [sys.executable, *filter(None, (shutil.which(f'python3.{minor}') for minor in range(oldest[1], 100)))]
    found: dict[tuple[int, int], str] = {}
    for path in [*candidates, *sorted(glob.glob(f'{versions}/*/bin/python3'))]:
        answer = subprocess.run([path, '-c', ASK_PYTHON], capture_output=True, text=True)
        if answer.returncode == 0:
            major, minor, level = answer.stdout.split()
            if level == 'final' and (int(major), int(minor)) >= oldest:
                found.setdefault((int(major), int(minor)), path)
    return found


def best_top1(folder: Path) -> str:
    """The best accuracy of the one run in a folder, which must reach what the README shows."""
    (summary,) = folder.glob('*/summary.csv')
    with open(summary, newline='') as file:
        best = max(float(row['eval_top1']) for row in csv.DictReader(file))
    if best < LEAST_TOP1:
        raise ValueError(f'top-1 {best:.2f} % is below {LEAST_TOP1} %')
    return f'top-1 {best:.2f} %'


def test_readme(run: Run, torch: str) -> None:
    """The README's commands, lint and types with the newest versions, in an environment made as a user makes it."""
    readme = (ROOT / 'README.md').read_text().splitlines()
    environment = run.scratch / 'newest'
    constraints = run.scratch / 'newest.txt'
    constraints.write_text(f'torch=={torch}\n')  # in place of constraints that pip may be configured to take
    settings = {
        'PATH': f'{environment / "bin"}{os.pathsep}{os.environ["PATH"]}',
        'VIRTUAL_ENV': str(environment),
        'PIP_CONSTRAINT': str(constraints),
    }

    def shell(command: str) -> Callable[[], str]:
        return lambda: execute(['bash', '-c', command], settings)

    def install() -> str:
        for command in (TEST_COMMAND, DEMO_COMMAND):
            if command not in readme:
                raise ValueError(f'README.md has no line `{command}`')
        execute([sys.executable, '-m', 'venv', environment])
        shell(f'{install_tests} -q')()
        shell("pip install -q -e '.[dev]'")()
        return ask_versions(run, environment)

    (install_tests, tests), (install_demo, demo) = (text.split(' && ') for text in (TEST_COMMAND, DEMO_COMMAND))
    if run.part('install as the README says', install):
        run.part('lint', shell('ruff check .'), shell('ruff format --check .'))
        run.part('types', shell('mypy'))
        run.part('API page', shell(f"{API_COMMAND} --output-directory '{run.scratch / 'api'}'"))
        run.part('tests of this script', shell('python -m pytest -q -n 0 .ci/test_ci.py'))
        run.part('browser', find_browser)
        run.part('all tests', shell(f'{tests} -rs --durations=25'))
        output = run.scratch / 'runs'
        run.part(
            'main job',
            shell(f'{install_demo} -q'),
            shell(f"{demo} --output '{output}'"),
            lambda: best_top1(output),
        )
    shutil.rmtree(environment, ignore_errors=True)


def find_browser() -> str:
    """Install Debian's Chromium if no browser is here and it can be; without one a test is skipped and says so."""
    browsers = ('chromium', 'chromium-browser', 'google-chrome')
    if not any(map(shutil.which, browsers)) and shutil.which('apt-get') and os.geteuid() == 0:
        environment = {'DEBIAN_FRONTEND': 'noninteractive'}
        try:
            execute(['apt-get', 'update', '-q'], environment)
            execute(['apt-get', 'install', '-q', '-y', '--no-install-recommends', 'chromium'], environment)
        except ValueError as error:
            return f'none, it did not install: {error}'
    return next(filter(None, map(shutil.which, browsers)), 'none')


def ask_versions(run: Run, environment: Path) -> str:
    """Note the versions in an environment."""
    answer = subprocess.check_output([environment / 'bin' / 'python', '-c', ASK_VERSIONS], text=True)
    run.versions = json.loads(answer)
    return 'done'


def test_contract(run: Run, name: str, python: str, *requirements: str, paths: tuple[str, ...] = CONTRACT) -> None:
    """The contract, or some of it, in an environment with these requirements."""
    what = f'{"contract" if paths == CONTRACT else "kernels"}: {name}'
    if time.monotonic() - run.begin > LAST_START:
        run.say(what, f'not run, {LAST_START / 60:.0f} minutes are over')
        return
    environment = run.scratch / 'contract'
    python_in = environment / 'bin' / 'python'
    run.versions = {}

    def install() -> str:
        execute([run.uv, 'venv', '-q', '--no-python-downloads', '--python', python, environment])
        execute([run.uv, 'pip', 'install', '-q', '--python', python_in, *requirements, '-e', '.[test]'])
        return ask_versions(run, environment)

    if run.part(f'install: {name}', install):
        run.part(
            what,
            lambda: execute([python_in, '-W', 'error::FutureWarning', '-c', 'import timm_sape2']),
            lambda: execute([python_in, '-m', 'pytest', '-q', '-rs', '-m', 'not once', *paths]),
        )
    shutil.rmtree(environment, ignore_errors=True)


def main() -> int:
    """Run everything and return the exit status."""
    with tempfile.TemporaryDirectory() as scratch:
        run = Run(Path(scratch))
        patches: list[str] = []
        floor = pinned((ROOT / '.ci' / 'floor.txt').read_text())['torch']

        def ask_index() -> str:
            patches.extend(newest_patches(run.listed('torch'), floor))
            if not patches:
                raise ValueError(f'the index has no torch from {floor} on for this Python')
            return f'torch {", ".join(patches)}'

        if run.part('versions on the package index', run.make_tools, ask_index):
            test_readme(run, patches[-1])
            pythons = find_pythons()
            oldest = min(pythons)
            if oldest != oldest_python():
                run.say('Python {}.{}'.format(*oldest_python()), 'not on this machine, the oldest here takes its place')
            test_contract(run, 'oldest versions', pythons[oldest], '-c', '.ci/floor.txt')
            for torch, python in take_turns([torch for torch in patches[:-1] if torch != floor], pythons):
                test_contract(run, f'torch {torch}', python, f'torch=={torch}')
            if floor in patches[:-1]:  # with numpy as new as it gets
                test_contract(run, f'torch {floor}', sys.executable, f'torch=={floor}', paths=KERNELS)
        minutes = (time.monotonic() - run.begin) / 60
        print(f'\n{run.table()}\n\n{minutes:.0f} minutes')
        failed = [part.name for part in run.parts if not part.is_good]
        print(
            f'{len(run.parts) - len(failed)} parts passed, {len(failed)} failed{": " * bool(failed)}{", ".join(failed)}'
        )
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
