"""docs/benchmarks/equip.py measures what it says, and docs/equip.md has what it measured."""

import argparse
import importlib.util
import json
from pathlib import Path

import pytest
import timm
import torch

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location('equip_benchmark', ROOT / 'docs' / 'benchmarks' / 'equip.py')
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)


@pytest.fixture(params=['vit_tiny_patch16_224', 'vit_tiny_sape2'])
def checkpoint(request, tmp_path):
    """A model with learned embeddings, timm's own or one of ours."""
    sizes = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=10)
    kwargs = sizes | ({'position': 'learned'} if request.param == 'vit_tiny_sape2' else {})
    model = timm.create_model(request.param, **kwargs)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    args = argparse.Namespace(model=request.param, model_kwargs=kwargs)
    torch.save({'state_dict': model.state_dict(), 'args': args}, tmp_path / 'last.pth.tar')
    return str(tmp_path / 'last.pth.tar')


def test_changes_before_and_after_updates(checkpoint, tmp_path, capsys):
    names = ['learned+sape2', 'learned+sape2(initial_std=0.0001)', 'learned+rope']
    output = tmp_path / 'found.json'
    flags = ['--dataset', 'digits', '--images', '40', '--updates', '3', '--batch-size', '8', '--output', str(output)]
    benchmark.main(['--model', checkpoint, *flags, '--encodings', *names])
    rows = json.loads(output.read_text())['rows']
    assert [row['encodings'] for row in rows] == ['learned', *names]
    learned, sape2, small, rope = (float(row['change of features'].split()[0]) for row in rows)
    assert learned == 0 and 3 * small < sape2 < rope
    assert rows[0]['same prediction'] == '100.0 %'
    assert all(float(row['loss, first 10']) > 0 and row['top-1 then'].endswith('%') for row in rows)
    assert capsys.readouterr().out.count('| learned+rope |') == 1


def test_change_is_relative_to_each_token():
    old = torch.randn(2, 3, 4)
    assert benchmark.relative_change(3 * old, old) == pytest.approx(2)
    assert benchmark.relative_change(torch.cat([old[:1], 2 * old[1:]]), old) == pytest.approx(0.5)


@pytest.mark.parametrize('size', ['size_32', 'size_64', 'updates'])
def test_figures_of_the_page_are_those_of_the_files(size):
    measured = json.loads((ROOT / 'docs' / 'results' / 'equip' / f'{size}.json').read_text())
    page = (ROOT / 'docs' / 'equip.md').read_text()
    for row in measured['rows']:
        name, *figures = row.values()
        assert f'| `{name}` | {" | ".join(figures)} |' in page
    assert measured['command'].replace("'", '"') in page.replace("'", '"')
