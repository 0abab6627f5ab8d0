"""curves.png is drawn from summary.csv, if matplotlib is there."""

import logging
import sys

import pytest
from PIL import Image

from timm_sape2.training import curves
from timm_sape2.training.run_folder import add_to_summary


@pytest.fixture
def folder(tmp_path):
    """Folder of a run with a summary of three epochs."""
    for epoch in range(3):
        evaluation = {'loss': 1 / (epoch + 1), 'top1': 20.0 * epoch, 'top5': 30.0 * epoch}
        add_to_summary(tmp_path, epoch, {'loss': 2 / (epoch + 1)}, evaluation, lr=0.1)
    return tmp_path


def test_curves_are_a_picture(folder):
    curves.draw_curves(folder)
    assert Image.open(folder / 'curves.png').size == (1080, 480)
    assert {path.name for path in folder.iterdir()} == {'summary.csv', 'curves.png'}


def test_without_matplotlib_the_extra_is_named_once(folder, monkeypatch, caplog):
    curves._figure_class.cache_clear()
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    with caplog.at_level(logging.WARNING):
        curves.draw_curves(folder)
        curves.draw_curves(folder)
    curves._figure_class.cache_clear()
    assert caplog.text.count("pip install 'timm_sape2[demo]'") == 1
    assert not (folder / 'curves.png').exists()
