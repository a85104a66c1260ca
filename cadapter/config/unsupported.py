"""Keys that are part of the config and whose feature is not there yet: refused, never ignored.

Supporting a feature means deleting its rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cadapter.config.rules import Problem


@dataclass(frozen=True)
class _Row:
    key: str
    asked_for: Callable[[Any], bool]
    remedy: str = "remove the key"


_CONFIG_ROWS = (_Row("trust_remote_code", lambda table: table.trust_remote_code is True),)


def unsupported(config: Any) -> list[Problem]:
    """What ``config`` asks for and cadapter cannot do yet; ``config`` as in :func:`cadapter.config.rules.conflicts`."""
    return [Problem((row.key,), _text(row)) for row in _CONFIG_ROWS if row.asked_for(config)]


def _text(row: _Row) -> str:
    return f"not supported yet; {row.remedy}"
