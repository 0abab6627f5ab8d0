"""The grid of heads has the right map in the right panel."""

import numpy as np
import pytest

from timm_sape2.studies.bias_maps.drawing import mosaic
from timm_sape2.studies.bias_maps.head_grid import HeadMaps, draw_head_grid

GRID = (3, 4)


def head_maps(heads, title='a', factor=1.0):
    """Heads with biases of their own and a black image."""
    random = np.random.default_rng(heads)
    biases = [(f'head {head}', factor * random.random((*GRID, *GRID))) for head in range(heads)]
    return HeadMaps(title, np.zeros((6, 8, 3)), biases)


def panels(figure):
    """All panels but the colour bar, by line and column."""
    places = {axes: axes.get_subplotspec() for axes in figure.axes[:-1] if axes.axison}
    return {(place.rowspan.start, place.colspan.start): axes for axes, place in places.items()}


def test_small_maps_of_all_query_patches():
    maps = [head_maps(2, 'a'), head_maps(2, 'b', factor=3.0)]
    found = panels(draw_head_grid(maps))
    titles = [['a', 'head 0', 'head 1'], ['b', 'head 0', 'head 1']]
    assert {place: axes.get_title() for place, axes in found.items()} == {
        (line, column): titles[line][column] for line in (0, 1) for column in (0, 1, 2)
    }
    for line in (0, 1):
        for head in (0, 1):
            drawn = found[line, head + 1].images[0]
            np.testing.assert_array_equal(drawn.get_array().filled(np.nan), mosaic(maps[line].heads[head][1]))
            assert drawn.get_clim() == (0, max(bias.max() for _, bias in maps[1].heads)), 'one scale for all'


def test_a_query_patch():
    maps = head_maps(2)
    found = panels(draw_head_grid([maps], [(2, 1), (0, 3)]))
    assert len(found) == 6
    for line, patch in enumerate([(2, 1), (0, 3)]):
        assert found[line, 0].get_xlabel() == f'from row {patch[0]}, column {patch[1]}'
        for head in (0, 1):
            np.testing.assert_array_equal(found[line, head + 1].images[0].get_array(), maps.heads[head][1][patch])
        for column in range(3):
            (frame,) = found[line, column].patches
            assert frame.get_center() == pytest.approx(patch[::-1])


@pytest.mark.parametrize(('heads', 'lines', 'columns'), [(1, 1, 1), (6, 1, 6), (8, 2, 6), (12, 2, 6)])
def test_lines_of_six(heads, lines, columns):
    found = panels(draw_head_grid([head_maps(heads)]))
    places = [(head // columns, 1 + head % columns) for head in range(heads)]
    assert {place: axes.get_title() for place, axes in found.items()} == {
        (0, 0): 'a',
        **{place: f'head {head}' for head, place in enumerate(places)},
    }
    assert max(line for line, _ in found) == lines - 1


def test_it_is_compact():
    """All twelve heads of ViT-B on a screen, with a pixel or more for every number of the small maps."""
    bias = np.zeros((14, 14, 14, 14))
    maps = HeadMaps('photos/deer.png\nblock 11', np.zeros((224, 224, 3)), [(f'head {i}', bias) for i in range(12)])
    figure = draw_head_grid([maps])
    width, height = figure.get_size_inches() * 120
    assert width < 2000 and height < 800
    figure.draw_without_rendering()
    assert panels(figure)[1, 6].get_window_extent().width / figure.dpi * 120 > 14 * 15


def test_colours_in_words():
    positive, negative = draw_head_grid([head_maps(2)]), draw_head_grid([head_maps(2, factor=-1.0)])
    assert positive.axes[-1].get_ylabel().endswith('white = 0, dark = more attention')
    assert negative.axes[-1].get_ylabel().endswith('white = 0, red = more, blue = less')


def test_text_does_not_overlap():
    maps = [head_maps(4, 'deer/00022.png\nblock 4')] * 2
    for patches in ([], [(0, 0)]):
        figure = draw_head_grid(maps, patches)
        figure.draw_without_rendering()
        texts = [text for axes in panels(figure).values() for text in (axes.title, axes.xaxis.label) if text.get_text()]
        boxes = [text.get_window_extent() for text in texts]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])


def test_more_than_a_picture_can_hold():
    with pytest.raises(ValueError, match='300 grids of heads do not fit into one picture'):
        draw_head_grid([head_maps(2)] * 300)
