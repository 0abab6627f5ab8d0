"""Attention without a stored bias, where an encoding offers it: the same results, and when the plain path runs."""

import pytest
import torch
from torch import nn

from timm_sape2.ops.sape2.cpu import cpu_attention
from timm_sape2.ops.sape2.operator import triton_attention
from timm_sape2.positions import ENCODINGS, HostShape, Positions
from timm_sape2.positions.sape2 import SaPE2

OPTIONS = (
    {},
    {'target': 'q'},
    {'target': 'qk'},
    {'gating': 'none'},
    {'gate_source': 'value'},
    {'gate_source': 'separate'},
    {'axes': 'x'},
    {'axes': 'y'},
    {'distance_scale': 'grid', 'num_positions': 3},
    {'recompute': True},
    {'recompute': True, 'target': 'qk'},
)


@pytest.fixture
def x():
    return torch.randn(2, 3, 56, 72)


@pytest.fixture
def calls(monkeypatch):
    """Names of the ways in which attention was computed."""
    found = []

    def watch(name, function):
        return lambda *args, **kwargs: found.append(name) or function(*args, **kwargs)

    monkeypatch.setattr('timm_sape2.ops.sape2.attention.cpu_attention', watch('cpu', cpu_attention))
    monkeypatch.setattr('timm_sape2.ops.sape2.attention.triton_attention', watch('triton', triton_attention))
    return found


def gradients(model, x, **kwargs):
    model.zero_grad()
    output = model(x, **kwargs)
    output.square().sum().backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters()}


def plainly(model, x, **kwargs):
    """Output and gradients with a stored bias."""
    names = [block.attn.position.fused_encoding for block in model.blocks]
    for block in model.blocks:
        block.attn.position.fused_encoding = ''
    found = gradients(model, x, **kwargs)
    for block, name in zip(model.blocks, names, strict=True):
        block.attn.position.fused_encoding = name
    return found


@pytest.mark.parametrize('options', OPTIONS, ids=str)
@pytest.mark.parametrize('registers', [0, 4])
def test_same_outputs_and_gradients_on_a_cpu(tiny_vit, x, calls, options, registers):
    model = tiny_vit('sape2', position_args={'sape2': options}, reg_tokens=registers, global_pool='avg')
    torch.testing.assert_close(gradients(model, x), plainly(model, x), rtol=1e-4, atol=1e-4)
    assert calls == ['cpu'] * 2


@pytest.mark.parametrize('options', [{}, {'gate_source': 'separate'}, {'axes': 'y', 'distance_scale': 'grid'}], ids=str)
def test_same_outputs_and_gradients_with_triton(tiny_vit, triton_device, calls, options):
    model = tiny_vit('learned+sape2', img_size=(24, 32), global_pool='avg', position_args={'sape2': options})
    model, x = model.to(triton_device), torch.randn(1, 3, 24, 32, device=triton_device)
    torch.testing.assert_close(gradients(model, x), plainly(model, x), rtol=1e-3, atol=1e-4)
    assert calls == ['triton'] * 2


def test_triton_compiles_to_one_graph(tiny_vit, triton_device, calls):
    torch._dynamo.reset()
    model = tiny_vit(img_size=(24, 32), depth=1, global_pool='avg').to(triton_device)
    x = torch.randn(1, 3, 24, 32, device=triton_device)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(x), model(x))
    assert 'triton' in calls and 'cpu' not in calls


@pytest.mark.parametrize('compiled', [False, True])
def test_recompute_stores_nothing_square_on_the_plain_path(tiny_vit, x, compiled, monkeypatch):
    """Two images, two heads, 63 patches: no distances are kept for the backward pass."""
    monkeypatch.setattr('timm_sape2.ops.sape2.cpu_library.why_not_compiled', lambda double: 'no C compiler')
    torch._dynamo.reset()
    kept = {}
    for recompute in (False, True):
        model = tiny_vit('sape2', position_args={'sape2': {'target': 'qk', 'recompute': recompute}}, depth=1)
        model = torch.compile(model, backend='aot_eager', fullgraph=True) if compiled else model
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            model(x)
        kept[recompute] = [size for size in sizes if size == 2 * 2 * 63 * 63]
    assert kept[False] and not kept[True]


