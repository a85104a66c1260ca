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
    _Row("full_fine_tune", lambda table: table.full_fine_tune is True, "set use_control_adapters = true instead"),
    _Row("load_in_4bit", lambda table: table.load_in_4bit is True),
    _Row("target_modules", lambda table: table.target_modules is not None),
    _Row("control_form", lambda table: table.control_form == "symmetric", 'use "general"'),
    _Row("control_gamma", lambda table: table.control_gamma not in (None, 0.5)),
    _Row("gradient_dtype", lambda table: table.gradient_dtype == "bfloat16", 'use "float32"'),
    _Row("document_attention", lambda table: table.document_attention == "isolated", 'use "packed"'),
    _Row(
        "activation_checkpointing",
        lambda table: table.activation_checkpointing in ("selective", "offload"),
        'use "auto", "none", "full" or an integer',
    ),
    _Row("compile", lambda table: table.compile is True, 'use "auto" or false'),
    _Row(
        "attn_implementation",
        lambda table: table.attn_implementation not in (None, "auto", "sdpa", "eager"),
        'use "auto", "sdpa" or "eager"',
    ),
    _Row("init_from", lambda table: table.init_from is not None),
    _Row("trust_remote_code", lambda table: table.trust_remote_code is True),
    _Row("lora_weight_dtype", lambda table: table.lora_weight_dtype == "bfloat16", 'use "float32"'),
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
    if config.use_control_adapters is False and not config.full_fine_tune:
        text = "LoRA training is not supported yet; set use_control_adapters = true"
        problems.append(Problem(("use_control_adapters",), text))
    for index, dataset in enumerate(config.datasets):
        problems.extend(
            Problem(("datasets", index, row.key), _text(row)) for row in _DATASET_ROWS if row.asked_for(dataset)
        )
    return problems


def _text(row: _Row) -> str:
    return f"not supported yet; {row.remedy}"
