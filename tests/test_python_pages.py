"""The Python of the documentation runs, in order, in a directory that has what the pages name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.steered_models import make_adapter, make_model
from tests.test_readme import ROOT, blocks

PAGES = [ROOT / "docs" / "python-api.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_the_python_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_model(tmp_path / "base")
    for name in ("run", "style"):
        (tmp_path / name).mkdir()
        make_adapter(tmp_path / name / "final")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    examples = blocks(page, "python")
    assert len(examples) >= 4
    for number, source in enumerate(examples):
        exec(compile(source, f"{page.name}, example {number}", "exec"), names)
    printed = capsys.readouterr().out
    strengths = [line.split()[0] for line in printed.splitlines() if line.split()[0] in ("-1", "0", "1")]
    assert strengths == ["-1", "0", "1"]
    assert "is not saved" in printed
    assert {path.name for path in tmp_path.iterdir()} >= {"saved-adapter", "saved-base"}
    assert not (tmp_path / "saved-model").exists()
