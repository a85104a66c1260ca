"""Who builds the data's cache: rank 0, and on a machine that does not see what rank 0 built, its first process."""

from __future__ import annotations

import contextlib
import io
import socket
from collections.abc import Callable
from pathlib import Path

from cadapter.data import PreparedData
from cadapter.errors import UsageError
from cadapter.terminal import note
from cadapter.training.distributed import World, barrier, from_main, on_main


def prepare_in_turn(prepare: Callable[[], PreparedData], world: World) -> PreparedData:
    """Return what ``prepare`` returns, which finds the caches or builds them, without building any twice.

    Rank 0 goes first; then the first process of every other machine, which builds caches of its own where paths are
    not shared, and says so; then all others.

    Raises:
        UsageError: a machine has other data than rank 0.
    """
    if world.size == 1:
        return prepare()
    first_here = world.local_rank == 0 and not world.is_main
    if first_here:
        note(f"{socket.gethostname()}: waiting for rank 0, which prepares the data.")
    found: list[PreparedData] = []
    on_main(lambda: found.append(prepare()), world)
    places = from_main("\n".join(str(place.absolute()) for data in found for place in data.directories), world)
    if first_here:
        unseen = [place for place in places.splitlines() if not Path(place).is_dir()]
        if unseen:
            note(f"{socket.gethostname()}: rank 0's cache {unseen[0]} is not to be seen here; using one of its own.")
        found.append(prepare() if unseen else _silently(prepare))
    barrier()
    if not found:
        found.append(_silently(prepare))
    fingerprint = from_main(found[0].fingerprint, world)
    if fingerprint != found[0].fingerprint:
        raise UsageError(
            f"The data or the tokenizer on {socket.gethostname()} are not those of rank 0.\n"
            "All machines need the same files."
        )
    return found[0]


def _silently(prepare: Callable[[], PreparedData]) -> PreparedData:
    """``prepare`` once more: what there is to say has been said."""
    silent = io.StringIO()
    with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
        return prepare()
