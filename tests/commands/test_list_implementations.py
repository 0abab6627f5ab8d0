"""What `timm-sape2 list` says about the implementations of SaPE2 attention."""

import pytest
import torch

from timm_sape2.__main__ import main
from timm_sape2.commands.list_implementations import explain_choice


@pytest.mark.skipif(torch.cuda.is_available(), reason='for machines without a GPU')
def test_the_last_lines_of_the_list(capsys):
    main(['list'])
    header, *rows = capsys.readouterr().out.split('\n\n')[-1].splitlines()
    assert header.split() == ['SaPE2', 'attention', 'runs', 'because']
    assert [row.partition('  ')[0] for row in rows] == ['cpu, float32', 'cpu, bfloat16']


def test_on_a_cpu():
    assert explain_choice('cpu', torch.float32) == ('cpu', 'not triton: not a CUDA tensor')
    assert explain_choice('cpu', torch.bfloat16) == ('cpu', 'not triton: not a CUDA tensor')


def test_on_a_cpu_without_a_compiler(monkeypatch):
    monkeypatch.setattr('timm_sape2.ops.sape2.cpu_library.why_not_compiled', lambda double: 'no C compiler')
    assert explain_choice('cpu', torch.float32) == (
        'reference',
        'not triton: not a CUDA tensor; not cpu: no C compiler; not recompute: not asked for',
    )


def test_the_kernel(triton_device):
    assert explain_choice(triton_device, torch.bfloat16) == ('triton', 'nothing prevents it')
