"""What each process of a job is doing, known to all of them; and the end of a job in which nothing moves any more.

A thread of each process writes its place (rank, stage, phase) into the store of the job, about once a second. So the
others can tell which process is gone or stands still, and what it was doing, which it cannot say itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from cadapter.errors import UsageError

BEAT = 1.0
"""Seconds from one sign of life to the next."""
BEATS = 3
"""A process that is silent for so many beats does not answer."""
ANSWER = 10.0
"""How many seconds the store, which rank 0 or torchrun holds, may take to answer."""

MINUTES = "CADAPTER_TIMEOUT"
DEFAULT_MINUTES = 30.0
PATIENT = 48.0
"""Times the limit: how long a phase may take in which whoever works cannot say that it moves on."""

T = TypeVar("T")


def limit_seconds() -> float:
    """Return the seconds after which a job in which nothing moves is ended, as CADAPTER_TIMEOUT says in minutes.

    Raises:
        UsageError: it is no positive number.
    """
    text = os.environ.get(MINUTES, str(DEFAULT_MINUTES))
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < float("inf"):
        raise UsageError(f"{MINUTES} = {text!r} in the environment is no number of minutes.")
    return 60 * minutes


@dataclass
class Seen:
    """A process as it shows itself.

    Attributes:
        rank, stage, stages: which it is; no stage (−1) before processes are laid out.
        phase: what it is doing.
        still: seconds for which it has not moved on.
        limit: seconds after which that is too long.
        beats: grows with each sign of life.
        answers: whether it gives signs of life.
    """

    rank: int
    stage: int = -1
    stages: int = 0
    phase: str = "start-up"
    still: float = 0.0
    limit: float = 0.0
    beats: int = 0
    answers: bool = True

    def __str__(self) -> str:
        stage = f" (stage {self.stage} of {self.stages})" if self.stages > 1 else ""
        return f"rank {self.rank}{stage}, {self.phase}"


class Watch:
    """Says where this process is, and looks at where the others are.

    Args:
        rank, size: this process and how many there are.
        store: that of the job.
        limit: seconds after which a job in which nothing moves is ended.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None, limit: float = 0.0) -> None:
        self.own = Seen(rank, limit=limit)
        self._size, self._limit, self._moved = size, limit, time.monotonic()
        self._ended, self._news = threading.Event(), threading.Event()
        self._store: Any = None
        if store is not None and size > 1:
            self._store = store.clone()  # a connection of its own: the other one waits where this process does

    def lay_out(self, stage: int, stages: int) -> None:
        """Now it is known which stage this process holds."""
        self.own.stage, self.own.stages = stage, stages

    def enter(self, phase: str, patient: bool = False) -> None:
        """Something else begins; ``patient``: nobody can say how it moves on, so let it take very long."""
        self.own.phase, self.own.limit = phase, self._limit * (PATIENT if patient else 1)
        self.moved()
        self._news.set()

    def moved(self) -> None:
        """This process moves on."""
        self._moved = time.monotonic()

    def start(self, stalled: Callable[[str], None]) -> None:
        """Give signs of life from now on; when nothing moves any more in the whole job, call ``stalled`` with why."""
        if self._store is not None:
            threading.Thread(target=self._run, args=(stalled,), name="watch", daemon=True).start()

    def stop(self) -> None:
        """Give no more signs of life."""
        self._ended.set()
        self._news.set()

    def _run(self, stalled: Callable[[str], None]) -> None:
        while not self._ended.is_set():
            self._beat()
            self._news.wait(BEAT)
            self._news.clear()
            if self.own.still > self.own.limit:
                reason = self._why_nothing_moves()
                if reason and not self._ended.is_set():
                    stalled(reason)

    def _beat(self) -> None:
        self.own.beats += 1
        self.own.still = time.monotonic() - self._moved
        with contextlib.suppress(RuntimeError):
            self._store.set(_key(self.own.rank), json.dumps(asdict(self.own)))

    def look(self) -> list[Seen]:
        """Return all processes of the job, and which of them give signs of life; takes some seconds.

        Raises:
            RuntimeError: the store does not answer.
        """
        before = self._answered(self._read)
        for _ in range(BEATS):
            time.sleep(BEAT)
            self._beat()
        after = self._answered(self._read)
        for one, other in zip(before, after, strict=True):
            other.answers = other.beats > one.beats
        return after

    def _read(self) -> list[Seen]:
        found = []
        for rank in range(self._size):
            there = self._store.check([_key(rank)])
            found.append(Seen(**json.loads(self._store.get(_key(rank)))) if there else Seen(rank))
        return found

    def silent(self) -> str:
        """Name the processes that give no sign of life; takes some seconds.

        Raises:
            RuntimeError: the store does not answer.
        """
        return "; ".join(str(seen) for seen in self.look() if not seen.answers)

    def claim(self, key: str, value: str) -> str:
        """Write ``value`` under a key that is not there yet; return what stands there now.

        Raises:
            RuntimeError: the store does not answer.
        """
        return self._answered(lambda: self._store.compare_set(key, "", value).decode())

    def _answered(self, ask: Callable[[], T]) -> T:
        """What ``ask`` returns, unless the store keeps it waiting: where rank 0 is stopped, it would wait for ever."""
        answers: list[T] = []

        def run() -> None:
            with contextlib.suppress(RuntimeError):
                answers.append(ask())

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(ANSWER)
        if not answers:
            raise RuntimeError("the store does not answer")
        return answers[0]

    def _why_nothing_moves(self) -> str:
        """Say where all processes stand if none has moved for too long, else nothing."""
        try:
            seen = self.look()
        except RuntimeError:
            first = f"Rank 0 (stage 0 of {self.own.stages}) gives no sign of life."
            return f"{first}\n  {self.own}: waits for {self.own.still:,.0f} s"
        if any(each.answers and each.still <= each.limit for each in seen):
            return ""
        lines = [
            f"  {each}: " + (f"waits for {each.still:,.0f} s" if each.answers else "gives no sign of life")
            for each in sorted(seen, key=lambda each: (each.answers, -each.still, each.rank))
        ]
        return "\n".join([f"Nothing has moved for {self.own.limit / 60:g} minutes.", *lines])


def _key(rank: int) -> str:
    return f"cadapter/place/{rank}"
