"""Runs that end before their last step: since nothing improves, or since gradients are not finite any more."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cadapter.training.state import Position
from tests.forked_commands import call, run_all, run_all_well
from tests.joined_processes import TERMINATED, run_program
from tests.tiny_project import Project, metrics

# The held-out loss of texts this small begins to rise after a few steps of this size.
RISING: dict[str, Any] = {
    "max_steps": 40, "epochs": 10, "gradient_accumulation_steps": 4, "eval_fraction": 0.1, "evals_per_run": 21,
    "lr": 0.3, "lora_weight_decay": 0.01, "checkpoint_interval_steps": 1, "max_checkpoints": 50,
    "early_stopping_patience": 2,
}  # fmt: skip
# After one step of this size M² leaves float32, so that every later step has a gradient of NaN.
BROKEN: dict[str, Any] = {
    "lr": 1e30, "control_inverse": "neumann", "control_neumann_order": 3, "gradient_accumulation_steps": 4,
    "lora_weight_decay": 0, "max_steps": 8,
}  # fmt: skip


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def equal(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def position(directory: Path, step: int) -> dict[str, Any]:
    return json.loads((directory / f"checkpoints/step-{step:06d}/state.json").read_text())["position"]


def expected_end(losses: list[tuple[int, float]], patience: int) -> tuple[int, int]:
    """(step of the end, step of the lowest loss) by the plain definition, from all losses after the first step."""
    for number in range(len(losses)):
        lowest = min(range(number + 1), key=lambda k: losses[k][1])
        if number - lowest == patience:
            return losses[number][0], losses[lowest][0]
    raise AssertionError("it never rises")


@pytest.fixture(scope="module")
def unstopped(project: Project) -> Path:
    run_all_well(call("train", project.write_config("unstopped", **{**RISING, "early_stopping_patience": None})))
    return project.root / "unstopped"


@pytest.fixture(scope="module")
def stopped(project: Project, unstopped: Path) -> tuple[Path, int, str]:
    (said,) = run_all_well(call("train", project.write_config("early", **RISING)))
    directory = project.root / "early"
    return directory, metrics(directory)[-1]["step"], said


def test_it_stops_where_the_definition_says_and_says_why(unstopped: Path, stopped: tuple[Path, int, str]) -> None:
    directory, last, said = stopped
    losses = [(line["step"], line["eval/loss"]) for line in metrics(unstopped, "eval") if line["step"]]
    end, lowest = expected_end(losses, 2)
    assert last == end < 40
    assert f"Stopping early after step {end}: in the last 2 evaluations the loss was not the lowest so far" in said
    assert f"after step {lowest} (best/)" in said
    assert f"Trained {end} steps on" in said
    best, final = directory / "best", directory / "final"
    assert equal(best, unstopped / f"checkpoints/step-{lowest:06d}")
    assert equal(final, unstopped / f"checkpoints/step-{end:06d}")
    assert position(directory, end)["unimproved"] == 2


def test_it_stops_at_the_same_step_when_resumed(project: Project, stopped: tuple[Path, int, str]) -> None:
    """From a checkpoint in the middle of the patience."""
    directory, last, _ = stopped
    other = project.root / "early-resumed"
    shutil.copytree(directory, other)
    middle = next(step for step in range(last, 0, -1) if position(other, step)["unimproved"] == 1)
    shutil.rmtree(other / "final")
    for step in range(middle + 1, last + 1):
        shutil.rmtree(other / f"checkpoints/step-{step:06d}")
    config = project.write_config("early-resumed", **RISING)
    (said,) = run_all_well(call("train", config, "--resume-from-checkpoint"))
    assert f"Stopping early after step {last}: " in said
    assert equal(other / "final", directory / "final")
    assert position(other, last) | {"seconds": 0} == position(directory, last) | {"seconds": 0}


def test_a_run_that_stopped_is_done_until_its_patience_grows(project: Project, stopped: tuple[Path, int, str]) -> None:
    directory, last, _ = stopped
    other = project.root / "early-longer"
    shutil.copytree(directory, other)
    config = project.write_config("early-longer", **RISING)
    refused, _ = run_all(
        call("train", config, "--resume-from-checkpoint"),
        call("train", config, "--resume-from-checkpoint", "--set", "early_stopping_patience=3"),
    )
    assert refused.returncode == 2
    assert f"Stopping early after step {last}" in refused.stderr
    assert metrics(other)[-1]["step"] > last


def test_an_end_that_only_the_resumed_run_finds_is_one(project: Project, stopped: tuple[Path, int, str]) -> None:
    """It was told to stop before the last evaluation, which shows that the run is done."""
    directory, last, _ = stopped
    other, config = project.root / "early-terminated", project.write_config("early-terminated", **RISING)
    codes, _, _ = run_program(TERMINATED, 1, config, STEP=str(last))
    assert codes == [143]
    assert not (other / "final").exists()
    found, again = run_all(*[call("train", config, "--resume-from-checkpoint")] * 2)
    assert f"Stopping early after step {last}: " in found.stdout
    assert equal(other / "final", directory / "final")
    assert position(other, last) | {"seconds": 0} == position(directory, last) | {"seconds": 0}
    assert (again.returncode, "is the end of this run already" in again.stderr) == (2, True)


@pytest.mark.slow
def test_two_stages_and_two_replicas_stop_alike(project: Project, stopped: tuple[Path, int, str]) -> None:
    keys = {**RISING, "pipeline_stages": 2, "gradient_accumulation_steps": 2}
    run_all_well(call("train", project.write_config("early-2x2", **keys), processes=4))
    assert metrics(project.root / "early-2x2")[-1]["step"] == stopped[1]


def skipped_by_step(directory: Path) -> list[int]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [int(line["train/skipped_steps"]) for line in lines]


@pytest.mark.parametrize(("processes", "layout"), [(1, {}), (4, {"pipeline_stages": 2})])
def test_after_too_many_skipped_steps_the_run_ends(project: Project, processes: int, layout: dict[str, Any]) -> None:
    name = f"broken-{processes}"
    keys = {**BROKEN, **layout, "max_skipped_steps": 3, "checkpoint_interval_steps": 2, "max_checkpoints": 1}
    keys["gradient_accumulation_steps"] = 4 if processes == 1 else 2
    (done,) = run_all(call("train", project.write_config(name, **keys), processes=processes))
    directory = project.root / name
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("error: ") == 1
    assert "error: Step 5: 4 steps were skipped, since a gradient was not finite; max_skipped_steps = 3" in done.stderr
    assert "There is no good checkpoint." in done.stderr
    assert "Lower lr (it is 1e+30) or raise lora_weight_decay, and start again: --force" in done.stderr
    assert "Traceback" not in done.stderr
    for number, step in enumerate(range(2, 6), start=1):
        assert done.stderr.count(f"step {step}: a gradient is not finite; the step is skipped ({number} so far)") == 1
    assert skipped_by_step(directory) == [0, 1, 2, 3, 4]
    assert not (directory / "final").exists()
    assert all(tensor.isfinite().all() for tensor in weights(directory / "checkpoints/step-000004").values())


def test_the_last_good_checkpoint_is_kept_and_named(project: Project) -> None:
    """Three good steps, then a resume with an lr that breaks everything in its first step."""
    good = {**BROKEN, "lr": 1e-3, "checkpoint_interval_steps": 1, "max_checkpoints": 2, "max_skipped_steps": 2}
    config, directory = project.write_config("breaks", **{**good, "max_steps": 3}), project.root / "breaks"
    run_all_well(call("train", config))
    bad = ("--set", "lr=1e30", "--set", "max_steps=9")
    (done,) = run_all(call("train", config, "--resume-from-checkpoint", *bad))
    assert done.returncode == 1
    assert skipped_by_step(directory) == [0, 0, 0, 0, 1, 2, 3]
    kept = sorted(path.name for path in (directory / "checkpoints").iterdir())
    assert kept == ["step-000003", "step-000006"]
    said = " ".join(done.stderr.split())
    assert f"The last good checkpoint is {directory / 'checkpoints/step-000003'}; remove step-000006" in said

    shutil.rmtree(directory / "checkpoints/step-000006")
    mended = ("--set", "lr=1e-3", "--set", "max_steps=9")
    run_all_well(call("train", config, "--resume-from-checkpoint", *mended))
    straight = project.write_config("unbroken", **{**good, "max_steps": 9})
    run_all_well(call("train", straight))
    assert equal(directory / "final", project.root / "unbroken/final")


def test_skipped_steps_are_counted_on_by_a_resumed_run(project: Project) -> None:
    config, directory = project.write_config("skips", **BROKEN, checkpoint_interval_steps=4), project.root / "skips"
    (first,) = run_all(call("train", config))
    assert first.returncode == 0
    assert "Trained 8 steps (7 of them skipped)" in first.stdout
    counted, saved = skipped_by_step(directory), position(directory, 8)
    shutil.rmtree(directory / "final")
    shutil.rmtree(directory / "checkpoints/step-000008")
    run_all_well(call("train", config, "--resume-from-checkpoint"))
    assert skipped_by_step(directory) == counted == list(range(8))
    assert position(directory, 8) | {"seconds": 0} == saved | {"seconds": 0}


def test_what_is_sound() -> None:
    """The step before a gradient that is not finite is suspect; after a finite one nothing is."""
    place = Position()
    found = []
    for number, skipped in enumerate([0, 0, 0, 1, 1, 0, 1], start=1):
        place.count_step(number, bool(skipped))
        found.append((place.step, place.sound, place.skipped))
    assert found == [(1, 1, 0), (2, 2, 0), (3, 3, 0), (4, 2, 1), (5, 2, 2), (6, 6, 2), (7, 5, 3)]
