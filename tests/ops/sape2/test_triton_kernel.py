"""The Triton kernel against the definition in float64, forward and every gradient.

Without a GPU the kernel runs in Triton's interpreter, which has the arithmetic but not the speed.
"""

import math

import pytest
import torch

from timm_sape2.ops.sape2.operator import triton_attention

pytestmark = pytest.mark.filterwarnings('ignore::RuntimeWarning:triton')
NAMES = ('query', 'key', 'value', 'row_signature', 'column_signature')


@pytest.fixture(autouse=True)
def device(triton_device):
    return triton_device


def random_inputs(grid, prefix=1, heads=1, dim=16, dtype=torch.float32, size=1.0, device='cpu', batch=1):
    height, width = grid
    tokens = prefix + height * width
    query, key, value = (torch.randn(batch, heads, tokens, dim).to(dtype) for _ in range(3))
    rows, columns = (size * torch.randn(batch, heads, height * width, length) for length in (width, height))
    return [x.to(device).requires_grad_() for x in (query, key, value, rows, columns)]


def with_gradients(attend, inputs, grad_output):
    """Return the output and the gradient of each input."""
    output = attend(*inputs)
    return output.detach(), torch.autograd.grad(output, inputs, grad_output.to(output.dtype))


def by_definition(grid, prefix):
    """Attention with all differences of signatures stored."""

    def distances(points):
        squares = (points.unsqueeze(-2) - points.unsqueeze(-3)).square().sum(-1)
        is_zero = squares == 0
        return squares.masked_fill(is_zero, 1.0).sqrt().masked_fill(is_zero, 0.0)

    def attend(query, key, value, rows, columns):
        logits = query.shape[-1] ** -0.5 * query @ key.mT
        bias = torch.zeros_like(logits)
        bias[..., prefix:, prefix:] = distances(rows) + distances(columns)
        return (logits + bias).softmax(-1) @ value

    return attend


def by_kernel(grid, prefix):
    """Attention by the kernel, on memory that is full of NaN before it is written to."""

    def attend(*inputs):
        return triton_attention(*inputs, prefix, inputs[0].shape[-1] ** -0.5)[0]

    return attend


@pytest.fixture
def poisoned_memory():
    """Fresh memory is full of NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def relative_error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def check(inputs, grid, prefix, forward, backward):
    """Assert relative errors of the kernel at most `forward` and `backward`."""
    grad_output = torch.randn_like(inputs[0])
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected, expected_grads = with_gradients(by_definition(grid, prefix), exact, grad_output.double())
    output, grads = with_gradients(by_kernel(grid, prefix), inputs, grad_output)
    assert output.dtype == inputs[0].dtype
    assert relative_error(output, expected) <= forward
    for name, x, grad, expected_grad in zip(NAMES, inputs, grads, expected_grads, strict=True):
        assert grad.dtype == x.dtype and grad.shape == x.shape
        assert relative_error(grad, expected_grad) <= backward, name


def test_two_patches_by_hand(device):
    """Distances 3 and 1, no dot products: weights 1 and e^4, and half of the gradient's slope for each of them."""
    zeros = torch.zeros(1, 1, 2, 16, device=device)
    value = torch.stack([torch.zeros(16), torch.ones(16)]).reshape(1, 1, 2, 16).to(device)
    rows = torch.tensor([[0.0, 0.0], [0.0, 3.0]], device=device).reshape(1, 1, 2, 2).requires_grad_()
    columns = torch.tensor([[0.0], [1.0]], device=device).reshape(1, 1, 2, 1).requires_grad_()
    output = by_kernel((1, 2), 0)(zeros, zeros, value, rows, columns)
    weight = math.exp(4) / (1 + math.exp(4))
    torch.testing.assert_close(output[0, 0, :, 0].tolist(), [weight, 1 - weight])
    output[0, 0, 0, 0].backward()
    slope = weight * (1 - weight)
    torch.testing.assert_close(rows.grad[0, 0].tolist(), [[0.0, -slope], [0.0, slope]])
    torch.testing.assert_close(columns.grad[0, 0].tolist(), [[-slope], [slope]])