def test_checkpointing(tiny_vit, x, calls):
    model = tiny_vit(global_pool='avg')
    expected = gradients(model, x)
    model.set_grad_checkpointing()
    torch.testing.assert_close(gradients(model, x), expected)
    assert calls == ['cpu'] * (2 + 4)


@pytest.mark.usefixtures('process_group')
def test_distributed_data_parallel_with_triton(tiny_vit, triton_device, calls):
    model = tiny_vit(img_size=(24, 32), depth=1, global_pool='avg').to(triton_device)
    x = torch.randn(1, 3, 24, 32, device=triton_device)
    expected = gradients(model, x)
    output, found = gradients(nn.parallel.DistributedDataParallel(model), x)
    torch.testing.assert_close((output, list(found.values())), (expected[0], list(expected[1].values())))
    assert calls == ['triton'] * 2


@pytest.mark.parametrize('kind', ['mask', 'causal', 'dropout', 'switched off'])
def test_plain_path_runs(tiny_vit, x, calls, kind):
    model, options = tiny_vit(), {}
    if kind == 'mask':
        options['attn_mask'] = torch.ones(64, 64, dtype=torch.bool).tril()
    elif kind == 'causal':
        options['is_causal'] = True
    elif kind == 'dropout':
        model = tiny_vit(attn_drop_rate=0.5).train()
    elif kind == 'switched off':
        for block in model.blocks:
            block.attn.fused_attn = False
    assert model(x, **options).isfinite().all()
    assert calls == []


@pytest.mark.parametrize('kind', ['bfloat16', 'autocast'])
def test_half_precision_on_a_cpu(tiny_vit, x, calls, kind):
    model = tiny_vit('sape2')
    expected = model(x)
    if kind == 'bfloat16':
        model, x = model.bfloat16(), x.bfloat16()
    with torch.autocast('cpu', torch.bfloat16, enabled=kind == 'autocast'):
        torch.testing.assert_close(model(x).float(), expected, rtol=0.1, atol=0.1)
    assert calls == ['cpu'] * 4


@pytest.mark.parametrize('training', [False, True])
def test_compiles_to_one_graph_on_a_cpu(tiny_vit, x, calls, training):
    torch._dynamo.reset()
    model = tiny_vit(depth=1, global_pool='avg').train(training)
    expected = gradients(model, x)
    calls.clear()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    model.zero_grad()
    output = compiled(x)
    output.square().sum().backward()
    torch.testing.assert_close((output, {name: p.grad for name, p in model.named_parameters()}), expected)
    assert calls == ['cpu']


def test_dropout_matters_in_training_only(tiny_vit, x, calls):
    tiny_vit(attn_drop_rate=0.5).eval()(x)
    assert calls == ['cpu'] * 2


class AnotherSaPE2(SaPE2):
    pass


def test_another_bias_leaves_the_plain_path(monkeypatch):
    monkeypatch.setitem(ENCODINGS, 'another', AnotherSaPE2)
    host = HostShape(embed_dim=32, num_heads=2, grid=(7, 9), num_prefix_tokens=1, block=0)
    assert Positions({'sape2': {}}, host).fused_encoding == 'sape2'
    assert Positions({'another': {}, 'sape2': {}}, host).fused_encoding == ''
    assert Positions({'rope': {}, 'sape2': {}}, host).fused_encoding == 'sape2'
    assert Positions({'axial_cope': {}, 'sape2': {}}, host).fused_encoding == ''


def test_rotated_queries_and_keys_reach_the_fused_path(tiny_vit, monkeypatch):
    given = []
    monkeypatch.setattr(SaPE2, 'fused_attention', lambda self, *arguments: given.append(arguments))
    positions = tiny_vit('rope+sape2', reg_tokens=2).blocks[0].attn.position
    query, key, value = torch.randn(3, 2, 2, 3 + 63, 16)
    positions.attend(query, key, value, (7, 9))
    ((*inputs, grid, prefix, rotated),) = given
    assert inputs == [query, key, value] and (grid, prefix) == ((7, 9), 3)
    torch.testing.assert_close(rotated, positions.rotate(query, key, (7, 9)))
    assert not torch.equal(rotated[0], query)


def test_no_encoding_no_fused_path(tiny_vit):
    assert tiny_vit('learned').blocks[0].attn.position.fused_encoding == ''
