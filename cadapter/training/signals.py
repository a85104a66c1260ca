"""Signals as requests: SIGTERM and SIGINT ask a run to save and stop, SIGUSR1 to save and go on."""

from __future__ import annotations

import signal
from types import FrameType

REQUESTS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Remembers which signals came; the trainer looks after every step. A second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.stop = 0
        self.save = False
        for number in REQUESTS:
            signal.signal(number, self._received)

    def _received(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.save = True
        elif number == signal.SIGINT and self.stop == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            self.stop = number
