"""Control adapter → multiplicative LoRA: ``(I + W_t)·W_lin`` on every chosen residual writer, with the same A and B.

A multiplicative pair acts on what its module writes, the bias included: ``y + s·B·(A·y)``. Experts are writers each of
its own where the base's files hold them one by one, and one writer together where they hold them as one tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cadapter.adapters.directory import MULTIPLICATIVE_TYPE, ControlAdapterFiles, layer_ranges
from cadapter.adapters.layer_facts import patterns
from cadapter.adapters.lora_directory import lora_fields
from cadapter.convert.lora_directory import LoraPair, write_lora
from cadapter.convert.operators import Dial, Writers, find_target, module_name, operators
from cadapter.files import new_directory
from cadapter.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class MultiplicativeSummary:
    """What was written: layers, writers (pairs), rank; whether it is exact, and notes (see :class:`Target`)."""

    layers: int
    pairs: int
    rank: int
    exact: bool
    notes: tuple[str, ...]


def to_mult_lora(
    adapter: ControlAdapterFiles,
    output: Path,
    dial: Dial,
    base: Checkpoint | None = None,
    writers: Writers | None = None,
    force: bool = False,
) -> MultiplicativeSummary:
    """Write ``adapter`` at ``dial`` as a multiplicative LoRA directory: scale folded into B, ``lora_alpha = r``.

    Raises:
        UsageError: the adapter changes nothing, its power does not exist, its family is unknown, or ``output`` exists.
    """
    target = find_target(adapter, base, dial, writers)
    pairs = {
        module_name(layer, writer): LoraPair(operator.A, operator.B, 1.0)
        for layer, operator in operators(adapter, dial).items()
        for writer in target.names(layer)
    }
    names = sorted({module.rpartition(".")[2] for module in pairs})
    base_name = adapter.base_model_name_or_path
    config = lora_fields(MULTIPLICATIVE_TYPE, adapter.rank, adapter.rank, names, adapter.layers, base_name)
    config["base_model_type"] = base.config.model_type if base else adapter.base_model_type
    with new_directory(output, force) as directory:
        write_lora(directory, config, pairs, _card(adapter, dial, pairs, target.notes))
    return MultiplicativeSummary(len(adapter.layers), len(pairs), adapter.rank, target.exact, target.notes)


def _card(adapter: ControlAdapterFiles, dial: Dial, pairs: dict[str, LoraPair], notes: tuple[str, ...]) -> str:
    writers = patterns(sorted({module.split(".", 3)[3] for module in pairs}))
    return f"""---
library_name: cadapter
tags:
- multiplicative-lora
---

# Multiplicative LoRA

Made by `cadapter to-mult-lora` from the control adapter `{adapter.path.name}` (rank {adapter.rank}, layers
{layer_ranges(adapter.layers)}, site `{adapter.site}`) at {dial}, for `{adapter.base_model_name_or_path or "its base"}`.

Each of {", ".join(f"`{name}`" for name in writers)} becomes `(I + B·A)·W`. This is **not** an additive LoRA, although
the tensors have the names of one: a program that adds `B·A` to the weights is wrong. Merge it with
`cadapter merge BASE THIS OUTPUT`.
{"".join(f"{chr(10)}{note}{chr(10)}" for note in notes)}"""
