"""Checkpoints on disk: whole or not at all, pruned, checked before they are trusted."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cadapter.errors import UsageError
from cadapter.training.state import (
    Position,
    check_facts,
    fault_of,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    tagged,
)

SETTINGS = {"lr": 1e-3}
FACTS = {"seed": 42, "layers": [0, 1], "training data": "abc"}
ADAPTER, FIRST, SECOND = "adapter_model.safetensors", "optimizer-00001.safetensors", "optimizer-00002.safetensors"
Part = dict[str, Tensor]


class ByteWriter:
    """Writes the numbers that it is given, one after the other, when all are there."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.written = b""

    def add(self, part: Part) -> None:
        for name in sorted(part):
            self.written += part[name].numpy().tobytes()

    def finish(self) -> None:
        (self.directory / ADAPTER).write_bytes(self.written)


def adapter_part(step: int) -> Part:
    return {"control_A": torch.full((50,), float(step))}


def moments(layer: int, step: int) -> Part:
    """Adam's state of a layer, as its stage's optimiser gives it out."""
    return {f"layers.{layer}.control_A.exp_avg": torch.full((2, 3), float(step + layer)), "steps": torch.tensor(step)}


def parts_of(step: int) -> Iterator[Part]:
    """What two stages send: each what it trains, then its state."""
    for layer in (0, 1):
        yield adapter_part(step)
        yield from tagged([moments(layer, step)])


def save(directory: Path, step: int, keep: int = 3, parts: Iterable[Part] | None = None) -> Path:
    """Write a checkpoint of two stages."""
    position = Position(step=step, tokens=10 * step, seconds=1.5, best_loss=2.5, evaluated=step, skipped=1)
    found = parts_of(step) if parts is None else parts
    return save_checkpoint(directory, position, FACTS, found, ByteWriter, keep, SETTINGS)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    assert path.name == "step-000007"
    assert sorted(file.name for file in path.iterdir()) == [ADAPTER, "manifest.json", FIRST, SECOND, "state.json"]
    saved = load_checkpoint(path)
    assert saved.position == Position(step=7, tokens=70, seconds=1.5, best_loss=2.5, evaluated=7, skipped=1)
    assert saved.facts == FACTS
    assert saved.settings == SETTINGS
    assert fault_of(path) is None
    assert (path / ADAPTER).read_bytes() == 2 * adapter_part(7)["control_A"].numpy().tobytes()


def test_hashing_and_flushing_show_that_they_move_on(tmp_path: Path) -> None:
    """Where weights take many minutes to hash, nothing else would show it."""
    moves: list[int] = []
    large = [{"control_A": torch.zeros(3 << 18)}]  # 3 MiB
    path = save_checkpoint(tmp_path, Position(step=7), FACTS, large, ByteWriter, 1, SETTINGS, lambda: moves.append(1))
    assert len(moves) >= 3 + 2 + 2  # its megabytes and those of state.json, twice as many files flushed
    moves.clear()
    assert newest_checkpoint(tmp_path, lambda: moves.append(1)) == (path, [])
    assert len(moves) >= 3


def test_moments_are_found_by_name_in_whichever_file_they_are(tmp_path: Path) -> None:
    saved = load_checkpoint(save(tmp_path, 7))
    names = [f"layers.{layer}.control_A.exp_avg" for layer in (1, 0, 2)]
    found = saved.moments([*names, "steps"])
    assert sorted(found) == [*sorted(names[:2]), "steps"]
    for layer in (0, 1):
        assert torch.equal(found[names[1 - layer]], torch.full((2, 3), 7.0 + layer))
    assert found["steps"] == 7
    assert saved.moments(["layers.2.control_A.exp_avg"]) == {}


def test_before_the_first_step_there_are_no_moments(tmp_path: Path) -> None:
    path = save(tmp_path, 0, parts=[adapter_part(0)])
    assert fault_of(path) is None
    assert load_checkpoint(path).moments(["steps"]) == {}


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    for step in (5, 10, 1_000_000, 20):
        save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step-000020", "step-1000000"]
    assert newest_checkpoint(tmp_path) == (tmp_path / "step-1000000", [])


def test_a_new_checkpoint_is_kept_where_later_ones_are_damaged(tmp_path: Path) -> None:
    (save(tmp_path, 20) / "state.json").unlink()
    path = save(tmp_path, 15, keep=1)
    assert newest_checkpoint(tmp_path)[0] == path


