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


_CONFIG_ROWS = (
    _Row("document_attention", lambda table: table.document_attention == "isolated", 'use "packed"'),
    _Row("attn_implementation", lambda table: table.attn_implementation == "flex_attention", 'use "auto" or "sdpa"'),
    _Row("trust_remote_code", lambda table: table.trust_remote_code is True),
)

_DATASET_ROWS = (
    _Row("messages_field", lambda table: table.messages_field is not None),
    _Row("class_field", lambda table: table.class_field is not None),
    _Row("chosen_field", lambda table: table.chosen_field is not None),
    _Row("rejected_field", lambda table: table.rejected_field is not None),
)


def unsupported(config: Any) -> list[Problem]:
    """What ``config`` asks for and cadapter cannot do yet; ``config`` as in :func:`cadapter.config.rules.conflicts`."""
    problems = [Problem((row.key,), _text(row)) for row in _CONFIG_ROWS if row.asked_for(config)]
    for index, dataset in enumerate(config.datasets):
        problems.extend(
            Problem(("datasets", index, row.key), _text(row)) for row in _DATASET_ROWS if row.asked_for(dataset)
        )
    return problems


def _text(row: _Row) -> str:
    return f"not supported yet; {row.remedy}"
