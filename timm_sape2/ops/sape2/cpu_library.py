"""The functions of cpu_kernel.c: compiled at first use by the system's C compiler, kept in the user's cache folder.

A compilation takes a few seconds. The file in the cache is named by a hash of all that it depends on (source, compiler,
flags, processor) and a hash of its own contents, so that a file of something else, or a damaged one, is never loaded.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

SWITCH = 'TIMM_SAPE2_CPU_KERNEL'
"""Environment variable that turns these functions off if it is '0'."""

SOURCE = Path(__file__).with_name('cpu_kernel.c')
COMPILERS = ('cc', 'gcc', 'clang')
PROCESSOR = '-mcpu=native' if platform.machine() in ('arm64', 'aarch64') else '-march=native'
FLAGS = (
    *('-std=gnu11', '-O3', PROCESSOR, '-fPIC', '-shared', '-pthread'),
    # nothing here changes a result that is not finite
    *('-fno-math-errno', '-fno-trapping-math', '-ffp-contract=fast'),
)
TIME_LIMIT = 120  # seconds


class View(ctypes.Structure):
    """`view` of the C source."""

    _fields_ = (
        ('data', ctypes.c_void_p),
        ('image', ctypes.c_int64),
        ('head', ctypes.c_int64),
        ('token', ctypes.c_int64),
    )


class Call(ctypes.Structure):
    """`call` of the C source."""

    _fields_ = (
        ('images', ctypes.c_int64),
        ('heads', ctypes.c_int64),
        ('prefix', ctypes.c_int64),
        ('height', ctypes.c_int64),
        ('width', ctypes.c_int64),
        ('head_dim', ctypes.c_int64),
        ('positions', ctypes.c_int64),
        ('axes', ctypes.c_int64 * 2),
        ('contents', ctypes.c_int64 * 2),
        ('direct', ctypes.c_int64),
        ('gates', ctypes.c_int64),
        ('rotated', ctypes.c_int64),
        ('logits_at_once', ctypes.c_int64),
        ('tile', ctypes.c_int64),
        ('threads', ctypes.c_int64),
        ('scale', ctypes.c_double),
        ('inputs', View * 6),
        ('tables', ctypes.c_void_p),
        ('output', View),
        ('highest', ctypes.c_void_p),
        ('sums', ctypes.c_void_p),
        ('grad_output', View),
        ('grads', View * 6),
        ('grad_tables', ctypes.c_void_p),
        ('memory', ctypes.c_void_p),
    )


@functools.cache
def why_not_compiled(double: bool) -> str | None:
    """Tell why the functions cannot be used, None if they can; the first call in a process may compile them.

    Args:
        double: For float64, not float32.

    Returns:
        The reason, such as 'no C compiler (CC, cc, gcc, clang)', or None.
    """
    try:
        library(double)
    except OSError as error:
        return str(error)
    return None


@functools.cache
def library(double: bool) -> ctypes.CDLL:
    """Return the functions for float32 or float64, compiled if they are not in the cache.

    Raises:
        OSError: They are switched off, or cannot be compiled, kept or loaded; the message has the reason.
    """
    if os.environ.get(SWITCH) == '0':
        raise OSError(f'switched off ({SWITCH}=0)')
    loaded = ctypes.CDLL(str(_compiled(double)))
    loaded.sape2_memory.argtypes = [ctypes.POINTER(Call), ctypes.c_int64]
    loaded.sape2_memory.restype = ctypes.c_int64
    for function in (loaded.sape2_forward, loaded.sape2_backward):
        function.argtypes = [ctypes.POINTER(Call)]
        function.restype = None
    openmp = getattr(ctypes.CDLL(None), 'GOMP_parallel', None)
    if openmp is not None:
        loaded.sape2_use_openmp(openmp)
    return loaded


def cache_folder() -> Path:
    """Return the folder for compiled files: timm_sape2 in XDG_CACHE_HOME, by default ~/.cache."""
    try:
        return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache', 'timm_sape2')
    except RuntimeError as error:
        raise OSError(f'no cache folder: {error}') from error


def _compiled(double: bool) -> Path:
    """Return the path of the compiled functions, from the cache if it has them."""
    compiler = _find_compiler()
    flags = (*FLAGS, '-DSAPE2_DOUBLE') if double else FLAGS
    key = _key(compiler, flags)
    folder = cache_folder()
    path = _cached(key, folder)
    if path is not None:
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder), tempfile.TemporaryDirectory(dir=folder) as temporary:
            path = _cached(key, folder)
            if path is not None:
                return path
            made = Path(temporary, 'made.so')
            _run([*compiler, *flags, str(SOURCE), '-o', str(made), '-lm'])
            if not made.is_file():
                raise CompilerError(f'the C compiler {compiler[0]} wrote no file')
            path = folder / _file_name(key, made)
            os.replace(made, path)
    except OSError as error:
        if isinstance(error, CompilerError):
            raise
        raise OSError(f'cannot write to the cache folder {folder}: {error.strerror}') from error
    return path


def _cached(key: str, folder: Path) -> Path | None:
    return next((path for path in folder.glob(f'{key}-*.so') if path.name == _file_name(key, path)), None)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process compiles into a folder, and keep others waiting meanwhile."""
    try:
        import fcntl
    except ImportError:
        raise CompilerError('no locks on files in this system') from None
    with open(folder / 'lock', 'w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # let go of when the file is closed, also by a process that dies
        yield


class CompilerError(OSError):
    """The compiler failed."""


def _find_compiler() -> list[str]:
    """Return the command of the C compiler as a list of words."""
    named = shlex.split(os.environ.get('CC', ''))
    for command in ([named] if named else []) + [[name] for name in COMPILERS]:
        if shutil.which(command[0]):
            return command
    raise CompilerError(f'no C compiler (CC, {", ".join(COMPILERS)})')


def _key(compiler: list[str], flags: tuple[str, ...]) -> str:
    """Hash all that the compiled functions depend on."""
    parts = [SOURCE.read_text(), *compiler, _run([*compiler, '--version']), *flags, sys.platform, _processor()]
    return hashlib.sha256('\0'.join(parts).encode()).hexdigest()[:20]


def _processor() -> str:
    """What the compiler takes 'native' to mean: the processor's model and features, where the system names them."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return f'{platform.machine()} {platform.processor()}'
    names = ('model name', 'flags', 'Features', 'CPU implementer', 'CPU part')
    return '\n'.join(sorted({line for line in lines if line.startswith(names)}))


def _file_name(key: str, path: Path) -> str:
    """Name of a compiled file in the cache: what it was made from, and what is in it."""
    return f'{key}-{hashlib.sha256(path.read_bytes()).hexdigest()[:20]}.so'


def _run(command: list[str]) -> str:
    """Run a compiler and return what it says."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT)
    except OSError as error:
        raise CompilerError(f'the C compiler {command[0]} does not run: {error.strerror}') from error
    except subprocess.TimeoutExpired as error:
        raise CompilerError(f'the C compiler {command[0]} does not end within {TIME_LIMIT} seconds') from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if 'error' in line] or [f'exit status {done.returncode}']
        raise CompilerError(f'the C compiler {command[0]} fails: {lines[0].strip()}')
    return done.stdout