@pytest.mark.usefixtures('poisoned_memory')
class TestAgainstTheDefinition:
    @pytest.mark.parametrize('prefix', [0, 1, 5])
    @pytest.mark.parametrize('grid', [(7, 9), (1, 5)], ids=str)
    def test_float32(self, device, grid, prefix):
        check(random_inputs(grid, prefix, device=device), grid, prefix, forward=1e-5, backward=1e-4)

    def test_float32_on_many_tiles(self, device):
        check(random_inputs((14, 14), device=device), (14, 14), 1, forward=1e-5, backward=1e-4)

    @pytest.mark.parametrize('prefix', [0, 1, 5])
    @pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize('grid', [(7, 9), (1, 5)], ids=str)
    def test_half_precision(self, device, grid, prefix, dtype):
        check(random_inputs(grid, prefix, dtype=dtype, device=device), grid, prefix, forward=2e-2, backward=2e-2)

    def test_half_precision_on_many_tiles(self, device):
        check(random_inputs((14, 14), 5, dtype=torch.float16, device=device), (14, 14), 5, forward=2e-2, backward=2e-2)

    @pytest.mark.parametrize('dim', [16, 24, 32, 48, 64, 80, 96, 128])
    def test_head_dimensions(self, device, dim):
        check(random_inputs((3, 4), dim=dim, device=device), (3, 4), 1, forward=1e-5, backward=1e-4)

    @pytest.mark.parametrize(('grid', 'dtype'), [((1, 128), torch.bfloat16), ((40, 2), torch.float32)], ids=str)
    def test_long_lines(self, device, grid, dtype):
        forward, backward = (1e-5, 1e-4) if dtype == torch.float32 else (2e-2, 2e-2)
        check(random_inputs(grid, dtype=dtype, device=device), grid, 1, forward, backward)

    def test_images_and_heads(self, device):
        check(random_inputs((3, 4), heads=3, batch=2, device=device), (3, 4), 1, forward=1e-5, backward=1e-4)

    def test_bias_near_a_thousand(self, device):
        inputs = random_inputs((7, 9), size=140.0, device=device)
        distances = torch.cdist(inputs[3], inputs[3]) + torch.cdist(inputs[4], inputs[4])
        assert 900 < distances.mean() < 1200
        check(inputs, (7, 9), 1, forward=1e-5, backward=1e-4)

    def test_signatures_far_from_the_origin(self, device):
        """Their distances are small against their norms: products would cancel if they were not centred."""
        inputs = random_inputs((7, 9), dtype=torch.bfloat16, device=device)
        inputs[3:] = [(x.detach() + 100).requires_grad_() for x in inputs[3:]]
        check(inputs, (7, 9), 1, forward=2e-2, backward=2e-2)

    def test_gradient_of_none_but_the_values(self, device):
        inputs = random_inputs((3, 4), device=device)
        output = by_kernel((3, 4), 1)(*(x.detach() for x in inputs[:2]), inputs[2], *(x.detach() for x in inputs[3:]))
        expected = by_definition((3, 4), 1)(*inputs)
        grad_output = torch.randn_like(output)
        (grad,) = torch.autograd.grad(output, [inputs[2]], grad_output)
        torch.testing.assert_close(grad, torch.autograd.grad(expected, [inputs[2]], grad_output)[0])


class TestZeroDistances:
    @pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
    def test_identical_patches_have_no_bias_and_no_gradient(self, device, dtype):
        query, key, value, rows, columns = random_inputs((7, 9), dtype=dtype, device=device)
        rows, columns = (x.detach()[:, :, :1].expand_as(x).contiguous().requires_grad_() for x in (rows, columns))
        output = by_kernel((7, 9), 1)(query, key, value, rows, columns)
        plain = torch.nn.functional.scaled_dot_product_attention(query.double(), key.double(), value.double())
        assert relative_error(output, plain) <= (1e-6 if dtype == torch.float32 else 1e-2)
        output.float().square().sum().backward()
        assert (rows.grad == 0).all() and (columns.grad == 0).all()
        assert query.grad.isfinite().all()

    def test_a_pair_of_identical_patches(self, device):
        """One distance is 0, all gradients stay right."""
        inputs = random_inputs((3, 4), device=device)
        for x in inputs[3:]:
            x.data[:, :, 5] = x.data[:, :, 2]
        check(inputs, (3, 4), 1, forward=1e-5, backward=1e-4)

    def test_nearly_identical_patches(self, device):
        """Distances of 1e-3 of the norms, where products in float32 have lost them."""
        inputs = random_inputs((3, 4), device=device)
        for x in inputs[3:]:
            x.data[:, :, 5] = x.data[:, :, 2] + 1e-3 * torch.randn_like(x.data[:, :, 2])
        check(inputs, (3, 4), 1, forward=1e-5, backward=1e-4)


class TestLayouts:
    def test_the_views_that_attention_has(self, device):
        """Queries, keys and values are views of one projection, and the output needs no copy before the next."""
        qkv = torch.randn(2, 13, 3, 2, 16, device=device).permute(2, 0, 3, 1, 4)
        rows, columns = torch.randn(2, 2, 12, 4, device=device), torch.randn(2, 2, 12, 3, device=device)
        output = by_kernel((3, 4), 1)(*qkv.unbind(0), rows, columns)
        torch.testing.assert_close(output, by_definition((3, 4), 1)(*qkv.unbind(0), rows, columns))
        assert output.transpose(1, 2).is_contiguous()

    def test_any_strides(self, device):
        inputs = random_inputs((3, 4), device=device)
        grad_output = torch.randn(1, 1, 16, 13, device=device).mT
        strided = [x.detach().mT.contiguous().mT.requires_grad_() for x in inputs]
        assert not any(x.is_contiguous() for x in strided)
        expected, expected_grads = with_gradients(by_kernel((3, 4), 1), inputs, grad_output.contiguous())
        output, grads = with_gradients(by_kernel((3, 4), 1), strided, grad_output)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(grads, expected_grads)


class TestNotFinite:
    @pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize('value', [float('nan'), float('inf')])
    @pytest.mark.parametrize('which', range(5), ids=NAMES)
    def test_spreads_as_in_plain_attention(self, device, which, value, dtype):
        """A token of the output is finite where it is in the definition, and nowhere else."""
        inputs = [x.detach() for x in random_inputs((3, 4), dtype=dtype, device=device)]
        inputs[which][0, 0, 5, 1] = value
        output = by_kernel((3, 4), 1)(*inputs)
        expected = by_definition((3, 4), 1)(*(x.double() for x in inputs))
        assert torch.equal(output.isfinite(), expected.isfinite())
