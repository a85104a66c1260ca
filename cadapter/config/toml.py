"""TOML through the standard library's parser, or its twin ``tomli`` on Python 3.10."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def parse_toml(source: str) -> dict[str, Any]:
    """Parse ``source``.

    Raises:
        ValueError: it is not TOML; the message ends with the place where the parser knows it.
    """
    try:
        return tomllib.loads(source)
    except RecursionError:
        raise ValueError("Values are nested too deeply") from None


def toml_text(value: Any, width: int = 60) -> str:
    """``value`` as it would stand in a TOML file, cut to ``width`` characters."""
    text = _whole_text(value)
    return text if len(text) <= width else text[: width - 1] + "…"


def _whole_text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + escaped.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t") + '"'
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_whole_text(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_whole_text(item)}" for key, item in value.items()) + " }" if value else "{}"
    return str(value)


def toml_key(path: Sequence[str | int]) -> str:
    """``path`` as a dotted key: ``datasets.0.control_class``; names that need quotes have them."""
    return ".".join(str(part) if _BARE_KEY.fullmatch(str(part)) else toml_text(part) for part in path)


def toml_type(value: Any) -> str:
    """What a TOML user calls the type of ``value``."""
    for kind, name in _TYPE_NAMES:
        if isinstance(value, kind):
            return name
    return "a date or time"


_TYPE_NAMES: tuple[tuple[type, str], ...] = (
    (bool, "a truth value"),
    (int, "an integer"),
    (float, "a number with a decimal point"),
    (str, "a string"),
    (list, "a list"),
    (dict, "a table"),
)
