"""One run at a time in a directory, and what a killed one left there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cadapter.errors import UsageError
from cadapter.training.run_directory import RunDirectory
from tests.forked_commands import call, run_all_well
from tests.tiny_project import Project

HOLDER = """
import sys, time
from pathlib import Path
from cadapter.training.run_directory import RunDirectory
directory = RunDirectory(Path(sys.argv[1]))
directory.claim()
print("claimed", flush=True)
time.sleep(60)
"""


def test_a_directory_is_one_runs_until_its_process_ends(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "claimed\n"
    other = RunDirectory(tmp_path)
    with pytest.raises(UsageError, match="Another process is training in"):
        other.claim()
    with pytest.raises(UsageError, match="Another process is training in"):
        other.tidy_up()
    assert os.listdir(tmp_path) == []
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    other.claim()
    other.close()


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".step-000005.partial-0123abcd").mkdir(parents=True)
    (tmp_path / ".best.replaced-0123abcd").mkdir()
    directory = RunDirectory(tmp_path)
    assert len(directory.tidy_up()) == 2
    assert (tmp_path / "best").is_dir()
    assert list((tmp_path / "checkpoints").iterdir()) == []
    directory.close()


def test_a_directory_that_is_not_there_is_nobodys(tmp_path: Path) -> None:
    RunDirectory(tmp_path / "missing").claim()
    assert not (tmp_path / "missing").exists()


@pytest.mark.processes
@pytest.mark.parametrize("mode", ["control", "lora", "full"])
def test_a_run_holds_nothing_that_no_run_wrote(project: Project, mode: str) -> None:
    """All that is written is known as such: or else no run could be replaced."""
    keys = {
        "use_control_adapters": mode == "control", "full_fine_tune": mode == "full", "evals_per_run": 2, "epochs": 2,
        "eval_fraction": 0.2, "sample_prompts": ["The"], "sample_max_new_tokens": 2, "max_sequences": 2,
        "lora_weight_decay": None, "gradient_accumulation_steps": 2,
    }  # fmt: skip
    config = project.write_config(f"known-{mode}", ("positive",), **keys)
    run_all_well(call("train", config), call("train", config, "--force"))
    directory = RunDirectory(project.root / f"known-{mode}")
    assert {path.name for path in directory.path.iterdir()} == {path.name for path in directory.parts()}
    assert {"epoch1", "epoch2", "best", "final", "logs", "checkpoints"} <= {path.name for path in directory.parts()}
    assert directory.foreign() == []


def test_best_stays_until_the_run_that_starts_over_has_a_better_one(tmp_path: Path) -> None:
    fill(tmp_path, "resolved.json", "metrics.jsonl", "best/adapter_model.safetensors")
    directory = RunDirectory(tmp_path)
    assert directory.checkpoint_to_resume(resume=True, force=False) == (None, [])
    directory.start(fresh=True, keep_best=True)
    assert sorted(path.name for path in directory.parts()) == ["best", "resolved.json"]
    directory.start(fresh=True)
    directory.close()


@pytest.mark.parametrize("result", ["final", "epoch1"])
def test_a_resume_without_checkpoint_replaces_no_result(tmp_path: Path, result: str) -> None:
    fill(tmp_path, "resolved.json", f"{result}/adapter_model.safetensors")
    directory = RunDirectory(tmp_path)
    with pytest.raises(UsageError, match=f"starting afresh would replace its {result}"):
        directory.checkpoint_to_resume(resume=True, force=False)
    assert directory.checkpoint_to_resume(resume=True, force=True) == (None, [])


def fill(directory: Path, *names: str) -> None:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("precious")


@pytest.mark.parametrize("force", [False, True])
def test_a_directory_with_a_config_alone_holds_no_run(tmp_path: Path, force: bool) -> None:
    fill(tmp_path, "config.toml", "logs/events.out.tfevents.1.host", "notes.txt")
    directory = RunDirectory(tmp_path)
    assert directory.checkpoint_to_resume(False, force) == (None, [])
    directory.refuse_foreign("precious")  # the run's own config: output_dir is where it lies
    directory.start(fresh=True)
    directory.close()
    assert {path.name for path in tmp_path.iterdir()} == {"config.toml", "logs", "notes.txt"}


@pytest.mark.parametrize(
    "name",
    [
        "config.toml",
        "final/model.pt",
        "checkpoints/last.ckpt",
        "checkpoints/step-5/model.pt",
        "logs/mine.txt",
        "best/x",
        "metrics.jsonl",
        "epoch1/x",
    ],
)
def test_what_no_run_wrote_is_not_replaced(tmp_path: Path, name: str) -> None:
    fill(tmp_path, name)
    part = name if name.startswith(("checkpoints", "logs")) else name.split("/")[0]
    with pytest.raises(UsageError, match=rf"holds {part}, which no run of cadapter wrote"):
        RunDirectory(tmp_path).refuse_foreign("another config")
    assert (tmp_path / name).read_text() == "precious"


def test_a_run_that_left_its_record_is_one(tmp_path: Path) -> None:
    fill(tmp_path, "resolved.json", "config.toml", "notes.txt", "epoch1-notes.txt", "epoch2_plots/x", "final/README.md",
         "epoch1/adapter_config.json", "logs/events.out.tfevents.1.host", "checkpoints/step-000003/state.json",
         "checkpoints/.step-000004.partial-0123abcd/state.json")  # fmt: skip
    directory = RunDirectory(tmp_path)
    with pytest.raises(UsageError, match="holds a run already"):
        directory.checkpoint_to_resume(False, False)
    directory.refuse_foreign("another config")
    directory.start(fresh=True)
    directory.close()
    # The record stays: a process that is killed here must not leave a run that counts as nobody's.
    left = {"resolved.json", "notes.txt", "epoch1-notes.txt", "epoch2_plots"}
    assert {path.name for path in tmp_path.iterdir()} == left


@pytest.mark.parametrize(
    "name", ["logs/mine.txt", "best/notes.txt", "final/plots/x", "epoch1/model.py", "checkpoints/notes.txt",
             "checkpoints/step-000003/notes.txt", "metrics.jsonl/x", "epoch3"],
)  # fmt: skip
def test_what_was_put_into_a_run_is_not_removed_with_it(tmp_path: Path, name: str) -> None:
    fill(tmp_path, "resolved.json", name)
    foreign = name if name != "metrics.jsonl/x" else "metrics.jsonl"
    with pytest.raises(UsageError, match=rf"holds {foreign.removesuffix('/x')}, which no run of cadapter wrote, and"):
        RunDirectory(tmp_path).refuse_foreign("any config")
    assert (tmp_path / name).read_text() == "precious"


@pytest.mark.parametrize(
    "names",
    [("config.json", "model.safetensors"), ("adapter_config.json", "adapter_model.safetensors", "resolved.json")],
)
def test_a_run_is_not_mixed_into_a_model_or_an_adapter(tmp_path: Path, names: tuple[str, ...]) -> None:
    fill(tmp_path, *names)
    with pytest.raises(UsageError, match="is itself the directory of a model or an adapter"):
        RunDirectory(tmp_path).refuse_foreign("any config")
