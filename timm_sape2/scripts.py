"""Run scripts that know nothing of this package, such as timm's own, with the models of this package registered."""

import functools
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
import torch
from torch.nn.parallel import DistributedDataParallel


class ScriptError(ValueError):
    """The file to run is not there or cannot be read."""


def run_script(path: str | os.PathLike[str], arguments: Sequence[str] = ()) -> None:
    """Run a Python script as `python PATH ARGUMENTS` does, but with the models of this package registered.

    The script has its own `__main__`, `sys.argv` and `sys.path[0]`, which are put back afterwards. What it raises comes
    out untouched: a traceback speaks of the script, and `SystemExit` carries its exit code.

    timm's scripts usually lie in a checkout of timm, beside a `timm` folder of another version. The installed timm is
    used all the same: it is imported already, its submodules are looked up in its own folder, and worker processes
    that import it anew find it first (see `_search_path`). Only `python -m timm_sape2` with the checkout as the current
    folder takes the other one, before any code of this package runs; the command `timm-sape2` does not.

    A program that the script itself starts, and a function that it runs in a spawned process, begin without the
    models. Data loader workers do not need them.

    Args:
        path: The script.
        arguments: What follows the script's name on the command line.

    Raises:
        ScriptError: The file does not exist or cannot be read.
    """
    filename = str(Path(path).absolute())
    code = compile(_read(path), filename, 'exec', dont_inherit=True)
    main = ModuleType('__main__')
    main.__file__ = filename
    with _started_as(main, [os.fspath(path), *arguments]), _ddp_takes_cpu_as_device_id():
        exec(code, main.__dict__)


def _read(path: str | os.PathLike[str]) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ScriptError(f'cannot run {os.fspath(path)}: {error.strerror}') from error


@contextmanager
def _started_as(main: ModuleType, argv: list[str]) -> Iterator[None]:
    """Set what Python sets when it starts a script, and put back what was there."""
    old_argv, old_path, old_main = sys.argv, sys.path.copy(), sys.modules['__main__']
    sys.argv = argv
    if not getattr(sys.flags, 'safe_path', False):
        sys.path[:1] = _search_path(Path(argv[0]).resolve().parent)
    sys.modules['__main__'] = main
    try:
        yield
    finally:
        sys.argv, sys.path[:], sys.modules['__main__'] = old_argv, old_path, old_main


def _search_path(folder: Path) -> list[str]:
    """Return what stands first in `sys.path` for a script in this folder: the folder, as Python has it.

    Where the folder holds another timm, the home of the imported one goes before it. Processes that multiprocessing
    spawns get a copy of `sys.path` and import timm from it, and they must not get another version than their parent.
    """
    home = Path(timm.__path__[0]).resolve().parent
    if (folder / 'timm' / '__init__.py').exists() and home != folder:
        return [str(home), str(folder)]
    return [str(folder)]


@contextmanager
def _ddp_takes_cpu_as_device_id() -> Iterator[None]:
    """Let scripts train on CPUs that name their device to `DistributedDataParallel`, as timm's train.py does.

    DDP wants no `device_ids` for a model on the CPU, and refuses `[device]`, which is what a script gives that treats
    all devices alike. In a distributed environment, ids that all name the CPU are left out; others pass untouched.
    """
    if int(os.environ.get('WORLD_SIZE', '1')) < 2:
        yield
        return
    original = DistributedDataParallel.__init__

    @functools.wraps(original)
    def init(self: DistributedDataParallel, module: Any, device_ids: Any = None, *args: Any, **kwargs: Any) -> None:
        if device_ids and all(torch.device(device).type == 'cpu' for device in device_ids):
            device_ids = None
        original(self, module, device_ids, *args, **kwargs)

    DistributedDataParallel.__init__ = init  # type: ignore[method-assign]
    try:
        yield
    finally:
        DistributedDataParallel.__init__ = original  # type: ignore[method-assign]
