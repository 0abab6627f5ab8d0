"""The C source by itself: warnings of the compiler, and sanitizers of memory, undefined behaviour and threads."""

import subprocess
from pathlib import Path

import pytest

from timm_sape2.ops.sape2 import cpu_library

pytestmark = pytest.mark.once

HARNESS = Path(__file__).with_name('cpu_kernel_harness.c')
FLAGS = [flag for flag in cpu_library.FLAGS if flag not in ('-O3', '-fPIC', '-shared')]


def compile_and_run(folder, *flags, source=HARNESS):
    """Compile the harness, run it, and return what it says."""
    program = folder / 'harness'
    compiler = cpu_library._find_compiler()
    command = [
        *compiler,
        *FLAGS,
        *flags,
        f'-DCPU_KERNEL="{cpu_library.SOURCE}"',
        str(source),
        '-o',
        str(program),
        '-lm',
    ]
    compiled = subprocess.run(command, capture_output=True, text=True)
    if compiled.returncode != 0 and 'sanitize' in ' '.join(flags) and 'cannot find' in compiled.stderr:
        pytest.skip('the compiler has no such sanitizer')
    assert compiled.returncode == 0, compiled.stderr
    return subprocess.run([str(program)], capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize('double', [[], ['-DSAPE2_DOUBLE']], ids=['float', 'double'])
def test_memory_and_undefined_behaviour(tmp_path, double):
    sanitizers = '-fsanitize=address,undefined,float-cast-overflow,float-divide-by-zero'
    done = compile_and_run(tmp_path, '-O1', '-g', sanitizers, '-fno-sanitize-recover=all', *double)
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')


def test_threads(tmp_path):
    done = compile_and_run(tmp_path, '-O1', '-g', '-fsanitize=thread')
    if 'unexpected memory mapping' in done.stderr:
        pytest.skip('this kernel places memory where the sanitizer does not expect it')
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')


def test_sanitizers_find_what_is_wrong(tmp_path):
    """One number more than there is room for, in the harness."""
    wrong = tmp_path / 'wrong.c'
    wrong.write_text(
        HARNESS.read_text().replace('malloc(sizeof(real) * most(size, 1))', 'malloc(sizeof(real) * size - 4)')
    )
    assert wrong.read_text() != HARNESS.read_text()
    done = compile_and_run(tmp_path, '-O1', '-g', '-fsanitize=address', source=wrong)
    assert done.returncode != 0 and 'heap-buffer-overflow' in done.stderr


@pytest.mark.parametrize('flags', [(), ('-DSAPE2_DOUBLE',), ('-mno-avx',)], ids=str)
def test_no_warnings(tmp_path, flags):
    if '-mno-avx' in flags and cpu_library.PROCESSOR == '-mcpu=native':
        pytest.skip('for processors with AVX')
    compiler = cpu_library._find_compiler()
    command = [*compiler, *cpu_library.FLAGS, *flags, '-Wall', '-Wextra', '-Werror', str(cpu_library.SOURCE)]
    done = subprocess.run([*command, '-o', str(tmp_path / 'made.so'), '-lm'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('flags', [('-O3',), ('-O3', '-mno-avx')], ids=str)
def test_other_vectors(tmp_path, flags):
    """The harness with the vectors of this processor, and with those of any x86-64."""
    if '-mno-avx' in flags and cpu_library.PROCESSOR == '-mcpu=native':
        pytest.skip('for processors with AVX')
    done = compile_and_run(tmp_path, *flags)
    assert (done.returncode, done.stdout) == (0, '')
