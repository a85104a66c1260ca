"""What a run leaves behind: its files, its numbers, its evaluations; and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cadapter.adapters.directory import read_control_adapter
from cadapter.data import prepare_data
from cadapter.training.state import newest_checkpoint
from tests.tiny_project import Project, listing, metrics, run, run_well

KEYS = {
    "kinds": ("positive", "negative", "neutral"), "control_class0_lambda": 0.5, "epochs": 2, "eval_fraction": 0.1,
    "evals_per_run": 4, "gradient_accumulation_steps": 4, "micro_batch_size": 8, "checkpoint_interval_steps": 4,
    "max_checkpoints": 2,
}  # fmt: skip
NAMES = {
    "train/loss", "train/loss_pos", "train/loss_neg", "train/loss_neutral", "train/top1_accuracy", "train/lr",
    "train/grad_norm", "train/tokens_per_second", "train/norm_avg", "train/norm_max", "train/spectral_max",
    "train/radius_max", "train/weight_decay_avg", "train/weight_decay_max",
}  # fmt: skip
EVAL_NAMES = {"eval/loss", "eval/loss_pos", "eval/loss_neg", "eval/loss_neutral", "eval/top1_accuracy"}


@pytest.fixture(scope="session")
def finished(project: Project) -> Path:
    """The directory of a run of two epochs."""
    run_well("train", project.write_config("finished", **KEYS))
    return project.root / "finished"


def steps_of(project: Project) -> tuple[int, int]:
    """Steps an epoch and in all, from the number of packed sequences."""
    data = prepare_data(project.load(project.write_config("finished", **KEYS)))
    each = math.ceil(len(data.train) / 32)
    assert len(data.train) % 32, "the last step of an epoch has fillers"
    return each, 2 * each


def test_an_epoch_has_every_sequence_once(project: Project, finished: Path) -> None:
    each, total = steps_of(project)
    lines = metrics(finished)
    assert [line["step"] for line in lines] == list(range(1, total + 1))
    assert [line["epoch"] for line in lines] == [1] * each + [2] * each
    data = prepare_data(project.load(project.root / "finished.toml"))
    tokens = int(data.train.tokens.sum())
    assert (lines[each - 1]["tokens"], lines[-1]["tokens"]) == (tokens, 2 * tokens)


def test_every_step_has_every_number(finished: Path) -> None:
    lines = metrics(finished)
    # The filled-up last step of an epoch may be without a token of some class, which then has no loss.
    short = {line["step"] for line in lines if line["step"] % (len(lines) // 2) == 0}
    for line in lines:
        missing = {"step", "epoch", "tokens", "seconds", *NAMES} - line.keys()
        assert not missing or (line["step"] in short and missing <= {"train/loss_pos", "train/loss_neg"})
        assert all(math.isfinite(value) for value in line.values())
    assert lines[0]["train/lr"] == pytest.approx(1e-2 * math.sqrt(0.01 / 1.99))
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)


def test_the_norms_are_those_of_the_adapter(finished: Path) -> None:
    adapter = read_control_adapter(finished / "final")
    matrices = [adapter.scale * factors.B.double() @ factors.A.double() for factors in adapter.layers.values()]
    frobenius = [torch.linalg.matrix_norm(W).item() for W in matrices]
    last = metrics(finished)[-1]
    assert last["train/norm_avg"] == pytest.approx(sum(frobenius) / len(frobenius), rel=1e-5)  # float32 Gram matrices
    assert last["train/norm_max"] == pytest.approx(max(frobenius), rel=1e-5)
    spectral = max(torch.linalg.matrix_norm(W, 2).item() for W in matrices)
    assert last["train/spectral_max"] == pytest.approx(spectral, rel=1e-5)
    radius = max(torch.linalg.eigvals(W).abs().max().item() for W in matrices)
    assert last["train/radius_max"] == pytest.approx(radius, rel=1e-5)


def test_tensorboard_holds_the_same(finished: Path) -> None:
    events = EventAccumulator(str(finished / "logs"), size_guidance={"scalars": 0})
    events.Reload()
    assert {*NAMES, *EVAL_NAMES} <= set(events.Tags()["scalars"])
    assert "train/layer_norms" in events.Tags()["histograms"]
    for kind in ("train", "eval"):
        for line in metrics(finished, kind):
            for name in line.keys() & {*NAMES, *EVAL_NAMES}:
                (value,) = [each.value for each in events.Scalars(name) if each.step == line["step"]]
                assert value == pytest.approx(line[name], rel=1e-6)  # TensorBoard keeps float32


def test_evaluations_are_spread_from_before_the_first_step_to_after_the_last(project: Project, finished: Path) -> None:
    _, total = steps_of(project)
    lines = metrics(finished, "eval")
    assert [line["step"] for line in lines] == [round(k * total / 3) for k in range(4)]
    assert all(line.keys() >= EVAL_NAMES for line in lines)
    assert lines[-1]["eval/loss"] < lines[0]["eval/loss"]


def test_best_holds_the_adapter_of_the_lowest_evaluation(project: Project, finished: Path) -> None:
    _, total = steps_of(project)
    lowest = min(metrics(finished, "eval")[1:], key=lambda line: line["eval/loss"])
    assert lowest["step"] == total
    best, final = (load_file(finished / name / "adapter_model.safetensors") for name in ("best", "final"))
    assert all(torch.equal(best[name], final[name]) for name in final)


def test_the_files_of_a_run(project: Project, finished: Path) -> None:
    each, total = steps_of(project)
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "config.toml", "resolved.json", "metrics.jsonl", "logs", "checkpoints", "epoch1", "epoch2", "best", "final"
    }  # fmt: skip
    assert (finished / "config.toml").read_text() == (project.root / "finished.toml").read_text()
    resolved = json.loads((finished / "resolved.json").read_text())
    assert resolved["config"]["beta2"] == 0.99
    assert resolved["steps"] == {"total": total, "per_epoch": each}
    assert "torch" in resolved["versions"]
    by_interval = [step for step in range(1, total) if step % 4 == 0]
    kept = [*by_interval, total][-2:]
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == [f"step-{n:06d}" for n in kept]
    assert newest_checkpoint(finished / "checkpoints") == (finished / "checkpoints" / f"step-{total:06d}", [])
    epochs = [load_file(finished / f"epoch{n}" / "adapter_model.safetensors") for n in (1, 2)]
    final = load_file(finished / "final" / "adapter_model.safetensors")
    assert all(torch.equal(epochs[1][name], final[name]) for name in final)
    assert not all(torch.equal(epochs[0][name], final[name]) for name in final)
    for part in ("final", "best", "epoch1", f"checkpoints/step-{total:06d}"):
        assert read_control_adapter(finished / part).rank == 4


@pytest.mark.processes
@pytest.mark.slow
def test_a_checkpoint_is_taken_as_it_is_by_all_that_take_adapters(
    project: Project, finished: Path, tmp_path: Path
) -> None:
    """What they make of the last checkpoint is, bit for bit, what they make of final/."""
    checkpoint, _ = newest_checkpoint(finished / "checkpoints")
    base = project.root / "model"
    norms = [run_well("inspect-norms", adapter).stdout for adapter in (checkpoint, finished / "final")]
    assert norms[0] == norms[1].replace(str(finished / "final"), str(checkpoint))
    commands = {"to-mult-lora": [], "to-add-lora": [base], "merge": [base]}
    for name, first in commands.items():
        made = []
        for kind, adapter in (("checkpoint", checkpoint), ("final", finished / "final")):
            output = tmp_path / f"{name}-{kind}"
            run_well(name, *first, adapter, output)
            files = sorted(output.glob("*.safetensors"))
            made.append({key: tensor for file in files for key, tensor in load_file(file).items()})
        assert made[0]
        assert made[0].keys() == made[1].keys()
        assert all(torch.equal(tensor, made[1][key]) for key, tensor in made[0].items())


def test_a_directory_that_holds_a_run_is_not_touched(project: Project, finished: Path) -> None:
    before = listing(project.root)
    done = run("train", project.root / "finished.toml")
    assert done.returncode == 2
    assert "holds a run already" in done.stderr
    assert "--resume-from-checkpoint" in done.stderr
    assert listing(project.root) == before


def test_force_replaces_a_run_also_when_its_own_config_is_given(own_project: Project) -> None:
    run_well("train", own_project.write_config("run", max_steps=3, epochs=2))
    directory = own_project.root / "run"
    (directory / "epoch7").mkdir()
    config = directory / "config.toml"
    text = config.read_text()
    run_well("train", config, "--force", "--set", "max_steps=2")
    assert [line["step"] for line in metrics(directory)] == [1, 2]
    assert not (directory / "epoch7").exists()
    assert [path.name for path in (directory / "checkpoints").iterdir()] == ["step-000002"]
    assert config.read_text() == text


def test_a_gradient_that_is_not_finite_skips_the_step_and_is_counted(own_project: Project) -> None:
    # After one step of this size M² leaves float32, so that every later step has a gradient of NaN.
    keys = {"lr": 1e30, "control_inverse": "neumann", "control_neumann_order": 3, "gradient_accumulation_steps": 8}
    done = run_well("train", own_project.write_config("run", max_steps=3, lora_weight_decay=0, **keys))
    directory = own_project.root / "run"
    assert "step 2: a gradient is not finite; the step is skipped (1 so far)" in done.stderr
    assert "step 3: a gradient is not finite; the step is skipped (2 so far)" in done.stderr
    text = (directory / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    state = json.loads((directory / "checkpoints" / "step-000003" / "state.json").read_text())
    assert state["position"]["skipped"] == 2
    assert all(tensor.isfinite().all() for tensor in load_file(directory / "final/adapter_model.safetensors").values())


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"kinds": ("positive",), "class_weights": {"positive": 0.0}}, "of class +1) all have the weight 0"),
        ({"kinds": ("neutral",), "control_class0_lambda": 0.0}, "of class 0) all have the weight 0"),
    ],
)
def test_a_run_in_which_nothing_has_a_weight_is_refused(project: Project, keys: dict[str, Any], said: str) -> None:
    config = project.write_config("weightless", **keys)
    done = run("train", config)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Nothing would be trained" in done.stderr
    assert said in done.stderr
    assert not (project.root / "weightless").exists()


def test_a_config_with_line_ends_of_windows_may_lie_in_its_own_output_dir(project: Project) -> None:
    text = project.write_config("windows").read_bytes()
    place = project.root / "windows"
    place.mkdir()
    (place / "config.toml").write_bytes(text.replace(b"\n", b"\r\n"))
    run_well("train", place / "config.toml", "--dry-run")
