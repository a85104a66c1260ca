"""docs/conversions.md says of every family what is measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from cadapter.models.families import FAMILIES
from tests.convert.fidelity_table import HEADER, measured, row

PAGE = Path(__file__).parent.parent.parent / "docs" / "conversions.md"
ROWS = {
    line.split("`")[1]: line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| `") and "%" in line
}


def test_the_table_has_every_family():
    assert HEADER in PAGE.read_text("utf-8")
    assert list(ROWS) == list(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_is_what_is_measured(family, tmp_path):
    found = row(family, *measured(family, tmp_path)).split("|")
    for said, cell in zip(ROWS[family].split("|"), found, strict=True):
        said, cell = said.strip(), cell.strip()
        if said.startswith("exact"):  # to rounding, which differs from machine to machine
            assert cell.startswith("exact")
        elif said and (said[0].isdigit()):
            number, other = (float(text.rstrip("%")) for text in (said, cell))
            assert number == pytest.approx(other, rel=0.1)  # experts may be routed otherwise
        else:
            assert said == cell
