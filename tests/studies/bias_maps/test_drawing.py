"""Pictures of attention biases show the right number at the right place."""

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import Normalize

from timm_sape2.studies.bias_maps.drawing import BiasMap, color_scale, draw_bias_maps, mosaic


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
        scale = color_scale([np.full((1, 1, 1, 1), value) for value in (lowest, 2.0)])
        colors = matplotlib.colormaps[scale['cmap']]
        norm = Normalize(scale['vmin'], scale['vmax'])
        assert colors(norm(0.0))[:3] == pytest.approx((1, 1, 1), abs=0.01)
        assert (scale['vmin'], scale['vmax']) == ((-3, 3) if lowest else (0, 2))

    def test_a_bias_of_zero_has_a_scale(self):
        assert color_scale([np.zeros((1, 1, 1, 1))])['vmax'] > 0

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
