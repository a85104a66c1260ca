"""The messages in docs/troubleshooting.md are those of the program."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"


def messages() -> list[str]:
    """The first cells of the tables of messages; in them "…" stands for what differs."""
    found = []
    for table in re.split(r"\n\n", PAGE.read_text("utf-8")):
        if table.startswith("| message |"):
            found += re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    return found


def pattern(message: str) -> re.Pattern[str]:
    """What ``message`` may look like in the code."""
    return re.compile(".*".join(map(re.escape, message.split("…"))))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """All texts in the code, each as one line; what is filled in is "…"."""
    found = []
    for file in sorted((ROOT / "cadapter").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append(" ".join("".join(parts).split("\n")))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(" ".join(node.value.split("\n")))
    return found


def test_there_are_messages() -> None:
    assert len(messages()) > 40


@pytest.mark.parametrize("message", messages())
def test_a_message_is_in_the_code(message: str, texts: list[str]) -> None:
    wanted = pattern(message)
    assert any(wanted.search(text) for text in texts)
