"""The tiny models of ``tests/tiny_models.py``, and a small project."""

from __future__ import annotations

import pytest

from tests.tiny_models import tiny_model
from tests.tiny_project import Project, make_project

__all__ = ["tiny_model"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A tiny model with texts. Runs write into directories of their own."""
    return make_project(tmp_path_factory.mktemp("planned"))
