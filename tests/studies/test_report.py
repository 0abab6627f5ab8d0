"""Tables and plots of results."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from timm_sape2.studies.report import dot_plot, grouped, markdown_table, mean_and_deviation, plus_minus, three_digits


def test_markdown_table():
    table = markdown_table([{'name': 'a', 'value': 1}, {'name': 'b', 'value': 2}])
    assert table == '| name | value |\n| --- | --- |\n| a | 1 |\n| b | 2 |'


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


@pytest.mark.parametrize('values', [[50.0, 51.0], [50.0], [math.nan]])
def test_lines_have_names_and_series_colours(tmp_path, values):
    figure = dot_plot({'first': {'a': values, 'b': [40.0]}, 'second': {'a': values}}, 'top-1 in %')
    figure.savefig(tmp_path / 'dots.png')
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ['a', 'b']
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ['first', 'second']
    assert axes.get_xlabel() == 'top-1 in %'
    assert sorted(len(line.get_xdata()) for line in axes.lines if line.get_marker() == '.') == sorted(
        [len(values)] * 2 + [1]
    )


@pytest.mark.parametrize(
    ('value', 'expected'),
    [(0, '0'), (1, '1'), (0.012345, '0.0123'), (999.6, '1000'), (2914.2, '2910'), (123456, '123000')],
)
def test_three_digits(value, expected):
    assert three_digits(value) == expected
