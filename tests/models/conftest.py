"""The tiny models of ``tests/tiny_models.py``, and the table of parity at the end of a run."""

from __future__ import annotations

from typing import Any

import pytest

from tests.models.parity_table import ParityTable
from tests.tiny_models import tiny_model

__all__ = ["tiny_model"]

TABLE = pytest.StashKey[ParityTable]()


@pytest.fixture(scope="session")
def parity_table(pytestconfig: pytest.Config) -> ParityTable:
    """The table that is printed when all tests have run."""
    return pytestconfig.stash.setdefault(TABLE, ParityTable())


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the table of parity, where tests have filled it."""
    table = config.stash.get(TABLE, None)
    if table is not None and table.lines():
        terminalreporter.section("pipelines against Hugging Face's models and the float64 reference")
        for line in table.lines():
            terminalreporter.write_line(line)
