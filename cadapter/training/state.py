"""Checkpoints of a run: safetensors and JSON only, independent of the layout, whole or not at all.

    checkpoints/step-000100/
        adapter_config.json, adapter_model.safetensors, README.md    a complete adapter directory (or a model's)
        optimizer-00001.safetensors, …                               Adam's moments by parameter name
        state.json                                                   position in the run and what it depends on
        manifest.json                                                sizes and SHA-256 of all of these

A directory without a manifest that fits is no checkpoint. The data's order is a function of the seed and the epoch, so
that the position in it is a number.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cadapter.errors import UsageError
from cadapter.files import new_directory, read_json, refuse_links_out, remove_directory, write_json
from cadapter.training.resuming import EXCUSED_BY, difference

OPTIMISER_STEM = "optimizer"
OPTIMISER_TAG = "optimiser:"
STATE_FILE = "state.json"
MANIFEST_FILE = "manifest.json"
FORMAT = 3

Moved = Callable[[], None]
"""Called while work goes on that takes long, so that it does not look as if nothing moved."""

_NAME = re.compile(r"step-(\d+)")


@dataclass
class Position:
    """Where a run stands.

    Attributes:
        step: optimiser steps done.
        sequences: how many these have read, all of them for each whole epoch.
        tokens: non-padding tokens trained on.
        seconds: time spent in training.
        best_loss: lowest evaluation loss so far.
        best_step: the step after which it was that.
        evaluated: step after which the last evaluation was made, −1 before the first.
        unimproved: evaluations since then, none of which had a lower loss.
        skipped: steps left out because a gradient was not finite.
        sound: the last step after which what is trained was not known to be broken: this one, unless the gradients of
            the steps after it were not finite.
    """

    step: int = 0
    sequences: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_loss: float | None = None
    best_step: int = 0
    evaluated: int = -1
    unimproved: int = 0
    skipped: int = 0
    sound: int = 0

    def __post_init__(self) -> None:
        counts = self.step, self.sequences, self.tokens, self.best_step, self.unimproved, self.skipped, self.sound
        if any(type(count) is not int or count < 0 for count in (*counts, self.evaluated + 1)):
            raise ValueError(f"a count of {self} is no whole number")
        numbers = self.seconds, 0.0 if self.best_loss is None else self.best_loss
        if any(type(number) not in (int, float) or not math.isfinite(number) for number in numbers):
            raise ValueError(f"seconds or best_loss of {self} is no number")

    def is_enough(self, patience: int | None) -> bool:
        """Whether ``patience`` evaluations in a row were no improvement; None: never."""
        return patience is not None and self.unimproved >= patience

    def why_enough(self) -> str:
        """Why a run stops early, in words."""
        times = "evaluation" if self.unimproved == 1 else f"{self.unimproved} evaluations"
        lowest = "" if self.best_loss is None else f"; it was {self.best_loss:.4f} after step {self.best_step} (best/)"
        return (
            f"Stopping early after step {self.step}: in the last {times} the loss was not the lowest so far{lowest}.\n"
            "Raise early_stopping_patience to go on from the checkpoint."
        )

    def count_evaluation(self, loss: float) -> bool:
        """Count an evaluation after ``step``; whether its loss is the lowest so far. That before the first counts not.

        Returns False for a loss that is not finite.
        """
        self.evaluated = self.step
        if not self.step:
            return False
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            self.best_loss, self.best_step, self.unimproved = loss, self.step, 0
            return True
        self.unimproved += 1
        return False

    def count_step(self, step: int, was_skipped: bool) -> None:
        """Count ``step`` as done, or as skipped."""
        if not was_skipped:
            self.sound = step
        elif self.sound == step - 1:  # what the step before made may be what broke this one
            self.sound = max(0, step - 2)
        self.skipped += was_skipped
        self.step = step


@dataclass
class Saved:
    """A checkpoint read back: position, facts the run depended on, its config, and where Adam's moments are."""

    path: Path
    position: Position
    facts: dict[str, Any]
    settings: dict[str, Any]

    def moments(self, names: list[str]) -> dict[str, Tensor]:
        """Those of the named tensors of the optimiser's state that there are.

        Raises:
            UsageError: a file is damaged.
        """
        found: dict[str, Tensor] = {}
        for file in sorted(self.path.glob(f"{OPTIMISER_STEM}-*.safetensors")):
            try:
                with safe_open(file, framework="pt") as tensors:
                    there = set(tensors.keys())
                    found.update({name: tensors.get_tensor(name) for name in names if name in there})
            except (SafetensorError, OSError) as error:
                raise UsageError(f"{file} is damaged: {error}.") from error
        return found


class PartWriter(Protocol):
    """Takes tensors part by part and writes them as files of a directory."""

    def add(self, part: dict[str, Tensor]) -> None:
        """Take the next tensors by name; what can be written already is written."""

    def finish(self) -> None:
        """Write the rest: all parts are there."""


