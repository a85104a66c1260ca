"""On which line of a TOML source each key stands.

A scanner, not a second parser: it takes a source that ``tomllib`` has accepted, walks over its keys, headers and
values without interpreting them, and notes where they start. Paths are those of the parsed data:
``("lr",)``, ``("datasets", 1, "control_class")``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from cadapter.config.toml import parse_toml

KeyPath = tuple[str | int, ...]

_BLANK = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)*")
_SPACE = re.compile(r"[ \t]*")
_STRING = re.compile(
    r'''"""(?:[^"\\]|\\.|"{1,2}(?!"))*"{3,5}'''
    r"""|'''(?:[^']|'{1,2}(?!'))*'{3,5}"""
    r'''|"(?:[^"\\\n]|\\.)*"'''
    r"""|'[^'\n]*'""",
    re.DOTALL,
)
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_SCALAR = re.compile(r"[^,\]}#\n]+")


def index_lines(source: str) -> dict[KeyPath, int]:
    """The line (from 1) of every key, table, array element and inline table of ``source``, which is valid TOML."""
    scanner = _Scanner(source)
    scanner.document()
    return scanner.lines


def line_of(lines: Mapping[KeyPath, int], path: KeyPath) -> int | None:
    """The line of ``path``, or of the innermost table around it that has one."""
    for length in range(len(path), 0, -1):
        if path[:length] in lines:
            return lines[path[:length]]
    return None


class _Scanner:
    def __init__(self, source: str) -> None:
        self.source = source
        self.position = 0
        self.line = 1
        self.lines: dict[KeyPath, int] = {}
        self.array_lengths: dict[KeyPath, int] = {}

    def document(self) -> None:
        table: KeyPath = ()
        while self.skip(_BLANK):
            if self.take("[["):
                table = self.array_header()
            elif self.take("["):
                table = self.header()
            else:
                self.key_and_value(table)

    def header(self) -> KeyPath:
        line, keys = self.line, self.dotted_key()
        self.take("]")
        return self.note((), keys, line)

    def array_header(self) -> KeyPath:
        line, keys = self.line, self.dotted_key()
        self.take("]]")
        array = (*self.note((), keys[:-1], line), keys[-1])
        index = self.array_lengths.get(array, 0)
        self.array_lengths[array] = index + 1
        self.lines.setdefault(array, line)
        table = (*array, index)
        self.lines[table] = line
        return table

    def key_and_value(self, table: KeyPath) -> None:
        line, keys = self.line, self.dotted_key()
        self.take("=")
        self.skip(_SPACE)
        self.value(self.note(table, keys, line))

    def note(self, table: KeyPath, keys: list[str], line: int) -> KeyPath:
        """Note ``line`` for every table on the way to ``keys`` that is new; the path, through arrays' last tables."""
        path = table
        for key in keys:
            path = (*path, key)
            self.lines.setdefault(path, line)
            if path in self.array_lengths:
                path = (*path, self.array_lengths[path] - 1)
        return path

    def dotted_key(self) -> list[str]:
        keys = []
        while True:
            self.skip(_SPACE)
            bare = self.match(_BARE_KEY)
            keys.append(bare or parse_toml(f"key = {self.match(_STRING)}")["key"])
            self.skip(_SPACE)
            if not self.take("."):
                return keys

    def value(self, path: KeyPath) -> None:
        if self.take("["):
            index = 0
            while self.next_member("]"):
                member = (*path, index)
                self.lines[member] = self.line
                self.value(member)
                index += 1
        elif self.take("{"):
            while self.next_member("}"):
                self.key_and_value(path)
        elif not self.match(_STRING):
            self.match(_SCALAR)

    def next_member(self, end: str) -> bool:
        """Go to the next member of an array or inline table; false, and past it, where the closing ``end`` stands."""
        self.skip(_BLANK)
        if self.take(","):
            self.skip(_BLANK)
        return not self.take(end)

    def match(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self.source, self.position)
        text = found.group() if found else ""
        self.position += len(text)
        self.line += text.count("\n")
        return text

    def take(self, token: str) -> bool:
        found = self.source.startswith(token, self.position)
        self.position += len(token) if found else 0
        return found

    def skip(self, pattern: re.Pattern[str]) -> bool:
        """Skip ``pattern``; whether anything of the source is left."""
        self.match(pattern)
        return self.position < len(self.source)
