"""Maps of attention biases show the right number at the right place."""

import matplotlib
import numpy as np
import pytest
import timm
import torch
from matplotlib.colors import Normalize
from torch import nn

from timm_sape2.positions import ENCODINGS, PositionEncoding, Positions
from timm_sape2.studies.bias_maps import (
    BiasMap,
    attention_biases,
    blocks_with_bias,
    color_scale,
    draw_bias_maps,
    mosaic,
    trained_blocks,
)
from timm_sape2.studies.variants import use_reference


class Numbered(PositionEncoding):
    """The bias from patch i to patch j is N * i + j."""

    place = 'block'

    def __init__(self, host, *, device=None, dtype=None):
        super().__init__()

    def attention_bias(self, query, key, value, grid, shared=None):
        length = query.shape[2]
        return torch.arange(float(length**2)).reshape(length, length)


class NumberedWithPrefix(Numbered):
    """The bias from token i to token j, prefix tokens being the first, is (P + N) * i + j."""

    bias_has_prefix_tokens = True

    def attention_bias(self, query, key, value, grid, shared=None):
        length = grid[0] * grid[1] + 3
        return torch.arange(float(length**2)).reshape(1, 1, length, length)


@pytest.fixture(autouse=True)
def numbered(monkeypatch):
    monkeypatch.setitem(ENCODINGS, 'numbered', Numbered)
    monkeypatch.setitem(ENCODINGS, 'numbered-with-prefix', NumberedWithPrefix)


def vit(position, size, **kwargs):
    """A model with patches of 8, a class token and two registers."""
    sizes = dict(img_size=size, patch_size=8, embed_dim=32, depth=2, num_heads=2, reg_tokens=2)
    return timm.create_model('test_vit_sape2', position=position, **sizes, **kwargs).eval()


