"""Where results come from: time, command, versions, commit and hardware."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

PACKAGES = ('timm_sape2', 'timm', 'torch', 'torchvision', 'triton', 'numpy')


def now() -> str:
    """Return the time in UTC."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='milliseconds')


def command() -> list[str]:
    """Return the command line of this process, to be repeated, with torchrun before it if that started it."""
    processes = os.environ.get('LOCAL_WORLD_SIZE')
    launcher = ['torchrun', f'--nproc_per_node={processes}'] if processes else []
    if _is_train_py():
        return [*(launcher or ['python']), 'train.py', *sys.argv[1:]]
    return [*launcher, *(['-m', 'timm_sape2'] if launcher else ['timm-sape2']), *sys.argv[1:]]


def training_command(processes: int = 1) -> str:
    """Return how to train from where this process was started: by train.py of a checkout, or by the command."""
    if processes == 1:
        return 'python train.py' if _is_train_py() else 'timm-sape2 train'
    return f'torchrun --nproc-per-node {processes} {"train.py" if _is_train_py() else "-m timm_sape2 train"}'


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    found = {'python': platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Return the commit of this package, marked if files differ from it, or None outside of a checkout."""
    folder = Path(__file__).parents[1]
    if not (folder / '.git').exists():
        return None
    try:
        head = _git(folder, 'rev-parse', '--short=12', 'HEAD')
        changed = _git(folder, 'status', '--porcelain', '--untracked-files=no', '--', 'timm_sape2')
    except (OSError, subprocess.CalledProcessError):
        return None
    return f'{head} and local changes' if changed else head


def hardware() -> dict[str, Any]:
    """Return what this process computes on; the GPU once it is in use."""
    described: dict[str, Any] = {
        'cpu': _cpu(),
        'cores': os.cpu_count(),
        'threads': torch.get_num_threads(),
    }
    if torch.cuda.is_initialized():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        described['gpu'] = properties.name
        described['gpu_memory_gib'] = round(properties.total_memory / 2**30, 1)
        described['cuda'] = torch.version.cuda
    return described


def _is_train_py() -> bool:
    return Path(sys.argv[0]).name == 'train.py'


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(['git', '-C', str(folder), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _cpu() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(': ', 1)[1] for line in lines if line.startswith('model name')), platform.machine())
