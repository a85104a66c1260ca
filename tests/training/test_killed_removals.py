"""A process that is killed while it removes checkpoints or an older run: what has a name is whole, and nothing stops.

Full fine-tuning of a model with Python code of its own, which a directory must hold to count as a run's.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cadapter.training.run_directory import RunDirectory
from cadapter.training.state import Position, fault_of, newest_checkpoint, save_checkpoint
from tests.tiny_project import listing

CONFIG = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Model"}}
FILES = {
    "config.json": json.dumps(CONFIG),
    "mine.py": "from .more import Mine\n",
    "more.py": "",
    "README.md": "A model",
}


class Killed(BaseException):
    """What ends a process between two calls of the system."""


@contextmanager
def killed_at(call: int) -> Iterator[list[int]]:
    """From this call on that changes a name, nothing is done any more; yields a list that grows with each call."""
    calls: list[int] = []

    def counted(real):  # type: ignore[no-untyped-def]
        def change(*arguments, **options):  # type: ignore[no-untyped-def]
            calls.append(1)
            if len(calls) > call:
                raise Killed
            return real(*arguments, **options)

        return change

    with pytest.MonkeyPatch.context() as patched:
        for name in ("unlink", "remove", "rmdir", "rename", "replace"):
            patched.setattr(os, name, counted(getattr(os, name)))
        yield calls


class ModelWriter:
    """Writes a model with its code."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def add(self, part: dict[str, Tensor]) -> None:
        (self.directory / "model.safetensors").write_bytes(next(iter(part.values())).numpy().tobytes())

    def finish(self) -> None:
        for name, content in FILES.items():
            (self.directory / name).write_text(content)


def save(run: Path, step: int) -> None:
    """Write a checkpoint of two that stay."""
    parts = iter([{"weight": torch.full((8,), float(step))}])
    save_checkpoint(run / "checkpoints", Position(step=step), {}, parts, ModelWriter, 2, {})


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def make_run(root: Path) -> Path:
    """A run with two checkpoints and its results."""
    for step in (5, 10):
        save(root, step)
    for name in ("final", "best", "epoch1"):
        shutil.copytree(root / "checkpoints" / "step-000010", root / name)
    (root / "logs").mkdir()
    for name in ("resolved.json", "config.toml", "metrics.jsonl", "logs/events.out.tfevents.1.host"):
        (root / name).write_text("{}")
    return root


def test_a_kill_within_the_removal_of_an_old_checkpoint(tmp_path: Path) -> None:
    for place in itertools.count():
        run = make_run(tmp_path / str(place))
        try:
            with killed_at(place):
                save(run, 15)
            break
        except Killed:
            pass
        assert {fault_of(path) for path in (run / "checkpoints").glob("step-*")} == {None}
        directory = RunDirectory(run)
        directory.refuse_foreign("")  # as train --force asks
        directory.tidy_up()
        checkpoint, remarks = directory.checkpoint_to_resume(resume=True, force=False)
        assert remarks == []
        assert checkpoint is not None
        assert checkpoint.name in ("step-000010", "step-000015")
        assert len(checkpoints(run)) in (2, 3)
        save(run, 20)
        assert checkpoints(run) == [checkpoint.name, "step-000020"]
        directory.close()
    assert place > len(FILES)  # each file was removed, at least
    assert checkpoints(run) == ["step-000010", "step-000015"]


def test_a_kill_within_the_removal_of_an_older_run(tmp_path: Path) -> None:
    whole = {name: value[0] for name, value in listing(make_run(tmp_path / "whole")).items()}
    for place in itertools.count():
        run = make_run(tmp_path / str(place))
        directory = RunDirectory(run)
        try:
            with killed_at(place):
                directory.start(fresh=True)
            break
        except Killed:
            pass
        finally:
            directory.close()
        for part in directory.parts():
            found = {name: value[0] for name, value in listing(run).items() if Path(name).parts[0] == part.name}
            assert found == {name: size for name, size in whole.items() if Path(name).parts[0] == part.name}
        assert newest_checkpoint(run / "checkpoints")[1] == []
        directory.refuse_foreign("")
        directory.start(fresh=True)
        directory.close()
        assert os.listdir(run) == ["resolved.json"]
    assert place > 5 * len(FILES)