def tagged(parts: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Mark parts of the optimiser's state for :func:`save_checkpoint`."""
    for part in parts:
        yield {OPTIMISER_TAG + name: tensor for name, tensor in part.items()}


def _nothing() -> None:
    pass


def _digest(path: Path, moved: Moved) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            moved()
    return digest.hexdigest()


def save_checkpoint(
    directory: Path,
    position: Position,
    facts: dict[str, Any],
    parts: Iterable[dict[str, Tensor]],
    writer_into: Callable[[Path], PartWriter],
    keep: int,
    settings: dict[str, Any],
    moved: Moved = _nothing,
) -> Path:
    """Write checkpoint ``step-NNNNNN`` under ``directory``, then remove all but the newest ``keep``.

    Where none of these is sound (see :class:`Position`), the newest that is takes the place of the oldest of them.

    Args:
        directory: the run's checkpoints/.
        position: where the run stands.
        facts: what a resume must find unchanged, by name.
        parts: of what is trained, and of the optimiser's state (see :func:`tagged`), mixed.
        writer_into: makes the writer of what is trained.
        keep: how many checkpoints stay.
        settings: the run's config.
        moved: called again and again while files are hashed and flushed, which takes long where they are large.
    """
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / f"step-{position.step:06d}"
    with new_directory(target, force=True, moved=moved) as temporary:
        writer, count = writer_into(temporary), 0
        for part in parts:
            if next(iter(part)).startswith(OPTIMISER_TAG):
                count += 1
                moments = {name.removeprefix(OPTIMISER_TAG): tensor for name, tensor in part.items()}
                safetensors.torch.save_file(moments, temporary / f"{OPTIMISER_STEM}-{count:05d}.safetensors")
            else:
                writer.add(part)
        writer.finish()
        state = {"format": FORMAT, "position": asdict(position), "facts": facts, "settings": settings}
        write_json(temporary / STATE_FILE, state)
        files = sorted(path for path in temporary.iterdir() if path.is_file())
        manifest = {path.name: {"bytes": path.stat().st_size, "sha256": _digest(path, moved)} for path in files}
        write_json(temporary / MANIFEST_FILE, manifest)
    found = _in_order(directory)
    kept = found[-keep:]
    sound = last_sound(directory, position)
    if sound is not None and sound not in kept:
        kept = [sound, *kept[1:]]
    for old in found:
        # The target stays, too: damaged ones with later steps may be there, which the run has yet to reach again.
        if old not in kept and old != target:
            with contextlib.suppress(OSError):
                remove_directory(old)
    return target


def last_sound(directory: Path, position: Position) -> Path | None:
    """The newest checkpoint under ``directory`` whose adapter was not known to be broken at ``position``."""
    sound = [path for path in _in_order(directory) if int(path.name.removeprefix("step-")) <= position.sound]
    return sound[-1] if sound else None


def unsound(directory: Path, position: Position) -> list[Path]:
    """The checkpoints under ``directory`` after the last sound one."""
    return [path for path in _in_order(directory) if int(path.name.removeprefix("step-")) > position.sound]


def _in_order(directory: Path) -> list[Path]:
    found = [(match, path) for path in directory.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return [path for match, path in sorted(found, key=lambda pair: int(pair[0].group(1)))]


def fault_of(checkpoint: Path, moved: Moved = _nothing) -> str | None:
    """Return what is wrong with a checkpoint's files by its manifest, or None; ``moved`` is called while it reads."""
    try:
        manifest = read_json(checkpoint / MANIFEST_FILE)
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
        there = {path.name for path in checkpoint.iterdir() if path.is_file()}
    except (UsageError, OSError, KeyError, TypeError, AttributeError):
        return "no readable manifest.json"
    for name, (size, digest) in expected.items():
        path = checkpoint / name
        if name not in there:
            return f"{name} is missing"
        if path.stat().st_size != size or _digest(path, moved) != digest:
            return f"{name} is damaged"
    return None if STATE_FILE in expected else "it is incomplete"


def newest_checkpoint(directory: Path, moved: Moved = _nothing) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint whose files fit its manifest, and a remark for each newer one passed over.

    ``moved`` is called while files are read.
    """
    remarks: list[str] = []
    for path in reversed(_in_order(directory)):
        fault = fault_of(path, moved)
        if fault is None:
            return path, remarks
        remarks.append(f"{path} is passed over: {fault}.")
    return None, remarks


def load_checkpoint(path: Path) -> Saved:
    """Read what :func:`save_checkpoint` wrote, except what was trained.

    Raises:
        UsageError: it was written by another version's format, or cannot be read.
    """
    try:
        refuse_links_out(path, ("*.json", "*.safetensors"))
        state = read_json(path / STATE_FILE)
        if state["format"] != FORMAT:
            raise UsageError(f"{path} has format {state['format']}; this cadapter reads format {FORMAT}.")
        return Saved(path, Position(**state["position"]), dict(state["facts"]), dict(state["settings"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} cannot be read as a checkpoint: {error!r}") from error


def is_written_out(checkpoint: Path, directory: Path, moved: Moved = _nothing) -> bool:
    """Whether ``directory`` holds, file by file, what was trained until ``checkpoint``; ``moved`` as above."""
    manifest = read_json(checkpoint / MANIFEST_FILE)
    own = [name for name in manifest if name == STATE_FILE or name.startswith(f"{OPTIMISER_STEM}-")]
    return all(
        (directory / name).is_file() and _digest(directory / name, moved) == entry["sha256"]
        for name, entry in manifest.items()
        if name not in own
    )


def check_facts(saved: Saved, facts: dict[str, Any], excused: Collection[str] = ()) -> None:
    """Make sure that a resume continues the same run.

    Raises:
        UsageError: naming each fact that differs and is not ``excused``, with both values.
    """
    differing = [name for name, value in facts.items() if saved.facts.get(name) != value and name not in excused]
    if differing:
        keys = sorted({key for name in differing for key in EXCUSED_BY.get(name, ())})
        meant = f"name with --set what is meant to differ ({', '.join(keys)}), " if keys else ""
        raise UsageError(
            f"{saved.path} cannot be continued, since the run has changed:\n"
            + "".join(f"  {difference(name, saved.facts.get(name), facts[name])}\n" for name in differing)
            + f"Set them back, {meant}or start a new run in another output_dir."
        )
