"""Converted LoRA directories, additive (PEFT's) and multiplicative (ours): config, reading and writing.

Both hold ``base_model.model.<module>.lora_A.weight`` [r, in or H] and ``….lora_B.weight`` [out, r]. An additive pair
changes a weight to ``W_lin + s·B·A``, a multiplicative one to ``(I + s·B·A)·W_lin``; ``peft_type`` tells them apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cadapter.adapters.directory import CONFIG_NAME, positive_number, read_adapter_config
from cadapter.adapters.lora_directory import lora_fields, read_pairs, refuse_unsupported, save_pairs
from cadapter.errors import UsageError


@dataclass(frozen=True)
class LoraPair:
    """One module's pair: A [r, in], B [out, r], ``scale`` = s, and the bias [out] that goes with B, if any."""

    A: Tensor
    B: Tensor
    scale: float
    bias: Tensor | None = None


@dataclass(frozen=True)
class LoraFiles:
    """A LoRA directory: its pairs by module name ("model.layers.0.mlp.down_proj")."""

    path: Path
    pairs: Mapping[str, LoraPair]


def lora_config(
    peft_type: str, rank: int, modules: Iterable[str], layers: Iterable[int], base: str | None, lora_bias: bool = False
) -> dict[str, Any]:
    """``adapter_config.json`` of a directory whose scale is folded into B (``lora_alpha = r``).

    Args:
        modules: names of writers within a layer; their last parts become ``target_modules``.
        layers: the adapted layers.
        base: the base model's name or path, where known.
        lora_bias: every pair has a bias beside B.
    """
    targets = sorted({module.rpartition(".")[2] for module in modules})
    return {**lora_fields(peft_type, rank, rank, targets, layers, base), "lora_bias": lora_bias}


def write_lora(directory: Path, config: Mapping[str, Any], pairs: Mapping[str, LoraPair], card: str) -> None:
    """Write ``pairs`` (by full module name, scale 1) and their config and card into an existing directory."""
    tensors = {}
    for module, pair in pairs.items():
        tensors[f"{module}.lora_A.weight"] = pair.A.float()
        tensors[f"{module}.lora_B.weight"] = pair.B.float()
        if pair.bias is not None:
            tensors[f"{module}.lora_B.bias"] = pair.bias.float()
    save_pairs(directory, config, tensors, card)


def _pattern_value(patterns: Mapping[str, Any] | None, module: str, default: float) -> float:
    """The value of the first of ``patterns`` that ends ``module``'s name as peft matches it, else ``default``."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(value)
    return default


def read_lora(path: Path) -> LoraFiles:
    """Read and validate a LoRA directory of either kind.

    The scale of a pair is ``alpha / r``, or ``alpha / √r`` with ``use_rslora``; r is the pair's own, alpha follows
    ``alpha_pattern``.

    Raises:
        UsageError: it uses what merge does not support, or anything is not right (file and tensor named).
    """
    config, file = read_adapter_config(path), path / CONFIG_NAME
    refuse_unsupported(config, file, "merge")
    if any(not str(name).endswith(".weight") for name in config.get("target_parameters") or ()):
        raise UsageError(f"{file}: LoRA on experts (target_parameters) is not supported by merge.")
    alpha = positive_number(config, "lora_alpha", file)
    pairs = {}
    for module, parts in read_pairs(path, "merge").items():
        rank = parts["A"].shape[0]
        own_alpha = _pattern_value(config.get("alpha_pattern"), module, alpha)
        scale = own_alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        pairs[module] = LoraPair(parts["A"], parts["B"], scale, parts.get("bias"))
    return LoraFiles(path, pairs)
