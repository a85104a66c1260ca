"""Strengths as the command line names them: single numbers and ranges."""

from __future__ import annotations

import math
from collections.abc import Iterable
from decimal import Decimal, InvalidOperation

from cadapter.errors import UsageError

MOST = 100
"""How many strengths are compared at most."""


def strengths_of(texts: Iterable[str]) -> tuple[float, ...]:
    """Return the strengths that ``texts`` name, each a number T or a range FROM:TO:STEP; each strength once.

    Raises:
        UsageError: one is neither, or there are too many.
    """
    found = tuple(dict.fromkeys(t for text in texts for t in _strengths(text)))
    if len(found) > MOST:
        raise UsageError(f"--strength: {len(found)} strengths are too many; {MOST} are compared at most.")
    return found


def _strengths(text: str) -> list[float]:
    numbers = [_number(part, text) for part in text.split(":")]
    if len(numbers) == 1:
        return [float(numbers[0])]
    if len(numbers) != 3 or numbers[2] <= 0 or numbers[0] > numbers[1]:
        raise UsageError(
            f"--strength {text}: give a number, or FROM:TO:STEP with FROM below TO and STEP above 0, such as -2:2:0.5."
        )
    first, last, step = numbers
    count = int((last - first) / step) + 1  # exact: these are decimal fractions
    return [float(first + step * k) for k in range(min(count, MOST + 1))]


def _number(part: str, text: str) -> Decimal:
    try:
        number = Decimal(part.strip())
    except InvalidOperation:
        number = Decimal("nan")
    if not number.is_finite() or not math.isfinite(float(number)):
        raise UsageError(f"--strength {text}: {part.strip() or 'nothing'!r} is no number; give one, such as 0.5.")
    return number + 0  # no negative zero
