"""Checkpoints on disk: whole or not at all, pruned, checked before they are trusted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cadapter.errors import UsageError
from cadapter.training.state import (
    OPTIMISER_FILE,
    Position,
    check_facts,
    fault_of,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)

FACTS = {"seed": 42, "layers": [0, 1], "training data": "abc"}


def save(directory: Path, step: int, keep: int = 3) -> Path:
    """Write a checkpoint with an adapter file of its own."""
    moments = {"layers.0.control_A.exp_avg": torch.full((2, 3), float(step)), "steps": torch.tensor([step])}
    position = Position(step=step, tokens=10 * step, seconds=1.5, best_loss=2.5, evaluated=step, skipped=1)

    def adapter(target: Path) -> None:
        (target / "adapter_model.safetensors").write_bytes(bytes([step % 256]) * 100)

    return save_checkpoint(directory, position, FACTS, moments, adapter, keep)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    assert path.name == "step-000007"
    saved = load_checkpoint(path)
    assert saved.position == Position(step=7, tokens=70, seconds=1.5, best_loss=2.5, evaluated=7, skipped=1)
    assert saved.facts == FACTS
    assert torch.equal(saved.optimiser["layers.0.control_A.exp_avg"], torch.full((2, 3), 7.0))
    assert fault_of(path) is None


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
        (lambda path: (path / OPTIMISER_FILE).write_bytes((path / OPTIMISER_FILE).read_bytes()[:-1]), OPTIMISER_FILE),
        (lambda path: (path / "adapter_model.safetensors").write_bytes(b"x" * 100), "adapter_model.safetensors"),
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


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    first = save(tmp_path, 5)

    def fail(_target: Path) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        save_checkpoint(tmp_path, Position(step=6), FACTS, {}, fail, keep=1)
    assert list(tmp_path.iterdir()) == [first]
    assert fault_of(first) is None


def test_changed_facts_are_refused_with_both_values(tmp_path: Path) -> None:
    saved = load_checkpoint(save(tmp_path, 5))
    check_facts(saved, FACTS)
    with pytest.raises(UsageError) as caught:
        check_facts(saved, {**FACTS, "seed": 43, "lora_rank": 8})
    message = str(caught.value)
    assert "seed: 42 in the checkpoint, 43 now" in message
    assert "lora_rank: None in the checkpoint, 8 now" in message
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
