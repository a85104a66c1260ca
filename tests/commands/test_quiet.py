"""With --quiet a command prints what it was asked for and no more; paths with spaces stay whole in what comes next."""

from __future__ import annotations

import json
import re
import shlex

import pytest

from tests.forked_commands import call, run_all, run_all_well
from tests.tiny_project import Project, make_project, texts


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Runs of a class_field of whose class −1 nothing is held out, and of both classes."""
    root = tmp_path_factory.mktemp("quiet") / "with spaces"
    root.mkdir()
    project = make_project(root, documents=20)
    records = [{"text": text, "class": class_} for kind, class_ in (("positive", 1), ("negative", -1))
               for text in texts(kind, 20 if class_ > 0 else 4)]  # fmt: skip
    (root / "own.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    file = project.write_config("own", (), eval_fraction=0.05, seed=1, evals_per_run=2, max_steps=2)
    file.write_text(f'{file.read_text()}[[datasets]]\ndataset_path = "{root}/own.jsonl"\nclass_field = "class"\n')
    project.write_config("both", eval_fraction=0.2, evals_per_run=2, max_steps=2)
    project.write_config("single", eval_fraction=0.01, evals_per_run=2, max_steps=2)
    return project


@pytest.mark.processes
def test_train_eval_and_plan_print_their_results_alone(project: Project) -> None:
    config = project.root / "both.toml"
    trained, scored, planned = run_all_well(
        call("train", config, "--quiet"),
        call("eval", config, "--quiet"),
        call("plan", config, "--quiet", "--gpu-memory", "24"),
    )
    assert [line.split(":")[0] for line in trained.splitlines()] == [
        "evaluation after step 0", "evaluation after step 2",
    ]  # fmt: skip
    assert "Contrast at ±1: " in scored
    assert "There is no neutral text" in scored
    assert re.search(r"^(Best within|No contrast within|No pair of strengths) ", scored, re.MULTILINE)
    assert "\nIt fits a GPU of 24 GiB: " in planned
    for printed in (trained, scored, planned):
        assert "Next: " not in printed


@pytest.mark.processes
def test_next_commands_hold_paths_with_spaces(project: Project) -> None:
    config = project.root / "single.toml"
    trained, scored, empty = run_all(
        call("train", config), call("eval", config), call("eval", config, "--set", "eval_fraction=0")
    )
    for done, last in ((trained, project.root / "single" / "config.toml"), (scored, "--compare")):
        assert done.returncode == 0, done.stderr
        assert shlex.split(done.stdout.splitlines()[-1])[-1] == str(last)
    assert str(project.root / "single" / "final") in shlex.split(scored.stdout.splitlines()[-1])
    # One document a class is held out.
    assert "There is one document of class +1 and one document of class −1: no standard error" in scored.stdout
    assert "Best within" not in scored.stdout
    assert empty.returncode == 2
    assert "error: There is no document to evaluate on." in empty.stderr


@pytest.mark.processes
def test_train_and_eval_say_that_a_class_is_not_held_out(project: Project) -> None:
    rehearsed, trained, scored = run_all(
        *(call(*words) for words in (("train", project.root / "own.toml", "--dry-run"),
                                     ("train", project.root / "own.toml"), ("eval", project.root / "own.toml")))
    )  # fmt: skip
    for done in (rehearsed, trained, scored):
        assert done.returncode == 0, done.stderr
        assert "warning: No document of class −1 is held out for evaluation" in done.stderr
    assert "No contrast: no document of class −1 was scored." in scored.stdout
