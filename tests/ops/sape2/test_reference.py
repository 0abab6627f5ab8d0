"""The reference implementation: by hand, by properties, against a slow loop, and its gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from timm_sape2.ops.sape2 import reference, sape2_bias

GRIDS = [(7, 9), (1, 5), (5, 1), (14, 14)]


def random_inputs(grid, heads=2, dim=8, num_positions=4, batch=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    query, key, value = (randn(batch, heads, grid[0] * grid[1], dim) for _ in range(3))
    return query, key, value, randn(num_positions, dim), randn(num_positions, dim)


def slow_line_signatures(content, query, gate_key, table, scale):
    """Steps 1 to 4 for the patches of one line, number by number."""
    length, last = len(query), len(table) - 1
    result = torch.zeros(length, length, dtype=torch.float64)
    for x in range(length):
        for t in range(length):
            position = sum(
                1.0 if gate_key is None else 1 / (1 + math.exp(-scale * float(query[x] @ gate_key[s])))
                for s in range(t, length)
            )
            position = min(position, last)
            lower, upper = math.floor(position), math.ceil(position)
            embedding = table[lower] + (position - lower) * (table[upper] - table[lower])
            result[x, t] = content[x] @ embedding
    return result


def slow_bias(query, key, gate_key, row_table, column_table, grid, scale, target):
    """All steps for one image and head, line by line and pair by pair."""
    height, width = grid
    patches = torch.arange(height * width).reshape(height, width)
    bias = torch.zeros(height * width, height * width, dtype=torch.float64)
    for content in {'k': [query], 'q': [key], 'qk': [query, key]}[target]:
        for lines, table in ((patches, row_table), (patches.t(), column_table)):
            if table is None:
                continue
            signature = torch.zeros(height * width, lines.shape[1], dtype=torch.float64)
            for line in lines:
                line_gates = None if gate_key is None else gate_key[line]
                signature[line] = slow_line_signatures(content[line], query[line], line_gates, table, scale)
            for i in range(height * width):
                for j in range(height * width):
                    bias[i, j] += math.dist(signature[i].tolist(), signature[j].tolist())
    return bias


class TestByHand:
    def test_semantic_gates(self):
        query, key = torch.tensor([[0.0], [math.log(3.0)]]), torch.tensor([[1.0], [2.0]])
        gates = reference.semantic_gates(query, key, scale=0.5)
        expected = torch.tensor([[0.5, 0.5], [3**0.5 / (1 + 3**0.5), 0.75]])
        torch.testing.assert_close(gates, expected)

    def test_soft_positions_count_from_the_end_of_the_line(self):
        gates = torch.tensor([[0.25, 0.5, 1.0], [1.0, 1.0, 1.0]])
        positions = reference.soft_positions(gates, num_positions=3)
        torch.testing.assert_close(positions, torch.tensor([[1.75, 1.5, 1.0], [2.0, 2.0, 1.0]]))

    def test_interpolate_between_two_neighbours(self):
        scores = torch.tensor([[0.0, 1.0, 3.0]]).expand(4, 3)
        positions = torch.tensor([[0.0, 0.5, 1.0, 1.5], [1.75, 2.0, 0.25, 0.0], [1.0] * 4, [2.0] * 4])
        expected = torch.tensor([[0.0, 0.5, 1.0, 2.0], [2.5, 3.0, 0.25, 0.0], [1.0] * 4, [3.0] * 4])
        torch.testing.assert_close(reference.interpolate(scores, positions), expected)

    def test_two_patches(self):
        """Keys of 0 give gates 0.5, so positions 1 and 0.5 along the row and 0.5 along each column of one patch."""
        query = torch.tensor([0.0, 1.0]).reshape(1, 1, 2, 1)
        key = torch.zeros(1, 1, 2, 1)
        table = torch.tensor([[0.0], [1.0], [3.0]])
        bias = sape2_bias(query, key, key, table, table, grid=(1, 2), scale=1.0)
        distance = math.hypot(1.0, 0.5) + 0.5
        torch.testing.assert_close(bias, torch.tensor([[[[0.0, distance], [distance, 0.0]]]]))

    def test_whole_positions_have_a_gradient(self):
        """The embedding between 1 and 2 rises by 2, so does the score at position 1, and at the last position 2."""
        positions = torch.tensor([[1.0, 2.0]], requires_grad=True)
        reference.interpolate(torch.tensor([[0.0, 1.0, 3.0]]), positions).sum().backward()
        torch.testing.assert_close(positions.grad, torch.tensor([[2.0, 2.0]]))

    @pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
    def test_what_is_not_finite_spreads_like_in_plain_attention(self, value):
        """One bad query spoils the pairs of its own patch and those of no other."""
        query, key, _, rows, columns = random_inputs((3, 4), heads=1, batch=1, dtype=torch.float32)
        query[0, 0, 5, 0] = value
        bias = sape2_bias(query, key, key, rows, columns, (3, 4), 0.3)
        others = [i for i in range(12) if i != 5]
        assert not bias[0, 0, 5, others].isfinite().any()
        assert bias[0, 0, others][:, others].isfinite().all()

    def test_unit_gates_make_plain_distances(self):
        positions = reference.soft_positions(reference.unit_gates(torch.zeros(5, 3)), num_positions=4)
        torch.testing.assert_close(positions, torch.tensor([3.0, 3.0, 3.0, 2.0, 1.0]).expand(5, 5))


class TestProperties:
    @settings(max_examples=25, deadline=None)
    @given(
        grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
        target=st.sampled_from(['k', 'q', 'qk']),
        num_positions=st.integers(2, 12),
        seed=st.integers(0, 1000),
    )
    def test_symmetric_never_negative_zero_diagonal(self, grid, target, num_positions, seed):
        query, key, _, rows, columns = random_inputs(grid, num_positions=num_positions, dtype=torch.float32, seed=seed)
        bias = sape2_bias(query, key, key, rows, columns, grid, 0.3, target)
        assert torch.equal(bias, bias.transpose(-2, -1))
        assert (bias >= 0).all()
        assert (bias.diagonal(dim1=-2, dim2=-1) == 0).all()

    @settings(max_examples=15, deadline=None)
    @given(grid=st.tuples(st.integers(1, 8), st.integers(1, 8)), seed=st.integers(0, 1000))
    def test_transposed_grid_swaps_the_axes(self, grid, seed):
        query, key, _, rows, columns = random_inputs(grid, seed=seed)
        order = torch.arange(grid[0] * grid[1]).reshape(grid).t().flatten()
        bias = sape2_bias(query, key, key, rows, columns, grid, 0.3)
        transposed = sape2_bias(
            query[:, :, order], key[:, :, order], key[:, :, order], columns, rows, (grid[1], grid[0]), 0.3
        )
        torch.testing.assert_close(transposed, bias[:, :, order][..., order])

    def test_shape_of_the_grid_matters(self):
        query, key, _, rows, columns = random_inputs((3, 4))
        wide = sape2_bias(query, key, key, rows, columns, (3, 4), 0.3)
        assert not torch.allclose(wide, sape2_bias(query, key, key, rows, columns, (4, 3), 0.3))

    def test_axes_add_up(self):
        query, key, _, rows, columns = random_inputs((7, 9))
        both, x, y = (
            sape2_bias(query, key, key, r, c, (7, 9), 0.3) for r, c in ((rows, columns), (rows, None), (None, columns))
        )
        torch.testing.assert_close(both, x + y)

    def test_both_targets_add_up(self):
        query, key, _, rows, columns = random_inputs((7, 9))
        k, q, both = (sape2_bias(query, key, key, rows, columns, (7, 9), 0.3, target) for target in ('k', 'q', 'qk'))
        torch.testing.assert_close(both, k + q)

    def test_reference_grid_scales_each_axis(self):
        query, key, _, rows, columns = random_inputs((3, 12))
        scaled = sape2_bias(query, key, key, rows, columns, (3, 12), 0.3, reference_grid=torch.tensor([27, 3]))
        x, y = (sape2_bias(query, key, key, r, c, (3, 12), 0.3) for r, c in ((rows, None), (None, columns)))
        torch.testing.assert_close(scaled, 0.5 * x + 3.0 * y)

    def test_no_tensor_of_patches_by_width_by_channels(self):
        class Largest(TorchDispatchMode):
            numel = 0

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                if isinstance(out, torch.Tensor):
                    self.numel = max(self.numel, out.numel())
                return out

        query, key, _, rows, columns = random_inputs((5, 6), heads=1, dim=256, batch=1)
        with Largest() as largest:
            sape2_bias(query, key, key, rows, columns, (5, 6), 0.1)
        assert largest.numel <= 30 * 256


@pytest.mark.parametrize('grid', GRIDS, ids=str)
@pytest.mark.parametrize('target', ['k', 'q', 'qk'])
@pytest.mark.parametrize('gate_source', ['key', 'value', 'none'])
def test_matches_the_slow_loop(grid, target, gate_source):
    if grid == (14, 14) and (target, gate_source) != ('k', 'key'):
        grid = (4, 6)
    query, key, value, rows, columns = random_inputs(grid, heads=1, batch=1)
    gate_key = {'key': key, 'value': value, 'none': None}[gate_source]
    bias = sape2_bias(query, key, gate_key, rows, columns, grid, 0.3, target)
    expected = slow_bias(
        query[0, 0], key[0, 0], None if gate_key is None else gate_key[0, 0], rows, columns, grid, 0.3, target
    )
    torch.testing.assert_close(bias[0, 0], expected, rtol=1e-12, atol=1e-12)


class TestGradients:
    @pytest.mark.parametrize('grid', [(3, 4), (1, 5), (2, 2)], ids=str)
    @pytest.mark.parametrize('target', ['k', 'q', 'qk'])
    def test_every_gradient(self, grid, target):
        inputs = [x.requires_grad_() for x in random_inputs(grid, heads=1, dim=4, batch=1)]

        def off_diagonal(query, key, value, rows, columns):
            bias = sape2_bias(query, key, value, rows, columns, grid, 0.3, target)
            return bias[..., ~torch.eye(bias.shape[-1], dtype=torch.bool)]

        assert torch.autograd.gradcheck(off_diagonal, inputs)

    def test_identical_patches_have_zero_distance_and_zero_gradient(self):
        query, key, _, rows, columns = random_inputs((1, 4), batch=1, dtype=torch.float32)
        inputs = [query[:, :, :1].expand(-1, -1, 4, -1), key[:, :, :1].expand(-1, -1, 4, -1), rows, columns]
        inputs = [x.clone().requires_grad_() for x in inputs]
        bias = sape2_bias(inputs[0], inputs[1], inputs[1], inputs[2], inputs[3], (1, 4), 0.3)
        assert (bias == 0).all()
        bias.sum().backward()
        assert all((x.grad == 0).all() for x in inputs)


class TestPrecision:
    @pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_bias_has_the_dtype_of_the_query(self, dtype):
        query, key, _, rows, columns = (x.to(dtype) for x in random_inputs((7, 9), dtype=torch.float32))
        bias = sape2_bias(query, key, key, rows, columns, (7, 9), 0.3)
        assert bias.dtype == dtype
        exact = sape2_bias(*(x.double() for x in (query, key, key, rows, columns)), (7, 9), 0.3)
        tolerance = {torch.float16: 5e-3, torch.bfloat16: 4e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
        assert (bias.double() - exact).abs().max() <= tolerance * exact.max()

    def test_positions_stay_float32_under_autocast(self):
        """In bfloat16 the sum of 300 gates of 0.5 would stop at a power of two, far from 150."""
        with torch.autocast('cpu', torch.bfloat16):
            gates = reference.semantic_gates(torch.zeros(300, 2), torch.ones(300, 2), 1.0)
            positions = reference.soft_positions(gates, num_positions=1000)
        assert positions.dtype == torch.float32
        assert (positions[:, 0] == 150.0).all()

    def test_distances_stay_exact_under_autocast(self):
        points = 100 + torch.randn(2, 40, 5, generator=torch.Generator().manual_seed(0))
        with torch.autocast('cpu', torch.bfloat16):
            distances = reference.pairwise_distances(points)
        torch.testing.assert_close(distances, torch.linalg.vector_norm(points[:, :, None] - points[:, None], dim=-1))
        assert (distances.diagonal(dim1=-2, dim2=-1) == 0).all()


class TestDistancesFromProducts:
    """The form that exporters without cdist get."""

    @pytest.mark.parametrize('count', [1, 5, 25, 26, 63, 196])
    def test_close_to_exact_and_zero_on_the_diagonal(self, count):
        points = torch.randn(2, count, 14, generator=torch.Generator().manual_seed(0))
        distances = reference.pairwise_distances_from_products(points)
        torch.testing.assert_close(distances, reference.pairwise_distances(points), rtol=1e-4, atol=1e-3)
        assert (distances.diagonal(dim1=-2, dim2=-1) == 0).all()

    def test_equal_points_have_zero_distance_and_finite_gradient(self):
        points = torch.randn(1, 1, 14, generator=torch.Generator().manual_seed(0)).expand(1, 30, 14)
        points = points.clone().requires_grad_()
        distances = reference.pairwise_distances_from_products(points)
        assert (distances == 0).all()
        distances.sum().backward()
        assert (points.grad == 0).all()
