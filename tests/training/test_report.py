"""metrics.jsonl and TensorBoard hold the same numbers; a resumed run replaces the lines it writes again."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cadapter.training.report import Reporter, duration, trim_metrics


def scalars(directory: Path) -> dict[str, dict[int, float]]:
    """All TensorBoard scalars by name and step."""
    events = EventAccumulator(str(directory / "logs"))
    events.Reload()
    return {name: {each.step: each.value for each in events.Scalars(name)} for name in events.Tags()["scalars"]}


def write(directory: Path, first: int, last: int, total: int = 6, offset: float = 0.0) -> None:
    """Report steps ``first`` to ``last``, and an evaluation after the last."""
    with Reporter(directory, total, first) as reporter:
        for step in range(first, last + 1):
            values = {"train/loss": step + offset, "train/grad_norm": math.inf, "train/loss_pos": math.nan}
            reporter.training_step(step, 1, 100 * step, 0.5 * step, values, torch.tensor([1.0, 2.0]))
        reporter.evaluation(last, 1, 100 * last, 0.5 * last, {"eval/loss": last + offset})


def lines(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_one_line_a_step_and_the_same_in_tensorboard(tmp_path: Path) -> None:
    write(tmp_path, 1, 3)
    assert lines(tmp_path) == [
        *({"step": n, "epoch": 1, "tokens": 100 * n, "seconds": 0.5 * n, "train/loss": n} for n in (1, 2, 3)),
        {"step": 3, "epoch": 1, "tokens": 300, "seconds": 1.5, "eval/loss": 3.0},
    ]
    assert scalars(tmp_path) == {"train/loss": {1: 1.0, 2: 2.0, 3: 3.0}, "eval/loss": {3: 3.0}}


def test_a_resumed_run_replaces_the_steps_it_takes_again(tmp_path: Path) -> None:
    write(tmp_path, 1, 4)
    write(tmp_path, 3, 6, offset=0.25)
    assert [(line["step"], line["train/loss"]) for line in lines(tmp_path) if "train/loss" in line] == [
        (1, 1.0), (2, 2.0), (3, 3.25), (4, 4.25), (5, 5.25), (6, 6.25)
    ]  # fmt: skip
    assert [line["step"] for line in lines(tmp_path) if "eval/loss" in line] == [6]
    assert scalars(tmp_path)["train/loss"] == {1: 1.0, 2: 2.0, 3: 3.25, 4: 4.25, 5: 5.25, 6: 6.25}


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 2, "tra')
    trim_metrics(file, 2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 2]
    trim_metrics(tmp_path / "missing.jsonl", 2)
    assert not (tmp_path / "missing.jsonl").exists()


@pytest.mark.parametrize("norms", [None, torch.tensor([1.0, math.nan])], ids=["no adapters", "not finite"])
def test_without_norms_there_is_no_histogram(tmp_path: Path, norms: torch.Tensor | None) -> None:
    """Full fine-tuning has none; a histogram of numbers that are not finite cannot be drawn."""
    with Reporter(tmp_path, 1, 1) as reporter:
        reporter.training_step(1, 1, 100, 0.5, {"train/loss": 2.0}, norms)
    assert [line["train/loss"] for line in lines(tmp_path)] == [2.0]
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    assert (events.Tags()["scalars"], events.Tags()["histograms"]) == (["train/loss"], [])


def test_norms_are_a_histogram(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    events = EventAccumulator(str(tmp_path / "logs"), size_guidance={"histograms": 0})
    events.Reload()
    histograms = events.Histograms("train/layer_norms")
    assert [(each.step, each.histogram_value.num, each.histogram_value.sum) for each in histograms] == [
        (1, 2.0, 3.0), (2, 2.0, 3.0)
    ]  # fmt: skip


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (36610, "10:10:10")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
