"""Signals are noted while a run trains, and act as ever before and after."""

import os
import signal

import pytest

from timm_sape2.training.interrupt import SignalCatcher


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
