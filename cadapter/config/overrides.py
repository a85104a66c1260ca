"""``--set KEY=VALUE``: values of the config given on the command line."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cadapter.config.lines import KeyPath
from cadapter.config.toml import parse_toml


@dataclass(frozen=True)
class Override:
    """One ``--set``: its text as given, and the path in the config that it has set."""

    text: str
    path: KeyPath

    def covers(self, path: KeyPath) -> bool:
        """Whether what stands at ``path`` was set by this override, wholly or in part."""
        return path[: len(self.path)] == self.path or self.path[: len(path)] == path


def apply_override(data: dict[str, Any], text: str) -> Override | str:
    """Set in ``data`` what the ``KEY=VALUE`` in ``text`` says; the override, or why there is none.

    KEY is a dotted path; VALUE is TOML, or else a string as it is.
    """
    key, equals, value = text.partition("=")
    steps = [step.strip() for step in key.split(".")]
    if not equals or not all(steps):
        return "not of the form KEY=VALUE; write for example lr=1e-5 or datasets.0.control_class=-1"
    try:
        return Override(text, _set(data, steps, _parse(value.strip())))
    except ValueError as error:
        return str(error)


def _parse(value: str) -> Any:
    try:
        table = parse_toml(f"value = {value}")
    except ValueError:
        return value
    # No key holds a time: "16:31" is layers, even to a TOML parser that reads it as a time of day.
    is_time = isinstance(table["value"], (datetime.date, datetime.time))
    return value if is_time or len(table) > 1 else table["value"]


def _set(data: dict[str, Any], steps: Sequence[str], value: Any) -> KeyPath:
    """Set ``value`` in ``data`` at the end of ``steps``, making tables on the way; the path that was taken."""
    table: Any = data
    path: list[str | int] = []
    for depth, step in enumerate(steps):
        here = ".".join(steps[:depth])
        key: Any = step
        if isinstance(table, list):
            if not (step.isascii() and step.isdigit() and int(step) < len(table)):
                raise ValueError(f'"{step}" is none of the {len(table)} members of {here}; count from 0')
            key = int(step)
        elif not isinstance(table, dict):
            raise ValueError(f"{here} is no table; set {here} itself")
        path.append(key)
        if depth == len(steps) - 1:
            table[key] = value
        elif isinstance(table, dict):
            table = table.setdefault(key, {})
        else:
            table = table[key]
    return tuple(path)


def overridden_by(overrides: Sequence[Override], path: KeyPath, in_file: bool) -> Override | None:
    """The last override that set ``path``; for a path of the file, only one that replaced it or what is around it."""
    for override in reversed(overrides):
        if override.covers(path) and (not in_file or len(override.path) <= len(path)):
            return override
    return None
