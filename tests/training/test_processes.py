"""One process agrees with itself; what several tell each other is tested in commands/test_train.py."""

import logging
import os
import random
import signal

import numpy as np
import pytest
import torch

from timm_sape2.training.console import set_up_logging
from timm_sape2.training.processes import (
    SignalCatcher,
    all_random_states,
    any_process,
    get_random_state,
    mean_loss_and_stop,
    seed_epoch,
    set_random_state,
)


@pytest.mark.parametrize('stop', [True, False])
def test_loss_and_stop_are_its_own(stop):
    assert mean_loss_and_stop(torch.tensor(2.5), stop, 1) == (2.5, stop)
    assert any_process(stop, 1, torch.device('cpu')) is stop


def test_random_states_continue_where_they_were():
    (state,) = all_random_states(1)
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


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_signal_is_noted(number):
    handler = signal.getsignal(number)
    with SignalCatcher() as signals:
        assert not signals.caught
        os.kill(os.getpid(), number)
        assert signals.caught
        assert signals.exit_code == 128 + number
    assert signal.getsignal(number) == handler


def test_second_ctrl_c_stops_at_once():
    with pytest.raises(KeyboardInterrupt), SignalCatcher():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_signal_to_another_process_counts_as_sigterm():
    assert SignalCatcher().exit_code == 143


def draw():
    return random.random(), np.random.rand(), random.gauss(0, 1), np.random.randn(), torch.rand(()).item()


def draw_in(seed, epoch, rank):
    seed_epoch(seed, epoch, rank)
    return draw()


def test_every_epoch_of_every_process_has_its_own_numbers():
    """Not so with the sum of the three, which gives rank 1 of epoch 0 the numbers of rank 0 of epoch 1."""
    assert draw_in(42, 3, 1) == draw_in(42, 3, 1)
    places = [(seed, epoch, rank) for seed in range(3) for epoch in range(3) for rank in range(3)]
    assert len({draw_in(*place) for place in places}) == len(places)


def test_state_survives_a_checkpoint(tmp_path):
    seed_epoch(0, 0, 0)
    draw()
    torch.save(get_random_state(), tmp_path / 'state.pth')
    expected = [draw(), draw()]
    seed_epoch(1, 1, 1)
    set_random_state(torch.load(tmp_path / 'state.pth', weights_only=True))
    assert [draw(), draw()] == expected
