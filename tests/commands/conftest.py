"""One tiny project for all tests of commands."""

from __future__ import annotations

import pytest

from tests.tiny_project import Project, make_project


@pytest.fixture(scope="session")
def command_project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return make_project(tmp_path_factory.mktemp("command-project"), documents=20)
