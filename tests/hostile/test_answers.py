"""Every case of ``answers.py``: refused by each command that reads it, in plain words, with nothing written.

The first command's answer stands in the table of docs/security.md, which is kept true here.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.forked_commands import call, run_all
from tests.hostile.answers import CASES, PAGE, Case, Place, as_a_row, table, table_of_page
from tests.tiny_project import Project

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("unchanged")]

FIRST_AND_ANOTHER = slice(0, 2)
"""Of the commands that read a case; which the other one is changes from case to case, so that all have their turn."""


def answers_of(case: Case, place: Place, which: slice) -> list[str]:
    """What commands say to a case; each must refuse it."""
    commands, said, here = case.make(place), [], place.here
    start = CASES.index(case) % max(1, len(commands) - 1) + 1
    commands = commands[which] if which != FIRST_AND_ANOTHER else [commands[0], *commands[start : start + 1]]
    before = set(here.rglob("*"))
    for words in commands:
        (done,) = run_all(call(*words))
        assert done.returncode == 2, f"{words}\n{done.stdout}{done.stderr}"
        assert re.search(case.answer, done.stderr), f"{words}\n{done.stderr}"
        assert done.stderr.startswith("error: ") or "\nerror: " in done.stderr
        assert "Traceback" not in done.stderr
        assert "internal error" not in done.stderr
        said.append(done.stderr)
    assert set(here.rglob("*")) == before
    return said


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_it_is_refused_in_plain_words(case: Case, good: Project, tmp_path: Path) -> None:
    place = Place(good, tmp_path)
    row = as_a_row(case, answers_of(case, place, FIRST_AND_ANOTHER)[0], place)
    _rows.append(row)
    assert os.environ.get("WRITE_ANSWERS") or row in table_of_page().splitlines(), (
        f"docs/security.md lacks this row; make its table anew:  python -m tests.hostile.answers\n{row}"
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_it_is_refused_by_every_command(case: Case, good: Project, tmp_path: Path) -> None:
    answers_of(case, Place(good, tmp_path), slice(None))


_rows: list[str] = []


def test_the_table_holds_these_and_no_others() -> None:
    if os.environ.get("WRITE_ANSWERS"):
        PAGE.write_text(PAGE.read_text("utf-8").replace(table_of_page(), table(_rows)), "utf-8")
    named = [line.split(" | ")[0].removeprefix("| ") for line in table_of_page().splitlines()[3:-1]]
    assert named == [case.what for case in CASES]
