"""One tiny project for all tests of training, and runs that several tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_project import Project, make_project


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture
def own_project(project: Project, tmp_path: Path) -> Project:
    """A project that a test may spoil: the same model, texts of its own."""
    for kind in ("positive", "negative", "neutral"):
        (tmp_path / f"{kind}.jsonl").write_bytes((project.root / f"{kind}.jsonl").read_bytes())
    (tmp_path / "model").symlink_to(project.root / "model")
    return Project(tmp_path)
