"""Stopping a run at a clean place when SIGTERM or Ctrl-C arrives."""

import signal
from types import FrameType
from typing import Any


class SignalCatcher:
    """While active, remembers SIGTERM and Ctrl-C instead of dying of them; a second Ctrl-C does end the process."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._previous: dict[int, Any] = {}

    @property
    def caught(self) -> bool:
        """Whether a signal came."""
        return self.number is not None

    @property
    def exit_code(self) -> int:
        """The exit code of a process that a signal ended; that of SIGTERM if it came to another process."""
        return 128 + (self.number or signal.SIGTERM)

    def __enter__(self) -> 'SignalCatcher':
        self._previous = {number: signal.signal(number, self._catch) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
