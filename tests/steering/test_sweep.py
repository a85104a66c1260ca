"""Strengths as they are named on the command line."""

from __future__ import annotations

import pytest

from cadapter.errors import UsageError
from cadapter.steering.sweep import strengths_of


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["1"], (1.0,)),
        (["0.5", "-0.5", "0.5"], (0.5, -0.5)),
        (["-2:2:0.5"], (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)),
        (["0:0.3:0.1"], (0.0, 0.1, 0.2, 0.3)),  # no rounding of binary fractions
        (["0:1:0.4"], (0.0, 0.4, 0.8)),
        (["1:1:1", "-1e-1"], (1.0, -0.1)),
        (["-0"], (0.0,)),
    ],
)
def test_numbers_and_ranges(texts: list[str], expected: tuple[float, ...]) -> None:
    assert strengths_of(texts) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is no number"),
        ("one", "'one' is no number"),
        ("nan", "is no number"),
        ("1:inf:1", "'inf' is no number"),
        ("1e400", "is no number"),
        ("1:2", "FROM:TO:STEP"),
        ("1:2:3:4", "FROM:TO:STEP"),
        ("2:1:0.5", "FROM:TO:STEP"),
        ("1:2:0", "FROM:TO:STEP"),
        ("0:1:0.001", "too many"),
        ("0:1e300:1e-300", "too many"),
    ],
)
def test_mistakes(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        strengths_of([text])
    assert str(caught.value).startswith("--strength")
