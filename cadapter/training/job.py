"""A job on this machine: the launcher and the processes that work under it, from their start to the last one's end.

Whoever started it can find the ones that work by a variable of their environment, also where ssh started them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from cadapter.errors import CadapterError
from cadapter.training.error_file import ErrorFile
from cadapter.training.signals import heeded

JOB = "CADAPTER_JOB"
"""Set by the command that starts a job, to a name that no other job has."""
SMALLEST_NEGATIVE_CODE = 256 - 65
"""The launcher ends with −N when a process was killed by signal N, which becomes 256 − N."""
PR_SET_PDEATHSIG = 1
"""Of prctl(2): the signal that a process gets when its parent dies."""


def _workers(job: str) -> Iterator[Any]:
    import psutil

    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environ = process.environ()
            # The launcher has the job's name, too, but gives a rank to those only that it starts.
            if environ.get(JOB) == job and "RANK" in environ:
                yield process


def signal_workers(job: str, number: int) -> int:
    """Send signal ``number`` to the workers of ``job`` on this machine; return how many there were.

    An interrupt finds a Python that is still starting unprepared; it is ended as by SIGTERM, without a traceback.
    """
    import psutil

    told = 0
    for worker in _workers(job):
        with contextlib.suppress(psutil.Error, OSError):
            unprepared = number == signal.SIGINT and not _listens(worker.pid)
            worker.send_signal(signal.SIGTERM if unprepared else number)
            told += 1
    return told


def _listens(process: int) -> bool:
    """Whether a worker has come so far that it handles requests: until then it ignores SIGUSR1."""
    (caught,) = re.findall(r"^SigCgt:\s*([0-9a-f]+)$", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    return bool(int(caught, 16) >> (signal.SIGUSR1 - 1) & 1)


def end_with_parent() -> Callable[[], None]:
    """What a child does first, so that it is told to stop when this process dies without a word."""
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def run_job(
    command: Sequence[str], environment: Mapping[str, str], tell: Callable[[int], bool], errors: ErrorFile
) -> int:
    """Run a launcher's ``command`` and return the exit code of the processes that work.

    SIGTERM, SIGINT, SIGHUP and SIGUSR1 are passed on to them by ``tell(number)``, which says whether there are any.
    When they have saved and stopped for a signal, the exit code is 128 + signal. Nothing of the job is left on this
    machine. ``errors`` shows whether one of them has told of what ended the job.

    Raises:
        CadapterError: a process was killed and could not say so itself.
    """
    received: list[int] = []
    job: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, _frame: FrameType | None) -> None:
        if number != signal.SIGUSR1:
            received.append(number)
        if job is not None and not tell(number) and number != signal.SIGUSR1:
            job.terminate()

    previous: dict[signal.Signals, Any] = {number: signal.signal(number, pass_on) for number in heeded()}
    try:
        # A session of its own: Ctrl-C reaches the workers through us alone, not the launcher, which would kill them.
        job = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=end_with_parent())
        # Not sooner: until then SIGUSR1 is ignored, which what is started here inherits.
        previous[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, pass_on)
        if received:  # while it was being started
            job.terminate()
        code = job.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if job is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)  # whatever of the job is left
    if code and received:
        return 128 + received[-1]
    killed_by = -code if code < 0 else 256 - code if code > SMALLEST_NEGATIVE_CODE else 0
    if killed_by and errors.is_new():
        return 1
    if killed_by:
        hint = "\nPerhaps the machine ran out of memory." if killed_by == signal.SIGKILL else ""
        reason = f"A process was killed by signal {killed_by} ({signal.strsignal(killed_by)}).{hint}"
        errors.write(f"error: {reason}")
        raise CadapterError(reason)
    return code


if __name__ == "__main__":  # on another machine: python -m cadapter.training.job JOB NUMBER
    sys.exit(0 if signal_workers(sys.argv[1], int(sys.argv[2])) else 1)