def test_no_checkpoint_and_no_directory(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "missing") == (None, [])


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda path: (path / FIRST).write_bytes((path / FIRST).read_bytes()[:-1]), f"{FIRST} is damaged"),
        (lambda path: flip_a_bit(path / SECOND), f"{SECOND} is damaged"),
        (lambda path: (path / SECOND).unlink(), f"{SECOND} is missing"),
        (lambda path: (path / FIRST).rename(path / "optimizer-00003.safetensors"), f"{FIRST} is missing"),
        (lambda path: (path / ADAPTER).write_bytes(b"x" * 400), f"{ADAPTER} is damaged"),
        (lambda path: (path / "state.json").unlink(), "state.json"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json"),
        (lambda path: (path / "manifest.json").write_text("{"), "manifest.json"),
        (lambda path: (path / "manifest.json").write_text('{"state.json": 3}'), "manifest.json"),
        (lambda path: (path / "manifest.json").write_text("{}"), "incomplete"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path: Path, damage, named: str) -> None:
    whole, broken = save(tmp_path, 5), save(tmp_path, 10)
    damage(broken)
    found, remarks = newest_checkpoint(tmp_path)
    assert found == whole
    assert len(remarks) == 1
    assert str(broken) in remarks[0]
    assert named in remarks[0]


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_file_that_is_no_safetensors_is_a_usage_error(tmp_path: Path) -> None:
    """Where a file is damaged between the check and its reading."""
    path = save(tmp_path, 5)
    (path / SECOND).write_bytes(b"{}")
    with pytest.raises(UsageError, match=f"{SECOND} is damaged"):
        load_checkpoint(path).moments(["steps"])


class FullDisk(ByteWriter):
    def add(self, part: Part) -> None:
        raise OSError("no space left")


class FullDiskAtTheEnd(ByteWriter):
    def finish(self) -> None:
        super().finish()
        raise OSError("no space left")


def broken_stream(step: int) -> Iterator[Part]:
    """Parts of which the third never arrives."""
    yield adapter_part(step)
    yield from tagged([moments(0, step)])
    raise OSError("no space left")


@pytest.mark.parametrize(
    ("writer", "parts"),
    [(FullDisk, parts_of), (FullDiskAtTheEnd, parts_of), (ByteWriter, broken_stream)],
    ids=["while parts stream", "at the end", "the stream itself"],
)
@pytest.mark.parametrize("step", [5, 6], ids=["the same step again", "a new step"])
def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, writer, parts, step: int) -> None:
    first = save(tmp_path, 5)
    content = {file.name: file.read_bytes() for file in first.iterdir()}
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(tmp_path, Position(step=step), FACTS, parts(6), writer, keep=1, settings=SETTINGS)
    assert list(tmp_path.iterdir()) == [first]
    assert {file.name: file.read_bytes() for file in first.iterdir()} == content
    assert fault_of(first) is None


def test_changed_facts_are_refused_with_both_values(tmp_path: Path) -> None:
    saved = load_checkpoint(save(tmp_path, 5))
    check_facts(saved, FACTS)
    with pytest.raises(UsageError) as caught:
        check_facts(saved, {**FACTS, "seed": 43, "lora_rank": 8})
    message = str(caught.value)
    assert "seed: 42 in the checkpoint, 43 now" in message
    assert "lora_rank: not set in the checkpoint, 8 now" in message
    assert "layers" not in message


def test_another_format_and_unreadable_state_are_usage_errors(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "format": 99}))
    with pytest.raises(UsageError, match="format 99"):
        load_checkpoint(path)
    (path / "state.json").write_text("[]")
    with pytest.raises(UsageError, match="cannot be read"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"sequences": -1}, {"step": 1.5}, {"skipped": "many"}, {"tokens": True}, {"evaluated": "never"},
        {"evaluated": -2}, {"seconds": None}, {"seconds": float("nan")}, {"best_loss": "low"}, {"best_loss": True},
    ],
)  # fmt: skip
def test_a_position_that_is_none_is_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    path = save(tmp_path, 7)
    state = json.loads((path / "state.json").read_text())
    state["position"].update(wrong)
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(UsageError, match="cannot be read as a checkpoint"):
        load_checkpoint(path)
