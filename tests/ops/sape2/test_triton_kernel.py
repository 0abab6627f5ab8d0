"""The Triton kernels against the definition in float64, forward and every gradient.

Without a GPU the kernels run in Triton's interpreter, which has the arithmetic but not the speed. Most tests want
signatures of their own choice: gates of 1 and tables of unit vectors make each signature a part of its query.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from timm_sape2.ops.sape2 import sape2_attention

pytestmark = pytest.mark.filterwarnings('ignore::RuntimeWarning:triton')
NAMES = ('query', 'key', 'value', 'row_signature', 'column_signature')


@pytest.fixture(autouse=True)
def device(triton_device):
    return triton_device


def random_inputs(grid, prefix=1, heads=1, dim=16, dtype=torch.float32, size=1.0, device='cpu', batch=1):
    """Queries, keys, values and signatures, which are numbers that dtype has."""
    height, width = grid
    tokens = prefix + height * width
    query, key, value = (torch.randn(batch, heads, tokens, dim).to(dtype) for _ in range(3))
    signatures = (size * torch.randn(batch, heads, height * width, length) for length in (width, height))
    return [x.to(device).requires_grad_() for x in (query, key, value, *(x.to(dtype).float() for x in signatures))]


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
    """Attention by the kernel, with signatures that are parts of queries which have no other use."""
    height, width = grid

    def attend(query, key, value, rows, columns):
        dim = query.shape[-1]
        channels = max(16, dim, width + height + -(width + height) % 8)
        units = torch.eye(channels, device=query.device)
        nothing = units.new_zeros(1, channels)
        row_table = torch.cat([nothing, units[:width].flip(0)])  # position n is n patches from the end of the line
        column_table = torch.cat([nothing, units[width : width + height].flip(0)])
        signatures = F.pad(torch.cat([rows, columns], -1), (0, channels - width - height, prefix, 0)).to(query.dtype)
        logit_query, logit_key, value = (F.pad(x, (0, channels - dim)) for x in (query, key, value))
        return sape2_attention(
            signatures,
            torch.zeros_like(signatures),
            value,
            None,
            row_table,
            column_table,
            grid,
            prefix,
            scale=dim**-0.5,
            logit_query=logit_query,
            logit_key=logit_key,
            implementation='triton',
        )[..., :dim]

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
        check(random_inputs((10, 13), device=device), (10, 13), 1, forward=1e-5, backward=1e-4)

    @pytest.mark.parametrize('prefix', [0, 1, 5])
    @pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize('grid', [(7, 9), (1, 5)], ids=str)
    def test_half_precision(self, device, grid, prefix, dtype):
        check(random_inputs(grid, prefix, dtype=dtype, device=device), grid, prefix, forward=2e-2, backward=2e-2)

    def test_half_precision_on_many_tiles(self, device):
        check(random_inputs((10, 13), 5, dtype=torch.float16, device=device), (10, 13), 5, forward=2e-2, backward=2e-2)

    @pytest.mark.parametrize('dim', [16, 24, 32, 48, 64])
    def test_head_dimensions(self, device, dim):
        check(random_inputs((3, 4), dim=dim, device=device), (3, 4), 1, forward=1e-5, backward=1e-4)

    @pytest.mark.parametrize('dim', [80, 96, 128])
    @pytest.mark.parametrize('grid', [(3, 5), (4, 5)], ids=str)
    def test_wide_heads(self, device, grid, dim):
        """Which are for half precision, with exact distances of short lines and without."""
        inputs = random_inputs(grid, dim=dim, dtype=torch.bfloat16, device=device)
        check(inputs, grid, 1, forward=2e-2, backward=2e-2)

    @pytest.mark.parametrize(('grid', 'dtype'), [((1, 63), torch.bfloat16), ((33, 2), torch.float32)], ids=str)
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
        inputs[3:] = [(x.detach() + 100).bfloat16().float().requires_grad_() for x in inputs[3:]]
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


def whole(dtype, device, grid=(7, 9), prefix=2, dim=16, count=10, size=0.1, heads=2):
    """Queries, keys, values, keys of gates, queries and keys of logits, and tables."""
    tensors = [torch.randn(1, heads, prefix + grid[0] * grid[1], dim).to(dtype) for _ in range(6)]
    tables = [size * torch.randn(count, dim) for _ in 'xy']
    return [x.to(device).requires_grad_() for x in (*tensors, *tables)]


@pytest.mark.usefixtures('poisoned_memory')
class TestFromQueriesToOutputs:
    """All steps, signatures too, against the reference in float64."""

    @staticmethod
    def check(inputs, grid=(7, 9), prefix=2, forward=1e-5, backward=1e-4, **options):
        gates, rotated = options.pop('gates', 'key'), options.pop('rotated', False)
        axes = options.pop('axes', 'xy')

        def attend(query, key, value, gate_key, logit_query, logit_key, *tables, implementation):
            gate_key = {'none': None, 'key': key, 'value': value, 'other': gate_key}[gates]
            tables = (table if axis in axes else None for table, axis in zip(tables, 'xy', strict=True))
            more = {'logit_query': logit_query, 'logit_key': logit_key} if rotated else {}
            return sape2_attention(
                query, key, value, gate_key, *tables, grid, prefix, implementation=implementation, **more, **options
            )

        exact = [x.detach().double().requires_grad_() for x in inputs]
        expected = attend(*exact, implementation='reference')
        output = attend(*inputs, implementation='triton')
        assert output.dtype == inputs[0].dtype
        assert relative_error(output.detach(), expected.detach()) <= forward
        grad_output = torch.randn_like(expected)
        expected_grads = torch.autograd.grad(expected, exact, grad_output, allow_unused=True)
        grads = torch.autograd.grad(output, inputs, grad_output.to(output), allow_unused=True)
        for x, grad, expected_grad in zip(inputs, grads, expected_grads, strict=True):
            if expected_grad is None or not expected_grad.any():
                assert grad is None or not grad.any()
            else:
                assert grad.dtype == x.dtype and relative_error(grad, expected_grad) <= backward

    @pytest.mark.parametrize('target', ['k', 'q'])
    @pytest.mark.parametrize('gates', ['none', 'key', 'value', 'other'])
    def test_targets_and_gates(self, device, target, gates):
        self.check(whole(torch.float32, device, (3, 5)), (3, 5), target=target, gates=gates)

    @pytest.mark.parametrize('target', ['k', 'q'])
    @pytest.mark.parametrize('axes', ['xy', 'x', 'y'])
    def test_rotation_and_single_axes(self, device, target, axes):
        self.check(whole(torch.float32, device, (3, 5)), (3, 5), target=target, axes=axes, rotated=True)

    @pytest.mark.parametrize('count', [2, 3, 40])
    def test_tables(self, device, count):
        """With as few entries as there can be, and with more than positions."""
        self.check(whole(torch.float32, device, count=count, heads=1))

    @pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize('options', [{}, {'target': 'q', 'gates': 'other'}, {'rotated': True}], ids=str)
    def test_half_precision(self, device, dtype, options):
        self.check(whole(dtype, device, heads=1), forward=2e-2, backward=2e-2, **options)

    @pytest.mark.parametrize('grid', [(2, 16), (4, 16), (4, 33), (64, 4)], ids=str)
    def test_lengths_of_lines(self, device, grid):
        """Half precision has a norm behind the signature in memory, and room for it or not."""
        self.check(whole(torch.bfloat16, device, grid, 1, size=0.03, heads=1), grid, 1, forward=2e-2, backward=2e-2)

    def test_wide_heads_on_long_lines(self, device):
        """Backward in four launches of attention."""
        inputs = whole(torch.bfloat16, device, (4, 33), 1, dim=72, size=0.03, heads=1)
        self.check(inputs, (4, 33), 1, forward=2e-2, backward=2e-2)

    @pytest.mark.parametrize(('target', 'gates'), [('k', 'key'), ('k', 'other'), ('q', 'key'), ('q', 'none')])
    def test_more_lines_and_rows_than_a_program_takes_at_once(self, device, target, gates):
        """A program computes the signatures of 8 lines, of 16 patches of a line at once."""
        self.check(whole(torch.float32, device, (18, 3), 1, heads=1), (18, 3), 1, target=target, gates=gates)

    def test_a_patch_without_a_number(self, device):
        """NaN in one patch's query spreads to all patches, and not to prefix tokens."""
        inputs = [x.detach() for x in whole(torch.bfloat16, device)]
        inputs[0][0, 0, 20, 3] = float('nan')
        query, key, value, _, logit_query, logit_key, *tables = inputs
        output = sape2_attention(
            query,
            key,
            value,
            key,
            *tables,
            (7, 9),
            2,
            logit_query=logit_query,
            logit_key=logit_key,
            implementation='triton',
        )
        assert output[0, 0, 2:].isnan().all() and output[0, 0, :2].isfinite().all() and output[0, 1].isfinite().all()


