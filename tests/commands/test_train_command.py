"""``cadapter train`` as users type it: rehearsal, published spellings, and mistakes, which cost nothing."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.tiny_project import CLASS_OF, LAYERS, Project, listing, metrics, run, run_well


def assert_refused(project: Project, done: Any, before: dict[str, Any], *words: str, code: int = 2) -> None:
    """One plain error with these words, and nothing written."""
    assert done.returncode == code, done.stdout + done.stderr
    for word in words:
        assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1
    assert listing(project.root) == before


MISTAKES = [
    pytest.param({"lora_rnak": 8}, ("run.toml:", "lora_rnak", "lora_rank"), id="wrong-key"),
    pytest.param({"lr": "fast"}, ("run.toml:", 'lr = "fast"'), id="wrong-type"),
    pytest.param({"kinds": ("missing",)}, ("missing.jsonl",), id="missing-file"),
    pytest.param({"kinds": ("broken",)}, ("broken.jsonl", "line 3"), id="broken-line"),
    pytest.param({"kinds": ("empty",)}, ("empty.jsonl",), id="empty-dataset"),
    pytest.param({"model_dir": "nowhere"}, ("nowhere",), id="no-model"),
    pytest.param({"model_dir": "."}, ("model",), id="a-directory-that-is-no-model"),
    pytest.param({"layers_to_transform": "2:9"}, ("layers_to_transform", "4 layers"), id="layers-out-of-range"),
    pytest.param({"pipeline_stages": 2}, ("pipeline_stages = 2", "1 processes"), id="stages-on-one-process"),
    pytest.param({"output_dir": "FILE"}, ("output_dir", "is a file"), id="output-is-a-file"),
]


@pytest.fixture
def own_project(command_project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project of the test's own, without any cache, with some spoilt texts."""
    for kind in ("positive", "negative"):
        shutil.copy(command_project.root / f"{kind}.jsonl", tmp_path)
    shutil.copytree(command_project.root / "model", tmp_path / "model")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{"text": \n{"text": "d"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    for kind in ("missing", "broken", "empty"):
        monkeypatch.setitem(CLASS_OF, kind, 1)
    return Project(tmp_path)


@pytest.mark.processes
@pytest.mark.parametrize(("keys", "words"), MISTAKES)
def test_a_mistake_is_named_and_costs_nothing(
    own_project: Project, keys: dict[str, Any], words: tuple[str, ...]
) -> None:
    if keys.get("output_dir") == "FILE":
        keys = {"output_dir": str(own_project.root / "positive.jsonl")}
    config = own_project.write_config("run", **keys)
    before = listing(own_project.root)
    assert_refused(own_project, run("train", config), before, *words)


@pytest.mark.processes
def test_processes_that_the_stages_do_not_divide(own_project: Project) -> None:
    config = own_project.write_config("run", pipeline_stages=2)
    before = listing(own_project.root)
    done = run("train", config, "--num-gpus", 3)
    assert_refused(own_project, done, before, "pipeline_stages = 2 does not divide the 3 processes")


@pytest.mark.processes
@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"kinds": ("broken",)}, ("broken.jsonl", "line 3")),
        pytest.param({"layers_to_transform": "2:9"}, ("layers_to_transform",), marks=pytest.mark.slow),
    ],
)
def test_an_error_of_two_processes_is_told_once(
    own_project: Project, keys: dict[str, Any], words: tuple[str, ...]
) -> None:
    config = own_project.write_config("run", pipeline_stages=2, **keys)
    before = listing(own_project.root)
    children = {process.pid for process in psutil.Process().children(recursive=True)}
    done = run("train", config, "--num-gpus", 2)
    assert_refused(own_project, done, before, "From rank 0 of 2 (stage 0 of 2), ", *words)
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) <= 4, done.stderr
    time.sleep(0.2)
    assert {process.pid for process in psutil.Process().children(recursive=True)} == children


@pytest.mark.processes
@pytest.mark.slow
def test_more_stages_than_layers(own_project: Project) -> None:
    stages = LAYERS + 3  # the embedding and the head are pipeline layers too
    config = own_project.write_config("run", pipeline_stages=stages)
    before = listing(own_project.root)
    done = run("train", config, "--num-gpus", stages)
    assert_refused(own_project, done, before, f"pipeline_stages = {stages}", f"{LAYERS + 2} pipeline layers")


@pytest.mark.processes
def test_no_config_is_wrong_usage() -> None:
    done = run("train")
    assert done.returncode == 2
    assert "cadapter train config.toml" in done.stderr
    assert run("train", "no-such.toml").returncode == 2


@pytest.mark.processes
def test_a_rehearsal_trains_nothing_and_a_published_command_line_does(own_project: Project) -> None:
    config = own_project.write_config("run", max_steps=1)
    done = run_well("train", config, "--dry-run")
    for word in ("1 × 1", "embedding … head", "1 steps in all", "nothing trained"):
        assert word in done.stdout
    assert not (own_project.root / "run").exists()

    words = ["--config", config, "--num_gpus=1", "--master_addr", "127.0.0.1", "--resume_from_checkpoint"]
    done = run_well("train", *words)
    assert "starting afresh" in done.stdout
    assert [line["step"] for line in metrics(own_project.root / "run")] == [1]
    assert "num_gpus" not in run("train", "--help").stdout
    assert run("train", config, "--dry_run").returncode == 2
