"""What was found about one thing, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "broken"]

GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        part: the section of the report.
        name: what was looked at.
        status: "ok"; "warning": it works, and something may be better; "broken": something will fail.
        text: what was found.
        remedy: what to do; empty where there is nothing to do.
    """

    part: str
    name: str
    status: Status
    text: str
    remedy: str = ""


def size(count: float) -> str:
    """Bytes in words."""
    return f"{count / GIB:,.1f} GiB" if count >= GIB else f"{count / 2**20:,.0f} MiB"


def first_line(error: BaseException) -> str:
    """An exception in one line."""
    words = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {words}" if words else type(error).__name__
