"""Signals as requests: SIGTERM, SIGINT and SIGHUP ask a run to save and stop, SIGUSR1 to save and go on."""

from __future__ import annotations

import signal
from types import FrameType

from cadapter.errors import Stopped

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""The signals that ask to stop; where several come at once, the first of these counts."""


def heeded() -> list[signal.Signals]:
    """The signals that ask to stop, without SIGHUP where it is ignored already: nohup says that a run goes on."""
    return [each for each in STOPS if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]


class StopRequest(KeyboardInterrupt):
    """A signal to stop came before there was anything to save.

    It may come within anybody's code, which takes what is an :class:`Exception` for an error of its own.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def as_error(self) -> Stopped:
        """What it means to the user."""
        return Stopped("Stopped before the first step; nothing was trained.", self.number)


class StopSignals:
    """Remembers which signals came; the trainer looks after every step. A second SIGINT interrupts at once.

    Until :meth:`from_now_on_save` is called there is nothing to save: a signal to stop raises :class:`StopRequest`.
    """

    def __init__(self) -> None:
        self.stop = 0
        self.save = False
        self._training = False
        for number in (*heeded(), signal.SIGUSR1):
            signal.signal(number, self._received)

    def from_now_on_save(self) -> None:
        """Training begins.

        Raises:
            StopRequest: a signal came before, and somebody's code has swallowed what it raised.
        """
        self._training = True
        if self.stop:
            raise StopRequest(self.stop)

    def _received(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.save = True
        elif self._training and number == signal.SIGINT and self.stop == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            self.stop = number
            if not self._training:
                raise StopRequest(number)
