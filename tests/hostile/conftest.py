"""One good project for all that is then done to copies of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.forked_commands import call, run_all_well
from tests.tiny_project import Project, make_project


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with run/final, a control adapter, and what it converts to: lora/ and mult/; nothing may change it."""
    project = make_project(tmp_path_factory.mktemp("good"), documents=20)
    keys = {"control_site": "writes", "checkpoint_interval_steps": 1, "max_checkpoints": 1, "evals_per_run": 1}
    config = project.write_config("run", **keys, eval_fraction=0.2, max_steps=1)
    base, adapter = project.root / "model", project.root / "run" / "final"
    run_all_well(
        call("train", config),
        call("to-add-lora", base, adapter, project.root / "lora"),
        call("to-mult-lora", adapter, project.root / "mult"),
    )
    return project


@pytest.fixture
def unchanged(good: Project) -> object:
    """Checks, when the test is over, that no file of the good project has changed."""
    before = contents(good.root)
    yield
    assert contents(good.root) == before


def contents(root: Path) -> dict[str, bytes]:
    """Every file under ``root`` with what it holds, but for caches of prepared texts."""
    found = [path for path in root.rglob("*") if path.is_file() and ".cadapter-cache" not in path.parts]
    return {str(path.relative_to(root)): path.read_bytes() for path in found}
