"""Progress is a bar on a terminal, lines elsewhere, and nothing from the other processes."""

import io
import logging
import re
import time

import pytest

from timm_sape2.trained.checkpoint import ResumePoint
from timm_sape2.training.progress import EpochProgress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def watch(stream, enabled=True, point=None, seconds=0):
    """Go through 4 batches of 8 images, of the first of two epochs."""
    point = point or ResumePoint()
    with EpochProgress(point, 2, 4, 8, log_interval=2, enabled=enabled, stream=stream) as progress:
        while point.num_batches < 4:
            time.sleep(seconds)
            point.add_batch(0.5, 8)
            progress.update(point)


def test_lines(caplog):
    stream = io.StringIO()
    with caplog.at_level(logging.INFO):
        watch(stream)
    assert stream.getvalue() == ''
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert re.fullmatch(r'Epoch 0, batch 2/4, \d+ images/s, loss 0.5000, run ends in 0:00:00', lines[0])


def test_bar(caplog):
    stream = Terminal()
    with caplog.at_level(logging.INFO):
        watch(stream, seconds=0.11)
    assert not caplog.records
    assert re.search(r'Epoch 0:.*24/32.* images/s.*loss 0.5000, run ends in 0:00:01', stream.getvalue())


def test_resumed_epoch_begins_where_it_was_left(caplog):
    with caplog.at_level(logging.INFO):
        watch(io.StringIO(), point=ResumePoint(num_batches=3, loss_sum=12.0, loss_count=24))
    assert [record.getMessage()[:18] for record in caplog.records] == ['Epoch 0, batch 4/4']


@pytest.mark.parametrize('stream', [io.StringIO(), Terminal()])
def test_silence(stream, caplog):
    with caplog.at_level(logging.INFO):
        watch(stream, enabled=False)
    assert not caplog.records and stream.getvalue() == ''
