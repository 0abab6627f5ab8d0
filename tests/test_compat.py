"""Private names of timm and torch are in one file, and what it makes of them works."""

import ast
from pathlib import Path

import pytest
import torch

import timm_sape2
from timm_sape2 import _compat

PACKAGE = Path(timm_sape2.__file__).parent


def private_names(source):
    """Names below timm and torch that a file takes although they begin with an underscore."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            found += [f'{node.module}.{alias.name}' for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            found.append(ast.unparse(node))
    names = [name.split('.') for name in found]
    return ['.'.join(name) for name in names if name[0] in ('timm', 'torch') and any(is_private(x) for x in name)]


def is_private(name):
    return name.startswith('_') and not name.startswith('__')


def test_private_names_are_found():
    source = (
        'import torch._dynamo\nfrom timm.models._hub import x\nfrom .._files import y\ntorch._C.z()\ntorch.__version__'
    )
    assert private_names(source) == ['torch._dynamo', 'timm.models._hub.x', 'torch._C.z', 'torch._C']


def test_private_names_are_in_one_file():
    found = {str(path.relative_to(PACKAGE)): private_names(path.read_text()) for path in PACKAGE.rglob('*.py')}
    assert {path for path, names in found.items() if names} == {'_compat.py'}


def test_is_being_exported():
    seen = []
    torch.jit.trace(lambda x: seen.append(_compat.is_being_exported()) or x + 1, torch.zeros(1))
    assert seen[0] and not _compat.is_being_exported()


def test_is_in_torch_func():
    seen = []
    torch.func.vmap(lambda x: seen.append(_compat.is_in_torch_func()) or x)(torch.zeros(2))
    assert seen == [True] and not _compat.is_in_torch_func()


@pytest.mark.parametrize('times', [2, 3])
def test_compiled_at_most(times):
    """Of three sizes, each compiled for itself, those beyond the limit run as plain Python."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    double = torch.compile(lambda x: x * 2, backend=backend, dynamic=False)
    with _compat.compiled_at_most(times):
        assert [double(torch.ones(size)).sum().item() for size in (2, 3, 4)] == [4, 6, 8]
    torch.compiler.reset()
    assert len(graphs) == times