@pytest.fixture(params=[False, True], ids=['in roles', 'at once'])
def hopper(request, monkeypatch):
    """Whether the backward kernel has the registers of a Hopper."""
    triton_attention = pytest.importorskip('timm_sape2.ops.sape2.triton_attention')
    monkeypatch.setattr(triton_attention, '_is_hopper', lambda: request.param)
    return request.param


@pytest.mark.usefixtures('poisoned_memory', 'hopper')
@pytest.mark.parametrize('grid', [(4, 5), (4, 33)], ids=str)
def test_roles_of_the_backward_kernel(device, grid):
    """Everything at once, queries and keys after each other, or long lines, which take three launches."""
    TestFromQueriesToOutputs.check(
        whole(torch.bfloat16, device, grid, 1, size=0.03, heads=1), grid, 1, forward=2e-2, backward=2e-2
    )


def test_launches(device, hopper, monkeypatch):
    """Two kernels forward; three backward, or four, before the sum of the tables' gradients."""
    from timm_sape2.ops.sape2 import triton_attention, triton_signatures

    launched = []

    def count(name, run):
        return lambda *args, **kwargs: launched.append(name) or run(*args, **kwargs)

    for module in (triton_signatures, triton_attention):
        for name in [name for name in vars(module) if name.endswith('_kernel')]:
            kernel = getattr(module, name)
            monkeypatch.setattr(kernel, 'run', count(name, kernel.run))
    query, key, value, *_, row_table, column_table = whole(torch.bfloat16, device, (4, 5), 1)
    output = sape2_attention(query, key, value, key, row_table, column_table, (4, 5), 1, implementation='triton')
    assert launched == ['signature_kernel', 'forward_kernel']
    launched.clear()
    output.backward(torch.ones_like(output))
    roles = ['backward_kernel'] if hopper else ['backward_kernel', 'backward_kernel']
    assert launched == ['delta_kernel', *roles, 'signature_backward_kernel']
