"""Directed heads: what they see, and the numbers of the authors' code."""

import json
from pathlib import Path

import pytest
import torch

from timm_sape2.positions import HostShape
from timm_sape2.positions.lookhere import DirectedBias

CPU = torch.device('cpu')
HOST = HostShape(embed_dim=96, num_heads=12, grid=(3, 4), num_prefix_tokens=1, depth=2, block=0)
# The bias of patch 5 with 12 heads in 2 blocks, from lookhere.py of github.com/GreenCUBIC/lookhere (commit 889d2e6),
# which rounds to bfloat16; null is out of view. Its names: halves-none, triangles-none, eighths1-eighths2-none.
AUTHORS = json.loads((Path(__file__).parent / 'lookhere_patch_5_of_3x4.json').read_text())


def bias(host, grid, **options):
    encoding = DirectedBias(host, **options)
    query = torch.zeros(1, host.num_heads, grid[0] * grid[1], host.head_dim)
    return encoding.attention_bias(query, query, query, grid, encoding.prepare(grid, CPU))[0]


def test_what_the_middle_of_nine_patches_sees_by_hand():
    host = HOST._replace(num_heads=4, embed_dim=32)
    views = {
        'halves': ['111 111 000', '000 111 111', '110 110 110'],
        'quarters': ['111 010 000', '000 010 111', '100 110 100'],
        'eighths': ['110 010 000', '000 010 110', '100 110 000'],
    }
    for view, heads in views.items():
        seen = bias(host, (3, 3), view=view)[:3, 4] > -1000
        assert [''.join(map(str, head.int().tolist())) for head in seen] == [head.replace(' ', '') for head in heads]


def test_penalties_by_hand():
    """Distances 0, 1, 2 in a row; slopes 1/2 looking right, 1/4 looking everywhere, in the first block times 1.5."""
    first = bias(HOST._replace(num_heads=6, embed_dim=48), (1, 3), view='halves')[:, 0]
    assert first[3].tolist() == [0, -0.75, -1.5]
    assert first[4].tolist() == [0, -0.375, -0.75]
    last = bias(HOST._replace(num_heads=6, embed_dim=48, block=1), (1, 3), view='halves', slope=2)[:, 0]
    assert last[3].tolist() == [0, -0.5, -1]


@pytest.mark.parametrize('view', AUTHORS)
def test_numbers_of_the_authors(view):
    for block, heads in enumerate(AUTHORS[view]):
        found = bias(HOST._replace(block=block), (3, 4), view=view)[:, 5]
        seen = torch.tensor([[number is not None for number in head] for head in heads])
        assert torch.equal(found > -1000, seen)
        expected = torch.tensor([[number or 0.0 for number in head] for head in heads])
        torch.testing.assert_close(found[seen], expected[seen], rtol=5e-3, atol=1e-3)


@pytest.mark.parametrize('heads', [1, 2, 3, 4, 5, 8, 16])
@pytest.mark.parametrize('view', AUTHORS)
def test_any_number_of_heads_sees_itself_and_every_head_sees_something_else(heads, view):
    found = bias(HOST._replace(num_heads=heads, embed_dim=8 * heads), (5, 5), view=view)
    assert len(found) == heads
    assert (found.diagonal(0, 1, 2) == 0).all()
    assert (found[:, 12] > -1000).sum(1).min() >= 6  # of 25, an eighth of the plane with its borders


@pytest.mark.parametrize('slope', [1e-4, 1.0, 100.0])
@pytest.mark.parametrize('block', [0, 1])
def test_patches_out_of_view_get_no_weight_even_in_half_precision(block, slope):
    host = HOST._replace(block=block)
    weights = (bias(host, (3, 4), slope=slope).half() + 10 * torch.randn(12, 12, 12).half()).softmax(-1)
    assert ((weights == 0) | (bias(host, (3, 4)) > -1000)).all()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'view': 'thirds'}, "view must be one of 'halves', 'quarters', 'eighths'"),
        ({'slope': 0}, 'slope must be'),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        DirectedBias(HOST, **options)
