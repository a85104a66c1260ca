"""When one of several processes fails: all end, one of them tells, and the run's directory keeps what it told."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from cadapter import terminal
from cadapter.errors import CadapterError, Stopped, UsageError
from cadapter.training.distributed import World, join_world, leave_world
from cadapter.training.error_file import ErrorFile
from cadapter.training.out_of_memory import out_of_memory
from cadapter.training.signals import StopRequest, heeded

FAILED, HEARD = "cadapter/failed", "cadapter/heard"
"""Keys of the store: the rank that tells of a failure with the exit code, and how many ranks know of it."""

HEAD_START, PATIENCE = timedelta(seconds=2), timedelta(seconds=5)
"""How long other ranks let rank 0 tell of what all of them met, and how long rank 0 waits for them at the end."""
AFTER_EACH_OTHER = 0.3
"""Seconds times the rank, after which those look for what was told who cannot ask rank 0."""

_LOST = re.compile(r"gloo|nccl|connection|socket|broken pipe", re.IGNORECASE)
"""What a collective says when another process is not there any more."""


@contextlib.contextmanager
def joined_world(directory: Path | None = None) -> Iterator[World]:
    """Be part of the job for as long as the block runs.

    When processes fail, together or because one of them did, one of them tells: it raises its error, which says from
    which rank and stage it comes and what that was doing. The others end with :class:`SystemExit` and the same exit
    code, and print nothing. So does a job in which nothing moves any more.

    Args:
        directory: of the run; what is told is written there, too, unless it is a user's mistake.
    """
    file = ErrorFile(directory)
    world = join_world()
    world.watch.start(lambda reason: _end_stalled(reason, world, file))
    try:
        yield world
    except BaseException as error:
        error = _in_plain_words(error, world)
        if world.size == 1:
            _keep(error, "", file)
            raise error
        told, code = _another_tells(error, world, file)
        if told:
            raise SystemExit(code) from None
        heading = _heading(world)
        if _is_lost(error):
            error = _named(error, world)
        if not isinstance(error, Stopped):
            print(heading, file=sys.stderr, flush=True)
        _keep(error, heading, file)
        raise error
    finally:
        world.watch.stop()
        leave_world()


def end_with_another(reason: str, world: World) -> CadapterError:
    """Wait until the process that has met an error begins to tell of it; return what to raise here in that case.

    It is ``reason``, which is told only if that process does not come to it.
    """
    with contextlib.suppress(RuntimeError):
        world.store.wait([FAILED], PATIENCE)
    return CadapterError(reason)


def _in_plain_words(error: BaseException, world: World) -> BaseException:
    """Return for lack of GPU memory and for a request to stop what they mean to the user, else ``error``."""
    if isinstance(error, StopRequest):
        return error.as_error()
    if not isinstance(error, torch.OutOfMemoryError):
        return error
    return out_of_memory(error, world.watch.own.phase)


def _heading(world: World) -> str:
    own = world.watch.own
    stage = f" (stage {own.stage} of {own.stages})" if own.stages > 1 else ""
    return f"From rank {world.rank} of {world.size}{stage}, {own.phase}:"


def _keep(error: BaseException, heading: str, file: ErrorFile) -> None:
    """Write an error that ends a run into the run's directory, with its traceback where it is not expected."""
    if isinstance(error, (Stopped, UsageError, KeyboardInterrupt, SystemExit)):
        return
    expected = isinstance(error, CadapterError)
    said = f"error: {error}" if expected else "".join(traceback.format_exception(error))
    file.write("\n".join(filter(None, [heading, said])))


def _is_lost(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and bool(_LOST.search(str(error)))


def _named(error: BaseException, world: World) -> BaseException:
    """Instead of what a collective says, which processes are gone; ``error`` itself where none is."""
    try:
        silent = world.watch.silent()
    except RuntimeError:
        silent = f"rank 0 (stage 0 of {world.watch.own.stages})"
    if not silent:
        return error
    lost = CadapterError(
        f"A process has ended without a word: {silent}.\n"
        "It was killed, perhaps since the machine ran out of memory, or its machine cannot be reached."
    )
    lost.__cause__ = error
    return lost


def _another_tells(error: BaseException, world: World, file: ErrorFile) -> tuple[bool, int]:
    """Return whether another process tells of what ended this one with ``error``, and the exit code."""
    interrupted = 130 if isinstance(error, KeyboardInterrupt) else 1
    own_code = error.exit_code if isinstance(error, CadapterError) else interrupted
    claim = f"{world.rank} {own_code}"
    # What ends this process is known. The launcher stops all as soon as the first has ended, also the one that tells.
    for number in heeded():
        signal.signal(number, signal.SIG_IGN)
    try:
        if not world.is_main:
            with contextlib.suppress(dist.DistStoreError):
                world.store.wait([FAILED], HEAD_START)
        first = world.store.compare_set(FAILED, "", claim).decode()
        leave_world()  # those who wait for this process go on, and fail
        heard = world.store.add(HEARD, 1)
        deadline = time.monotonic() + PATIENCE.total_seconds()
        # Rank 0 often holds the store, which the others still have to ask.
        while world.is_main and heard < world.size and time.monotonic() < deadline:
            time.sleep(0.05)
            heard = world.store.add(HEARD, 0)
    except RuntimeError:
        # The store is gone, and rank 0 with it. If it told, its exit code is the one to be seen first.
        if _is_lost(error) and file.is_kept:
            time.sleep(AFTER_EACH_OTHER * world.rank)
            if not file.is_new():
                return False, own_code
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(HEAD_START.total_seconds())
        return True, own_code
    return first != claim, int(first.split()[1])


def _end_stalled(reason: str, world: World, file: ErrorFile) -> NoReturn:
    """End this process, which waits where no exception reaches it; one process of the job says why."""
    claim = f"{world.rank} 1"
    try:
        tells = world.watch.claim(FAILED, claim) == claim
    except RuntimeError:  # rank 0 stands still, and the store with it
        time.sleep(AFTER_EACH_OTHER * world.rank)
        tells = not file.is_new()
    if tells:
        heading = _heading(world)
        print(heading, file=sys.stderr, flush=True)
        terminal.error(reason)
        _keep(CadapterError(reason), heading, file)
    sys.stdout.flush()
    os._exit(1)
