"""Tables and plots of results."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from timm_sape2._figure import new_figure
from timm_sape2.positions import ENCODINGS
from timm_sape2.studies.report import (
    COLORS,
    draw_dots,
    draw_line,
    encoding_color,
    encoding_place,
    grouped,
    line_styles,
    mean_and_deviation,
    models_in_words,
    plus_minus,
    spread_over_seeds,
    three_digits,
    title_of_lines,
)


def test_groups_keep_the_order():
    rows = [{'kind': 'b', 'n': 1}, {'kind': 'a', 'n': 2}, {'kind': 'b', 'n': 3}]
    assert grouped(rows, 'kind') == {('b',): [rows[0], rows[2]], ('a',): [rows[1]]}


def test_mean_and_sample_deviation():
    """Of 1, 2 and 6: mean 3, deviation sqrt((4 + 1 + 9) / 2)."""
    assert mean_and_deviation([1, 2, 6]) == (3, pytest.approx(math.sqrt(7)))
    assert plus_minus([1, 2, 6]) == '3.00 ± 2.65'


def test_one_value_has_no_deviation():
    assert plus_minus([1.26], digits=1) == '1.3'


def test_a_run_that_diverged_shows():
    assert plus_minus([1.0, math.nan]) == 'nan'


@given(st.lists(st.floats(-1e6, 1e6), min_size=2))
def test_mean_and_deviation_are_those_of_the_library(values):
    mean, deviation = mean_and_deviation(values)
    assert mean == pytest.approx(statistics.fmean(values), abs=1e-6)
    assert deviation == statistics.stdev(values)


def test_every_encoding_has_a_colour_of_its_own():
    assert COLORS.keys() == {*ENCODINGS, 'learned+sape2'}
    assert len(set(COLORS.values())) == len(COLORS)


def test_the_colour_is_the_same_with_options_and_implementations():
    for name in ('sape2:reference', 'sape2(num_positions=4)', 'sape2(axes=x, target=q):compiled', 'cpe+sape2'):
        assert encoding_color(name) == COLORS['sape2']
    assert encoding_color('sape2+learned') == encoding_color('learned+sape2:reference') == COLORS['learned+sape2']
    assert encoding_color('vit_small_patch16_224') == encoding_color('vit_small_patch16_224')


def test_encodings_with_options_stand_beside_those_without():
    names = ['learned+rope', 'sape2', 'rope(jitter=2)', 'learned']
    assert sorted(names, key=encoding_place) == ['learned', 'rope(jitter=2)', 'sape2', 'learned+rope']


def test_lines_of_one_colour_have_other_dashes_and_markers():
    first, other, second = line_styles(['sape2', 'rope', 'sape2(axes=x)'])
    assert first['color'] == second['color'] != other['color']
    assert (first['linestyle'], first['marker']) == (other['linestyle'], other['marker']) == ('-', 'o')
    assert (second['linestyle'], second['marker']) == ('--', 's')


def test_legends_name_layer_scale_where_it_differs():
    assert models_in_words([('rope', 'off'), ('sape2', 'off')]) == {('rope', 'off'): 'rope', ('sape2', 'off'): 'sape2'}
    both = models_in_words([('rope', 'off', None), ('rope', 0.0001, 'grid')])
    assert [*both.values()] == [
        'rope, without LayerScale',
        'rope, LayerScale from 0.0001, distances scaled by the grid',
    ]


def test_titles_explain_bands_where_there_are_some():
    assert title_of_lines('Why?', [{'seed': 0}, {'seed': 0}]) == 'Why?'
    assert title_of_lines('Why?', [{'seed': 0}, {'seed': 1}]).startswith('Why? (mean over seeds, band:')


@pytest.mark.parametrize('values', [[50.0, 51.0], [50.0], [math.nan]])
def test_dots_have_names_series_and_the_colours_of_encodings(tmp_path, values):
    figure = new_figure()
    axes = figure.subplots()
    several = spread_over_seeds(values)
    draw_dots(axes, {'first': {'rope': several, 'cope': spread_over_seeds([40.0])}, 'second': {'rope': several}})
    figure.savefig(tmp_path / 'dots.png')
    assert [label.get_text() for label in axes.get_yticklabels()] == ['rope', 'cope']
    assert axes.get_legend_handles_labels()[1] == ['first', 'second']
    dots = [line for line in axes.lines if line.get_marker() in ('o', 's') and len(line.get_xdata())]
    assert [(line.get_color(), line.get_marker(), len(line.get_xdata())) for line in dots] == [
        (COLORS['rope'], 'o', len(values)),
        (COLORS['cope'], 'o', 1),
        (COLORS['rope'], 's', len(values)),
    ]


def test_a_line_shows_the_spread_over_seeds():
    """Of 1, 2 and 6 the mean is 3 and the deviation the root of 7."""
    axes = new_figure().subplots()
    draw_line(axes, [0, 1], [spread_over_seeds([1, 2, 6]), spread_over_seeds([4])], 'a', {'color': 'red'})
    (line,) = axes.lines
    band, strokes = axes.collections
    assert list(line.get_ydata()) == [3, 4]
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((3 - math.sqrt(7), 3 + math.sqrt(7)))
    assert strokes.get_segments()[0][:, 1].tolist() == pytest.approx([3 - math.sqrt(7), 3 + math.sqrt(7)])


@pytest.mark.parametrize(
    ('value', 'expected'),
    [(0, '0'), (1, '1'), (0.012345, '0.0123'), (999.6, '1000'), (2914.2, '2910'), (123456, '123000')],
)
def test_three_digits(value, expected):
    assert three_digits(value) == expected
