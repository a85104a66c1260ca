"""Commands on a real pseudo-terminal: what they write to it, and what stands on the screen from moment to moment."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tests.tiny_project import environment

PATIENCE = 180
UP = "\x1b[1A\x1b[2K"
"""What rich writes for each line that it draws over; before it draws again, it erases the one it stands in, too."""
_ERASING = re.compile(rf"\r(?:\x1b\[2K)?(?:{re.escape(UP)})*")
_STYLE = re.compile(r"\x1b\[[\d;]*m")
_CURSOR = re.compile(r"\x1b\[\?25[lh]")


@dataclass(frozen=True)
class Session:
    """A command that ended: its exit code, and all that it wrote to the terminal, both streams."""

    code: int
    written: bytes

    def text(self, encoding: str = "utf-8") -> str:
        """What was written, with plain line ends."""
        return self.written.decode(encoding).replace("\r\n", "\n")

    def screens(self) -> Iterator[list[str]]:
        """What stood in the terminal, scrolled-out lines included, whenever it was about to be drawn over, and at last.

        Only what rich's live display writes is understood: anything else that moves the cursor is an error.
        """
        lines: list[str] = [""]
        text, place = _CURSOR.sub("", self.text()), 0
        for erasing in _ERASING.finditer(text):
            _write(lines, text[place : erasing.start()])
            yield list(lines)
            ups = erasing.group().count(UP)
            assert ups < len(lines), "more is drawn over than there is"
            del lines[len(lines) - ups :]
            lines[-1] = ""
            place = erasing.end()
        _write(lines, text[place:])
        yield list(lines)


def _write(lines: list[str], text: str) -> None:
    rest = _STYLE.sub("", text)
    assert "\x1b" not in rest, repr(rest)
    assert "\r" not in rest.replace("\r\n", "\n"), repr(rest)
    first, *more = text.split("\n")
    lines[-1] += first
    lines.extend(more)


def plain(lines: Sequence[str]) -> list[str]:
    """Lines without colours."""
    return [_STYLE.sub("", line) for line in lines]


def on_terminal(command: Sequence[str], columns: int = 100, rows: int = 40, **changes: str) -> Session:
    """Run a command whose three streams are a terminal of this size."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    hidden = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "COLORTERM")
    variables = {name: value for name, value in environment().items() if name not in hidden}
    process = subprocess.Popen(
        list(command), stdin=follower, stdout=follower, stderr=follower,
        env={**variables, "TERM": "xterm-256color", **changes},
    )  # fmt: skip
    os.close(follower)
    written, deadline = b"", time.monotonic() + PATIENCE
    try:
        while time.monotonic() < deadline:
            if select.select([leader], [], [], 0.1)[0]:
                try:
                    chunk = os.read(leader, 1 << 16)
                except OSError:  # nobody has the other end any more
                    break
                written += chunk
        return Session(process.wait(10), written)
    finally:
        process.kill()
        os.close(leader)
