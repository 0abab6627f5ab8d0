"""Compiling the C functions and keeping them: what can go wrong on the machines of others, and what then runs."""

import errno
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from timm_sape2.ops.sape2 import choose, cpu_library
from timm_sape2.ops.sape2.cpu_library import library, why_not_compiled

LOAD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location('cpu_library', sys.argv[1])
cpu_library = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cpu_library)
print(cpu_library.library(False).sape2_forward is not None)
"""


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """An empty cache folder, a process that has loaded nothing yet, and a compiler that does not optimize."""
    monkeypatch.setattr(cpu_library, 'FLAGS', tuple(flag for flag in cpu_library.FLAGS if flag != '-O3'))
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    forget()
    yield tmp_path / 'timm_sape2'
    forget()


def forget():
    library.cache_clear()
    why_not_compiled.cache_clear()


@pytest.fixture
def compilations(monkeypatch):
    """Commands of all compilations."""
    found = []
    run = cpu_library._run
    monkeypatch.setattr(cpu_library, '_run', lambda command: found.append(command) or run(command))
    return lambda: [command for command in found if '--version' not in command]


def fake_compiler(tmp_path, script):
    path = tmp_path / 'fake-cc'
    path.write_text(f'#!/bin/sh\n{script}\n')
    path.chmod(0o755)
    return str(path)


class TestCache:
    def test_it_is_filled_once(self, cache, compilations):
        library(False)
        (path,) = cache.glob('*.so')
        forget()
        library(False)
        assert list(cache.glob('*.so')) == [path] and len(compilations()) == 1

    def test_float64_is_another_file(self, cache):
        library(False)
        library(True)
        assert len(list(cache.glob('*.so'))) == 2

    @pytest.mark.parametrize('size', [0, 100, 10_000])
    def test_a_truncated_file_is_replaced(self, cache, compilations, size):
        library(False)
        (path,) = cache.glob('*.so')
        whole = path.read_bytes()
        path.unlink()  # the file that this process has loaded stays as it is
        path.write_bytes(whole[:size])
        forget()
        assert why_not_compiled(False) is None
        assert len(compilations()) == 2 and path.read_bytes() == whole

    def test_a_file_from_another_source_is_left_alone(self, cache, compilations, monkeypatch, tmp_path):
        library(False)
        (old,) = cache.glob('*.so')
        changed = tmp_path / 'cpu_kernel.c'
        changed.write_text(cpu_library.SOURCE.read_text() + '\n/* changed */\n')
        monkeypatch.setattr(cpu_library, 'SOURCE', changed)
        forget()
        library(False)
        assert len(compilations()) == 2 and old in cache.glob('*.so') and len(list(cache.glob('*.so'))) == 2

    @pytest.mark.parametrize('what', ['compiler', 'flags', 'processor'])
    def test_what_a_file_depends_on(self, cache, monkeypatch, tmp_path, what):
        library(False)
        if what == 'compiler':
            monkeypatch.setenv('CC', fake_compiler(tmp_path, 'if [ "$1" = --version ]; then echo 2; else cc "$@"; fi'))
        elif what == 'flags':
            monkeypatch.setattr(cpu_library, 'FLAGS', (*cpu_library.FLAGS, '-O1'))
        else:
            monkeypatch.setattr(cpu_library, '_processor', lambda: 'another')
        forget()
        library(False)
        assert len(list(cache.glob('*.so'))) == 2

    def test_nothing_else_is_left_in_it(self, cache, monkeypatch, tmp_path):
        monkeypatch.setenv('CC', fake_compiler(tmp_path, 'exit 1'))
        assert why_not_compiled(False) is not None
        monkeypatch.delenv('CC')
        forget()
        library(False)
        assert sorted(path.suffix for path in cache.iterdir()) == ['', '.so'], 'a lock and a library'

    def test_many_processes_at_once(self, cache):
        command = [sys.executable, '-c', LOAD, cpu_library.__file__]
        processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(8)]
        assert {process.communicate(timeout=300)[0] for process in processes} == {'True\n'}
        assert all(process.returncode == 0 for process in processes)
        assert sorted(path.suffix for path in cache.iterdir()) == ['', '.so'], 'a lock and a library'


class TestReasons:
    def check(self, reason):
        """Assert that a reason is given, kept, and that the reference runs."""
        assert reason in why_not_compiled(False)
        name, reasons = choose(torch.zeros(1, 1, 13, 16), (3, 4))
        assert name == 'reference' and reasons['cpu'] == why_not_compiled(False)
        with pytest.raises(OSError, match=r'.'):
            library(False)

    def test_no_compiler(self, monkeypatch):
        monkeypatch.setenv('PATH', '')
        self.check('no C compiler (CC, cc, gcc, clang)')

    def test_a_compiler_that_is_named_and_not_there(self, monkeypatch):
        """The others are tried."""
        monkeypatch.setenv('CC', 'no-such-compiler')
        assert why_not_compiled(False) is None

    def test_a_command_of_several_words(self, monkeypatch, compilations):
        monkeypatch.setenv('CC', 'env LANG=C cc')
        assert why_not_compiled(False) is None
        assert compilations()[0][:3] == ['env', 'LANG=C', 'cc']

    @pytest.mark.parametrize(
        ('script', 'reason'),
        [
            (
                '[ "$1" = --version ] && exit 0; echo "x.c:1: error: no float" >&2; exit 1',
                'fails: x.c:1: error: no float',
            ),
            ('exit 7', 'fails: exit status 7'),
            ('[ "$1" = --version ] && exit 0; sleep 60', 'does not end within 0.5 seconds'),
            ('exit 0', 'wrote no file'),
        ],
    )
    def test_a_broken_compiler(self, monkeypatch, tmp_path, script, reason):
        monkeypatch.setattr(cpu_library, 'TIME_LIMIT', 0.5)
        monkeypatch.setenv('CC', fake_compiler(tmp_path, script))
        self.check(reason)

    def test_a_compiler_that_writes_something_else(self, monkeypatch, tmp_path):
        write = 'while [ "$1" != -o ]; do [ "$1" = --version ] && exit 0; shift; done; echo nonsense > "$2"'
        monkeypatch.setenv('CC', fake_compiler(tmp_path, write))
        self.check('file too short')

    def test_a_read_only_cache(self, cache, monkeypatch):
        def refuse(**options):
            raise PermissionError(errno.EACCES, 'Permission denied')

        monkeypatch.setattr(tempfile, 'TemporaryDirectory', refuse)
        self.check(f'cannot write to the cache folder {cache}: Permission denied')

    def test_a_cache_that_is_no_folder(self, cache):
        cache.write_text('')
        self.check(f'cannot write to the cache folder {cache}: ')

    def test_switched_off(self, monkeypatch, compilations):
        monkeypatch.setenv('TIMM_SAPE2_CPU_KERNEL', '0')
        self.check('switched off (TIMM_SAPE2_CPU_KERNEL=0)')
        assert not compilations()

    def test_no_home(self, monkeypatch):
        monkeypatch.delenv('XDG_CACHE_HOME')

        def home():
            raise RuntimeError('Could not determine home directory.')

        monkeypatch.setattr(Path, 'home', home)
        self.check('no cache folder: Could not determine home directory.')


def test_the_source_is_part_of_the_package():
    assert cpu_library.SOURCE.is_file() and cpu_library.SOURCE.parent == Path(cpu_library.__file__).parent


def test_structures_are_those_of_the_source():
    """Names and order of the members of `view` and `call`."""
    source = cpu_library.SOURCE.read_text()
    for structure, name in ((cpu_library.View, 'view'), (cpu_library.Call, 'call')):
        body = source.partition(f'}} {name};')[0].rpartition('typedef struct {')[2]
        code = ''.join(part.partition('*/')[2] if i else part for i, part in enumerate(body.split('/*')))
        members = re.findall(r'\b\w+(?=(?:\[\w+\])?[,;])', code)
        assert members == [field[0] for field in structure._fields_]
