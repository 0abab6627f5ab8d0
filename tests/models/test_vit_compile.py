"""The host under torch.compile, always as one graph."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning')


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def images(height=56, width=72, batch=2):
    return torch.randn(batch, 3, height, width)


def compiled_gradients(model, backend='aot_eager'):
    """Gradients of the model, plain and compiled."""
    x, found = images(), []
    for function in (model, torch.compile(model, fullgraph=True, backend=backend)):
        model.zero_grad()
        function(x).square().sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    return found


def test_trains(tiny_vit, position):
    expected, compiled = compiled_gradients(tiny_vit(position, depth=1, global_pool='avg').train())
    torch.testing.assert_close(compiled, expected)


def test_trains_with_checkpointing(tiny_vit):
    model = tiny_vit(depth=1, global_pool='avg').train()
    model.set_grad_checkpointing()
    expected, compiled = compiled_gradients(model)
    torch.testing.assert_close(compiled, expected)


def test_fixed_model_compiles_once_and_again_for_another_batch(tiny_vit):
    counter, model = CompileCounterWithBackend('eager'), tiny_vit(depth=1)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    graphs = []
    for batch in (2, 2, 3, 5, 7):
        x = images(batch=batch)
        torch.testing.assert_close(compiled(x), model(x))
        graphs.append(counter.frame_count)
    assert graphs == [1, 1, 2, 2, 2]


def test_resized_model_is_compiled_anew(tiny_vit):
    model = tiny_vit(depth=1)
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    compiled(images())
    model.set_input_size((72, 56))
    x = images(72, 56)
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize(('pad', 'most'), [(False, 3), (True, 3)])
def test_dynamic_sizes(tiny_vit, pad, most):
    """Without padding timm's patch embedding asks for a graph for each size."""
    counter, model = CompileCounterWithBackend('eager'), tiny_vit(depth=1, dynamic_img_size=True, dynamic_img_pad=pad)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for size in [(56, 72), (72, 56), (40, 16), (33, 70)] if pad else [(56, 72), (72, 56), (40, 16)]:
        x = images(*size)
        torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count <= most


def test_inductor(tiny_vit):
    model = tiny_vit(depth=1, num_classes=0)
    compiled = torch.compile(model, fullgraph=True)
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
