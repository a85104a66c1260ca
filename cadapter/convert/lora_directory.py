"""Converted LoRA directories, additive (PEFT's) and multiplicative (ours): config, reading and writing.

Both hold ``base_model.model.<module>.lora_A.weight`` [r, in or H] and ``….lora_B.weight`` [out, r]. An additive pair
changes a weight to ``W_lin + s·B·A``, a multiplicative one to ``(I + s·B·A)·W_lin``; ``peft_type`` tells them apart.

An additive LoRA on E fused experts, as PEFT has it, stands there as A [E·r, in], expert after expert, and B [out, r·E],
whose columns are those of all experts for one direction, then for the next.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cadapter.adapters.directory import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    check_layer_list,
    flag,
    positive_number,
    read_adapter_config,
)
from cadapter.adapters.lora_directory import (
    LoraAdapterFiles,
    parameters_named,
    read_lora_adapter,
    read_pairs,
    refuse_unsupported,
    save_pairs,
)
from cadapter.errors import UsageError

_LAYER = re.compile(r"(?:^|\.)layers\.([0-9]{1,9})\.")


@dataclass(frozen=True)
class LoraPair:
    """One module's pair: A [r, in], B [out, r], ``scale`` = s, and the bias [out] that goes with B, if any.

    Of E experts together: A [E, r, in], B [E, out, r].
    """

    A: Tensor
    B: Tensor
    scale: float
    bias: Tensor | None = None


@dataclass(frozen=True)
class LoraFiles:
    """A LoRA directory: its pairs by module ("model.layers.0.mlp.down_proj"), or by the tensor of fused experts."""

    path: Path
    pairs: Mapping[str, LoraPair]


def write_lora(directory: Path, config: Mapping[str, Any], pairs: Mapping[str, LoraPair], card: str) -> None:
    """Write ``pairs`` (by full module name, scale 1) and their config and card into an existing directory."""
    tensors = {}
    for module, pair in pairs.items():
        A, B = pair.A.float(), pair.B.float()
        if A.ndim == 3:
            A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
        tensors[f"{module}.lora_A.weight"] = A
        tensors[f"{module}.lora_B.weight"] = B
        if pair.bias is not None:
            tensors[f"{module}.lora_B.bias"] = pair.bias.float()
    save_pairs(directory, config, tensors, card)


def _patterns(config: Mapping[str, Any], key: str, file: Path) -> dict[re.Pattern[str], float]:
    """The numbers that a config gives for modules whose names end as a pattern, as peft matches them.

    Raises:
        UsageError: a pattern or a number is none.
    """
    given = config.get(key) or {}
    if not isinstance(given, dict):
        raise UsageError(f"{file}: {key} must be a table of patterns and numbers, not {given!r}.")
    try:
        return {re.compile(rf"(.*\.)?({pattern})$"): positive_number(given, pattern, file) for pattern in given}
    except (re.error, RecursionError, OverflowError) as error:
        raise UsageError(f"{file}: {key} holds a pattern that is none: {error}.") from error


def _value_for(module: str, patterns: Mapping[re.Pattern[str], float], default: float) -> float:
    """The number of the first pattern that fits ``module``."""
    return next((value for pattern, value in patterns.items() if pattern.match(module)), default)


def read_lora(path: Path, program: str = "merge") -> LoraFiles:
    """Read and validate a LoRA directory of either kind.

    The scale of a pair is ``alpha / r``, or ``alpha / √r`` with ``use_rslora``; alpha and r follow ``alpha_pattern``
    and ``rank_pattern``. Where experts are adapted, all pairs have one rank and one scale.

    Args:
        program: which reads it, for messages.

    Raises:
        UsageError: it uses what is not supported, or anything is not right (file and tensor named).
    """
    config, file = read_adapter_config(path), path / CONFIG_NAME
    refuse_unsupported(config, file, program)
    if any(not name.endswith(".weight") for name in parameters_named(config, file)):
        return LoraFiles(path, _with_experts(read_lora_adapter(path)))
    alpha, r = positive_number(config, "lora_alpha", file), positive_number(config, "r", file)
    alphas, ranks = (_patterns(config, key, file) for key in ("alpha_pattern", "rank_pattern"))
    stabilised = flag(config, "use_rslora", file)
    pairs, layers = {}, set()
    for module, parts in read_pairs(path, program).items():
        rank = parts["A"].shape[0]
        expected = _value_for(module, ranks, r)
        if rank != expected:
            raise UsageError(
                f"{path / WEIGHTS_NAME}: lora_A of {module} has shape {list(parts['A'].shape)}; by r and rank_pattern "
                f"of {CONFIG_NAME} it must be [{expected:g}, in]."
            )
        scale = _value_for(module, alphas, alpha) / (math.sqrt(rank) if stabilised else rank)
        pairs[module] = LoraPair(parts["A"], parts["B"], scale, parts.get("bias"))
        layers |= {int(number) for number in _LAYER.findall(module)}
    check_layer_list(config, layers, file, more=True)
    return LoraFiles(path, pairs)


def _with_experts(files: LoraAdapterFiles) -> dict[str, LoraPair]:
    """The pairs of a LoRA some of which are on fused experts."""
    rank, scale, pairs = files.settings.rank, files.settings.scale, {}
    for layer, targets in files.targets.items():
        for name in targets.names:
            A, B = (files.tensors[f"layers.{layer}.{name}.lora_{factor}"] for factor in "AB")
            if name in targets.experts:
                A, B = A.unflatten(0, (-1, rank)), B.unflatten(1, (rank, -1)).permute(2, 0, 1)
            pairs[f"model.layers.{layer}.{name}"] = LoraPair(A, B, scale)
    return pairs
