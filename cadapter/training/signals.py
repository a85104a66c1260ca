"""Signals as requests: SIGTERM and SIGINT ask a run to save and stop, SIGUSR1 to save and go on."""

from __future__ import annotations

import signal
from types import FrameType

from cadapter.errors import Stopped

REQUESTS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Remembers which signals came; the trainer looks after every step. A second SIGINT interrupts at once.

    Until :meth:`from_now_on_save` is called there is nothing to save: a signal to stop raises :class:`Stopped`.
    """

    def __init__(self) -> None:
        self.stop = 0
        self.save = False
        self._training = False
        for number in REQUESTS:
            signal.signal(number, self._received)

    def from_now_on_save(self) -> None:
        """Training begins."""
        self._training = True

    def _received(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.save = True
        elif not self._training:
            raise Stopped("Stopped before the first step; nothing was trained.", number)
        elif number == signal.SIGINT and self.stop == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            self.stop = number
