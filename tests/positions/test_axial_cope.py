"""Contextual positions along rows and columns, against a slow loop over their equations."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_sape2.ops.sape2 import cpu
from timm_sape2.ops.sape2.cpu import why_not_cpu
from timm_sape2.positions import HostShape, Positions
from timm_sape2.positions.axial_cope import AxialContextualPosition, outward_positions

CPU = torch.device('cpu')
HOST = HostShape(embed_dim=8, num_heads=2, grid=(3, 4), num_prefix_tokens=1)
OPTIONS = [
    {},
    {'gating': 'none'},
    {'counts': 'outwards'},
    {'counts': 'outwards', 'gating': 'none', 'num_positions': 2},
    {'num_positions': 2},
]


def bias(encoding, query, key, grid):
    """The bias that the channels add to the logits, (B, h, N, N)."""
    query_channels, key_channels = encoding.logit_channels(query, key, key, grid, encoding.prepare(grid, CPU))
    return query_channels @ key_channels.to(query_channels.dtype).transpose(-2, -1)


@torch.no_grad()
def test_one_row_by_hand():
    """Gates of 1/2: positions 1.5, 1, 0.5 to the end whoever asks, and 0.5 a step outwards; a query reads 0, 2, 10."""
    host = HostShape(embed_dim=2, num_heads=1, grid=(1, 3), num_prefix_tokens=0)
    query, key = torch.tensor([0.0, 1.0]).expand(1, 1, 3, 2), torch.tensor([3.0, 0.0]).expand(1, 1, 3, 2)
    suffix = AxialContextualPosition(host, num_positions=3)
    suffix.row_table.copy_(torch.tensor([[7.0, 0.0], [7.0, 2.0], [7.0, 10.0]]))
    suffix.column_table.zero_()
    assert bias(suffix, query, key, (1, 3))[0, 0].tolist() == [[6, 2, 1]] * 3
    outwards = AxialContextualPosition(host, num_positions=2, counts='outwards')
    outwards.row_table.copy_(torch.tensor([[7.0, 0.0], [7.0, 2.0], [7.0, 10.0]]))
    outwards.column_table.zero_()
    assert bias(outwards, query, key, (1, 3))[0, 0].tolist() == [[2, 6, 10], [1, 2, 6], [0, 1, 2]]


def slow_bias(encoding, query, key, grid, counts, gating):
    """The equations, one number at a time."""
    batch, heads, patches, dim = query.shape
    numbers = []
    for b in range(batch):
        for h in range(heads):
            for i in range(patches):
                place, q = divmod(i, grid[1]), query[b, h, i]

                def read(table, end, axis, b=b, h=h, place=place, q=q):
                    def gate(t):
                        at = (place[0], t) if axis else (t, place[1])
                        dot = q @ key[b, h, at[0] * grid[1] + at[1]]
                        return torch.sigmoid(dot * dim**-0.5) if gating == 'semantic' else torch.ones_like(dot)

                    here, last = place[axis], len(table) - 1
                    if counts == 'suffix':
                        position = sum(gate(t) for t in range(end, grid[axis]))
                    elif end > here:
                        position = last // 2 + sum(gate(t) for t in range(here + 1, end + 1))
                    else:
                        position = last // 2 - sum(gate(t) for t in range(end, here))
                    position = torch.as_tensor(position, dtype=q.dtype).clamp(0, last)
                    low = min(math.floor(position.item()), last - 1)
                    return q @ ((1 - (position - low)) * table[low] + (position - low) * table[low + 1])

                for j in range(patches):
                    row, column = divmod(j, grid[1])
                    numbers.append(read(encoding.row_table, column, 1) + read(encoding.column_table, row, 0))
    return torch.stack(numbers).reshape(batch, heads, patches, patches)


@pytest.mark.parametrize('options', OPTIONS, ids=str)
@pytest.mark.parametrize('grid', [(3, 4), (1, 5)])
def test_values_and_gradients_are_those_of_the_equations(options, grid):
    encoding = AxialContextualPosition(HOST, **options).double()
    patches = grid[0] * grid[1]
    query, key = (torch.randn(1, 2, patches, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(1, 2, patches, patches, dtype=torch.float64)
    chosen = {'counts': 'suffix', 'gating': 'semantic', **options}
    inputs = [query, encoding.row_table, encoding.column_table]
    inputs += [key] if chosen['gating'] == 'semantic' else []
    fast = bias(encoding, query, key, grid)
    slow = slow_bias(encoding, query, key, grid, chosen['counts'], chosen['gating'])
    torch.testing.assert_close(fast, slow)
    gradients = [torch.autograd.grad((x * weight).sum(), inputs, allow_unused=True) for x in (fast, slow)]
    # the tables are not read along an axis of length 1 but at the patch itself
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


@settings(max_examples=20, deadline=None)
@given(length=st.integers(1, 12), middle=st.integers(1, 6))
def test_outward_positions_grow_from_the_patch_itself(length, middle):
    positions = outward_positions(torch.rand(2, length, length), 2 * middle + 1)
    assert (positions.diff(dim=-1) >= -1e-6).all()
    torch.testing.assert_close(positions.diagonal(0, -2, -1), torch.full((2, length), float(middle)))
    ones = outward_positions(torch.ones(length, length), 2 * middle + 1)
    distance = torch.arange(length) - torch.arange(length)[:, None]
    assert torch.equal(ones, (distance + middle).clamp(0, 2 * middle).float())


@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_attention_of_a_model_is_that_of_its_bias(tiny_vit, options):
    position = tiny_vit('axial_cope', position_args={'axial_cope': options}, reg_tokens=2).blocks[0].attn.position
    query, key, value = torch.randn(3, 2, 2, 3 + 63, 16)
    added = position.bias(query, key, value, (7, 9))
    assert (added[:, :, :3] == 0).all() and (added[..., :3] == 0).all() and added.abs().max() > 1
    weights = (query @ key.transpose(2, 3) / 4 + added).softmax(-1)
    torch.testing.assert_close(position.attend(query, key, value, (7, 9)), weights @ value)


@pytest.mark.parametrize('counts', ['suffix', 'outwards'])
def test_nothing_square_is_stored_beside_attention(tiny_vit, counts):
    """63 patches: queries and keys are 7 + 9 channels wider at most, and no bias is kept for the backward pass."""
    options = {'axial_cope': {'counts': counts}}
    model, sizes = tiny_vit('axial_cope', position_args=options, depth=1), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(tuple(x.shape)) or x, lambda x: x):
        model(torch.randn(2, 3, 56, 72))
    widened = [size for size in sizes if size[-1] == 16 + 7 + 9]
    assert widened or (counts == 'suffix' and why_not_cpu(torch.empty(0)) is None)
    assert not [size for size in sizes if size[-2:] == (64, 64) or size[-2:] == (63, 63)]


@pytest.mark.parametrize(
    ('position', 'options', 'grid', 'prefix'),
    [
        ('axial_cope', {}, (9, 4), 3),
        ('rope+axial_cope', {}, (3, 11), 1),
        ('axial_cope', {'gating': 'none'}, (1, 5), 0),
        ('axial_cope', {'num_positions': 2}, (7, 6), 2),
    ],
)
@pytest.mark.parametrize('tile', [16, 1024])
def test_compiled_code_computes_the_same(monkeypatch, position, options, grid, prefix, tile):
    """Values and all gradients are those of attention with more channels, in tiles that cut lines too."""
    if why_not_cpu(torch.empty(0, dtype=torch.float64)) is not None:
        pytest.skip('no compiled code')
    monkeypatch.setattr(cpu, 'TILE', tile)
    host = HostShape(embed_dim=32, num_heads=2, grid=grid, num_prefix_tokens=prefix, depth=2, block=0)
    names = {name: options if name == 'axial_cope' else {} for name in position.split('+')}
    positions = Positions(names, host).double()
    shape = 2, 2, prefix + grid[0] * grid[1], 16
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weight, found = torch.randn(shape, dtype=torch.float64), []
    for fused in ('axial_cope', ''):
        positions.fused_encoding = fused
        output = positions.attend(*inputs, grid)
        found.append([output, *torch.autograd.grad((output * weight).sum(), inputs + list(positions.parameters()))])
    assert 'attention_cpu' in type(found[0][0].grad_fn).__name__ and 'cpu' not in type(found[1][0].grad_fn).__name__
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second)


def test_outward_counts_have_no_compiled_code(tiny_vit):
    position = tiny_vit('axial_cope', position_args={'axial_cope': {'counts': 'outwards'}}).blocks[0].attn.position
    assert position['axial_cope'].fused_attention(*torch.randn(3, 1, 2, 64, 16), (7, 9), 1) is None


def test_tables_are_shared_by_heads_and_start_large_enough():
    for counts, entries in (('suffix', 300), ('outwards', 599)):
        encoding = AxialContextualPosition(HOST, counts=counts, num_positions=300)
        assert {name: tuple(p.shape) for name, p in encoding.named_parameters()} == {
            'row_table': (entries, 4),
            'column_table': (entries, 4),
        }
        assert 0.18 < encoding.row_table.std() < 0.22
    assert AxialContextualPosition(HOST, initial_std=0.02, num_positions=300).column_table.std() < 0.03


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'counts': 'prefix'}, "counts must be one of 'suffix', 'outwards', got 'prefix'"),
        ({'gating': 'hard'}, "gating must be one of 'semantic', 'none'"),
        ({'num_positions': 1}, 'num_positions must be a whole number of at least 2, got 1'),
        ({'initial_std': 0}, 'initial_std must be a positive number, got 0'),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        AxialContextualPosition(HOST, **options)