class TestBias:
    def test_by_hand(self):
        """On a 2x3 grid, the patch in row 1, column 0 is the fourth: 6 * 3 + 0, 1, ..., 5."""
        biases = attention_biases(vit('numbered', (16, 24)), torch.randn(1, 3, 16, 24))
        assert list(biases) == [0, 1]
        for bias in biases.values():
            assert bias.shape == (1, 2, 2, 3, 2, 3)
            for head in bias[0]:
                assert head[1, 0].tolist() == [[18, 19, 20], [21, 22, 23]]
                assert head[0, 2].tolist() == [[12, 13, 14], [15, 16, 17]]

    def test_by_hand_with_a_bias_of_prefix_tokens(self):
        """Three prefix tokens and six patches: the patch in row 1, column 0 is token 6, 9 * 6 + 3, ..., 8."""
        biases = attention_biases(vit('numbered-with-prefix', (16, 24)), torch.randn(1, 3, 16, 24), [1])
        assert list(biases) == [1]
        assert biases[1][0, 0, 1, 0].tolist() == [[57, 58, 59], [60, 61, 62]]

    @pytest.mark.parametrize('size', [(56, 72), (8, 40), (112, 112)])
    def test_map_of_a_query_is_its_row_of_the_bias(self, monkeypatch, size):
        used, position_bias = [], Positions.bias

        def spy(self, *inputs):
            used.append(position_bias(self, *inputs))
            return used[-1]

        monkeypatch.setattr(Positions, 'bias', spy)
        model, images = vit('learned+sape2', size), torch.randn(2, 3, *size)
        use_reference(model)
        with torch.inference_mode():
            model(images)
        in_model = used.copy()
        rows, columns = model.patch_embed.grid_size
        for block, maps in attention_biases(model, images).items():
            for row, column in {(0, 0), (rows - 1, 0), (rows // 2, columns // 2), (0, columns - 1)}:
                expected = in_model[block][:, :, 3 + row * columns + column, 3:]
                assert torch.equal(maps[:, :, row, column].flatten(2), expected)

    def test_joined_encodings_are_summed(self):
        images = torch.randn(1, 3, 16, 24)
        model = vit('sape2', (16, 24))
        together = vit('sape2+numbered', (16, 24))
        together.load_state_dict(model.state_dict())
        alone, both = (attention_biases(m, images, [0])[0] for m in (model, together))
        assert torch.equal(both, alone + torch.arange(36.0).reshape(2, 3, 2, 3))

    def test_models_without_a_bias(self):
        for model, problem in (
            (vit('learned', 16), r"position='learned' has no attention bias"),
            (timm.create_model('test_resnet'), 'the model has no exchangeable position encoding'),
        ):
            with pytest.raises(ValueError, match=rf'^{problem}; encodings with one: .*sape2.*numbered'):
                blocks_with_bias(model)

    def test_what_is_not_finite(self):
        model = vit('sape2', 16)
        nn.init.constant_(model.blocks[1].attn.position.sape2.row_table, torch.nan)
        with pytest.raises(ValueError, match='the bias of block 1 is not finite'):
            attention_biases(model, torch.randn(1, 3, 16, 16))


@pytest.mark.parametrize('global_pool', ['token', 'avg'])
@pytest.mark.parametrize('position', ['sape2', 'learned+sape2'])
def test_blocks_that_are_trained_are_those_with_a_gradient(global_pool, position):
    model = vit(position, 16, global_pool=global_pool)
    model(torch.randn(2, 3, 16, 16)).square().sum().backward()
    gradients = [block.attn.position.sape2.row_table.grad for block in model.blocks]
    assert trained_blocks(model) == [block for block, gradient in enumerate(gradients) if gradient.any()]


def test_a_bias_of_prefix_tokens_is_trained_in_the_last_block():
    assert trained_blocks(vit('numbered-with-prefix', 16)) == [0, 1]
    assert trained_blocks(vit('numbered', 16)) == [0]
    one_block = timm.create_model('test_vit_sape2', position='numbered', depth=1)
    assert trained_blocks(one_block) == [0], 'there is no other'


class TestPicture:
    def test_small_maps_by_hand(self):
        """One row of two patches: their maps [0 1] and [2 3] side by side, with a gap."""
        bias = np.arange(4.0).reshape(1, 2, 1, 2)
        np.testing.assert_array_equal(mosaic(bias), [[0, 1, np.nan, 2, 3]])

    def test_small_maps_stand_at_the_place_of_their_query(self):
        bias = np.random.default_rng(0).normal(size=(7, 9, 7, 9))
        picture = mosaic(bias)
        assert picture.shape == (55, 89)
        for row in range(7):
            for column in range(9):
                small = picture[row * 8 : row * 8 + 7, column * 10 : column * 10 + 9]
                np.testing.assert_array_equal(small, bias[row, column])
        assert np.isnan(picture).sum() == 55 * 89 - 63 * 63

    @pytest.mark.parametrize('lowest', [0.0, -3.0])
    def test_white_is_zero(self, lowest):
        maps = [numbers(np.full((1, 1, 1, 1), value)) for value in (lowest, 2.0)]
        scale = color_scale(maps)
        colors = matplotlib.colormaps[scale['cmap']]
        norm = Normalize(scale['vmin'], scale['vmax'])
        assert colors(norm(0.0))[:3] == pytest.approx((1, 1, 1), abs=0.01)
        assert (scale['vmin'], scale['vmax']) == ((-3, 3) if lowest else (0, 2))

    def test_a_bias_of_zero_has_a_scale(self):
        assert color_scale([numbers(np.zeros((1, 1, 1, 1)))])['vmax'] > 0

    @pytest.mark.parametrize('grid', [(7, 9), (1, 5), (5, 1), (14, 14)])
    def test_what_is_drawn(self, grid):
        """Two lines of image, small maps and an enlarged one, and a colour bar; all on one scale."""
        bias = np.arange(float((grid[0] * grid[1]) ** 2)).reshape(*grid, *grid)
        row, column = grid[0] - 1, 0
        figure = draw_bias_maps([numbers(bias, 'a'), numbers(bias / 2, 'b')], [(row, column)])
        figure.canvas.draw()
        axes = figure.axes
        titles = [ax.get_title() for ax in axes]
        query = f'query patch: row {row}, column 0'
        assert titles == ['a', 'every query patch', query, 'b', 'every query patch', query, '']
        assert 'white = 0' in axes[-1].get_ylabel()
        np.testing.assert_array_equal(axes[2].images[0].get_array(), bias[row, column])
        np.testing.assert_array_equal(axes[5].images[0].get_array(), bias[row, column] / 2)
        assert {axes[i].images[0].get_clim() for i in (1, 2, 4, 5)} == {(0.0, bias.max())}
        for ax in (axes[0], axes[2]):
            (frame,) = ax.patches
            assert (*frame.get_center(),) == (column, row)

    def test_text_does_not_overlap(self):
        bias = np.zeros((5, 1, 5, 1))
        figure = draw_bias_maps([numbers(bias, 'photos/deer.png\nblock 11, mean of 16 heads')] * 2, [(4, 0), (3, 0)])
        figure.canvas.draw()
        boxes = [ax.title.get_window_extent() for ax in figure.axes[:-1]]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])

    def test_more_than_a_picture_can_hold(self):
        with pytest.raises(ValueError, match='200 lines of maps do not fit into one picture'):
            draw_bias_maps([numbers(np.zeros((2, 2, 2, 2)))] * 200)


def numbers(bias, title=''):
    """A map with a black image."""
    return BiasMap(title, np.zeros((8, 8, 3)), bias)
