"""Which classes are confused."""

import numpy as np
import pytest
import torch

from timm_sape2.trained.confusion import Confusion

# Three cats, two of them taken for dogs; two dogs, one of them taken for an eel; no eels; a fox that is none.
TARGETS = torch.tensor([0, 0, 0, 1, 1, 3])
TAKEN_FOR = torch.tensor([0, 1, 1, 1, 2, 0])
COUNTS = [[1, 2, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]


@pytest.fixture
def confusion():
    counted = Confusion(['cat', 'dog', 'eel', 'fox'])
    logits = torch.nn.functional.one_hot(TAKEN_FOR, 4).float()
    for part in (slice(0, 4), slice(4, 6), slice(6, 6)):
        counted.add(logits[part], TARGETS[part])
    return counted


def test_counts_by_hand(confusion):
    assert confusion.counts.tolist() == COUNTS


def test_rows_by_hand(confusion):
    rows = confusion.per_class()
    assert list(rows[0]) == ['index', 'name', 'images', 'top1', 'precision', 'mistaken_for', 'mistaken']
    assert [tuple(row.values()) for row in rows] == [
        (0, 'cat', 3, 33.3333, 50.0, 'dog', 2),
        (1, 'dog', 2, 50.0, 33.3333, 'eel', 1),
        (2, 'eel', 0, None, 0.0, None, 0),
        (3, 'fox', 1, 0.0, None, 'cat', 1),
    ]


def test_table_has_the_worst_first_and_what_is_not_there_last(confusion):
    assert confusion.table().splitlines() == [
        'class  images  top-1    precision  most often mistaken for',
        'fox    1       0.00 %   -          cat (1)',
        'cat    3       33.33 %  50.00 %    dog (2)',
        'dog    2       50.00 %  33.33 %    eel (1)',
        'eel    0       -        0.00 %',
    ]


def test_equal_logits_count_as_top1_does():
    """Where several logits are the highest, the same one is taken as timm's top-1 takes."""
    logits = torch.zeros(8, 12)
    targets = logits.topk(5).indices[:, 0]
    counted = Confusion(list('abcdefghijkl'))
    counted.add(logits, targets)
    assert int(counted.counts.trace()) == 8


class TestPicture:
    def test_shares_and_numbers(self, confusion):
        figure = confusion.figure()
        figure.canvas.draw()
        axes, bar = figure.axes
        shares = np.asarray(axes.images[0].get_array())
        np.testing.assert_allclose(shares[0], [100 / 3, 200 / 3, 0, 0], rtol=1e-6)
        assert (shares[2] == 0).all() and axes.images[0].get_clim() == (0, 100)
        numbers = {(round(text.get_position()[1]), round(text.get_position()[0])): text for text in axes.texts}
        assert {place: text.get_text() for place, text in numbers.items()} == {
            (row, column): str(count) for row, line in enumerate(COUNTS) for column, count in enumerate(line) if count
        }
        assert (numbers[0, 1].get_color(), numbers[0, 0].get_color()) == ('white', 'black')
        names = ['cat', 'dog', 'eel', 'fox']
        assert [label.get_text() for label in axes.get_yticklabels()] == names
        assert [label.get_text() for label in axes.get_xticklabels()] == names
        assert (axes.get_ylabel(), axes.get_xlabel()) == ('class of the image', 'taken for')
        assert bar.get_ylabel() == '% of the images of the class'

    @pytest.mark.parametrize(('classes', 'has_names'), [(21, True), (61, False), (1000, False)])
    def test_many_classes_have_no_numbers_and_then_no_names(self, classes, has_names):
        counted = Confusion([f'class {index}' for index in range(classes)])
        counted.add(torch.eye(classes), torch.arange(classes))
        figure = counted.figure()
        figure.canvas.draw()
        axes = figure.axes[0]
        assert not axes.texts and max(figure.get_size_inches()) < 15
        assert ('class 20' in [label.get_text() for label in axes.get_yticklabels()]) == has_names
