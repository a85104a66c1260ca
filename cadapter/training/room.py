"""Room on the disk: how much a run writes, whether there is so much, and what is kept where there was not."""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

from cadapter.errors import CannotWrite, UsageError
from cadapter.files import writing
from cadapter.models.loading import DTYPES
from cadapter.terminal import note, warn
from cadapter.training.build import Plan
from cadapter.training.run_directory import RunDirectory
from cadapter.training.state import newest_checkpoint

MIB = 2**20
OVERHEAD = MIB
"""Bytes for what is small in a run: its config, metrics, TensorBoard's events, each directory's card."""


@dataclass(frozen=True)
class Room:
    """Bytes that a run writes.

    Attributes:
        checkpoint: of one checkpoint.
        least: of all that stands there at its end, with the one checkpoint that every run writes.
        most: of all that may stand there at a time: with ``max_checkpoints``, and the next beside them.
    """

    checkpoint: int
    least: int
    most: int


def room_of(plan: Plan) -> Room:
    """Return what a run takes: weights of what is trained, or of the whole model, and the optimiser's state."""
    config, numbers = plan.config, sum(plan.mode.trainable())
    size = DTYPES[config.dtype if config.full_fine_tune else config.lora_weight_dtype].itemsize
    saved = sum(plan.model.layer_bytes()) if config.full_fine_tune else numbers * size
    checkpoint = saved + numbers * (2 * size + (size if size < 4 else 0))  # Adam's two moments, Kahan's compensation
    steps, every = plan.steps.total_steps, config.checkpoint_interval_steps
    epochs = plan.steps.read_by(steps) // plan.steps.count
    certain = min(config.max_checkpoints + 1, max(1, epochs, 1 + (steps - 1) // every if every else 0))
    possible = max(certain, min(config.max_checkpoints + 1, steps))
    directories = 1 + epochs + (config.eval_fraction > 0)  # final/, epochN/, best/
    least, most = (directories * saved + count * checkpoint + OVERHEAD for count in (certain, possible))
    return Room(checkpoint, least, most)


def check_room(room: Room, directory: RunDirectory) -> None:
    """Try to write where ``directory`` is or will be, and compare what is free there with what the run needs.

    What an earlier part of the run has written counts as free: it is replaced, or need not be written again.

    Raises:
        UsageError: it cannot be written, or there is too little room for any run of this kind.
    """
    there = directory.path.absolute()
    while not there.exists():
        there = there.parent
    trial = there / f".write-trial-{uuid.uuid4().hex[:8]}"
    try:
        trial.write_bytes(b"trial")
        trial.unlink()
        free = shutil.disk_usage(there).free + _bytes_of(directory)
    except OSError as error:
        with contextlib.suppress(OSError):
            trial.unlink()
        raise UsageError(f"output_dir = {directory.path} cannot be written: {error.strerror}.") from error
    note(f"A checkpoint takes {_size(room.checkpoint)}, the run up to {_size(room.most)}; {_size(free)} are free.")
    if free < room.least:
        raise UsageError(
            f"output_dir = {directory.path}: the run writes at least {_size(room.least)}, and {_size(free)} are free.\n"
            "Make room, or choose another output_dir."
        )
    if free < room.most:
        warn(
            f"With all its checkpoints the run takes {_size(room.most)}, and {_size(free)} are free. "
            "Make room, or lower max_checkpoints."
        )


def _bytes_of(directory: RunDirectory) -> int:
    """Bytes of what is there of a run."""
    files = [file for part in directory.parts() for file in (part.rglob("*") if part.is_dir() else [part])]
    return sum(file.stat().st_size for file in files if file.is_file())


def _size(count: int) -> str:
    return f"{count / MIB:,.1f} MiB" if count < 1000 * MIB else f"{count / MIB / 1024:,.1f} GiB"


@contextlib.contextmanager
def naming_what_is_kept(directory: RunDirectory) -> Iterator[None]:
    """Where the disk refuses what a run writes in the block, say which checkpoint is the newest that is whole.

    Raises:
        CannotWrite: the disk refused it.
    """
    try:
        with writing(directory.path):
            yield
    except (CannotWrite, UsageError) as error:
        if isinstance(error, UsageError) and not isinstance(error.__cause__, OSError):
            raise
        raise CannotWrite(f"{error}\n{_what_is_kept(directory)}") from error


def _what_is_kept(directory: RunDirectory) -> str:
    checkpoint, _ = newest_checkpoint(directory.checkpoints)
    if checkpoint is None:
        return "There is no checkpoint yet. Make room and start again with --force."
    return f"The newest whole checkpoint is {checkpoint}. Make room and go on with --resume-from-checkpoint."
