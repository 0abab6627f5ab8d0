"""One process agrees with itself; what several tell each other is tested in test_train.py, under torchrun."""

import argparse
import logging

import pytest
import torch

from timm_sape2.training.processes import all_random_states, any_process, mean_loss_and_stop, set_up_logging
from timm_sape2.training.randomness import set_random_state

ALONE = argparse.Namespace(distributed=False, world_size=1)


@pytest.mark.parametrize('stop', [True, False])
def test_loss_and_stop_are_its_own(stop):
    assert mean_loss_and_stop(torch.tensor(2.5), stop, ALONE) == (2.5, stop)
    assert any_process(stop, ALONE, torch.device('cpu')) is stop


def test_random_states_continue_where_they_were():
    (state,) = all_random_states(ALONE)
    first = torch.rand(3)
    set_random_state(state)
    assert torch.equal(torch.rand(3), first)


@pytest.fixture
def levels():
    """Put the levels of the loggers back."""
    loggers = [logging.getLogger(name) for name in ('timm_sape2', 'timm.models')]
    before = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)


@pytest.mark.parametrize(('rank', 'level'), [('0', logging.INFO), ('1', logging.WARNING)])
def test_only_the_first_process_tells_what_it_does(rank, level, levels, monkeypatch):
    for name, value in {'RANK': rank, 'LOCAL_RANK': rank, 'WORLD_SIZE': '2'}.items():
        monkeypatch.setenv(name, value)
    set_up_logging()
    assert logging.getLogger('timm_sape2').level == level
