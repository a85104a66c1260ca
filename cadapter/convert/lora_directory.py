"""LoRA directories on disk, additive (PEFT's) and multiplicative (ours): names, config, reading and writing.

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

import torch
from safetensors.torch import save_file
from torch import Tensor

from cadapter.adapters.directory import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    positive_number,
    read_adapter_config,
    read_adapter_tensors,
)
from cadapter.errors import UsageError
from cadapter.files import write_json, write_text

_LORA_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.(?:default\.)?(weight|bias)")

_UNSUPPORTED = {
    "use_dora": "DoRA",
    "modules_to_save": "modules_to_save",
    "fan_in_fan_out": "fan_in_fan_out",
    "target_parameters": "target_parameters",
    "trainable_token_indices": "trainable_token_indices",
    "layer_replication": "layer_replication",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA",
}
_HARMLESS_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of ``init_lora_weights`` that leave the base model's weights as they are."""


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
    return {
        "peft_type": peft_type,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "bias": "none",
        "lora_bias": lora_bias,
        "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
        "layers_to_transform": sorted(layers),
    }


def write_lora(directory: Path, config: Mapping[str, Any], pairs: Mapping[str, LoraPair], card: str) -> None:
    """Write ``pairs`` (by full module name, scale 1) and their config and card into an existing directory."""
    tensors = {}
    for module, pair in pairs.items():
        prefix = f"base_model.model.{module}"
        tensors[f"{prefix}.lora_A.weight"] = _own(pair.A)
        tensors[f"{prefix}.lora_B.weight"] = _own(pair.B)
        if pair.bias is not None:
            tensors[f"{prefix}.lora_B.bias"] = _own(pair.bias)
    save_file(tensors, directory / WEIGHTS_NAME, metadata={"format": "pt"})
    write_json(directory / CONFIG_NAME, dict(config))
    write_text(directory / "README.md", card)


def _own(tensor: Tensor) -> Tensor:
    """A float32 copy with memory of its own: writers share A and B, and safetensors refuses tensors that share."""
    return tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _refuse_unsupported(config: Mapping[str, Any], file: Path) -> None:
    for key, name in _UNSUPPORTED.items():
        if config.get(key):
            raise UsageError(f"{file}: {name} ({key}) is not supported by merge.\nMerge this adapter with peft.")
    if config.get("bias", "none") != "none":
        raise UsageError(f"{file}: bias = {config['bias']!r} (trained biases of the base) is not supported by merge.")
    if config.get("init_lora_weights") not in _HARMLESS_INITIALISATIONS:
        raise UsageError(
            f"{file}: init_lora_weights = {config['init_lora_weights']!r} changes the base model's own weights, "
            "which merge does not repeat.\nConvert it to a plain LoRA with peft first."
        )


def _pattern_value(patterns: Mapping[str, Any] | None, module: str, default: float) -> float:
    """The value of the first of ``patterns`` that ends ``module``'s name as peft matches it, else ``default``."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(value)
    return default


def _grouped(path: Path) -> dict[str, dict[str, Tensor]]:
    file = path / WEIGHTS_NAME
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_adapter_tensors(path).items():
        match = _LORA_KEY.fullmatch(name)
        if match is None or (match[2], match[3]) == ("A", "bias"):
            raise UsageError(f"{file}: {name} is no lora_A or lora_B weight of a linear layer: not supported by merge.")
        part = match[2] if match[3] == "weight" else "bias"
        if part in found.setdefault(match[1], {}):
            raise UsageError(f"{file}: {name} names module {match[1]} a second time.")
        found[match[1]][part] = tensor
    return found


def read_lora(path: Path) -> LoraFiles:
    """Read and validate a LoRA directory of either kind.

    The scale of a pair is ``alpha / r``, or ``alpha / √r`` with ``use_rslora``; r is the pair's own, alpha follows
    ``alpha_pattern``.

    Raises:
        UsageError: it uses what merge does not support, or anything is not right (file and tensor named).
    """
    config, file = read_adapter_config(path), path / CONFIG_NAME
    _refuse_unsupported(config, file)
    alpha = positive_number(config, "lora_alpha", file)
    pairs = {}
    for module, parts in _grouped(path).items():
        missing = {"A", "B"} - parts.keys()
        if missing:
            raise UsageError(f"{path / WEIGHTS_NAME}: {module} has no lora_{missing.pop()}; its other factor is there.")
        A, B = parts["A"], parts["B"]
        rank = A.shape[0]
        if A.ndim != 2 or B.ndim != 2 or B.shape[1] != rank or rank == 0:
            raise UsageError(
                f"{path / WEIGHTS_NAME}: {module} has lora_A {list(A.shape)} and lora_B {list(B.shape)}: their ranks "
                "do not agree."
            )
        own_alpha = _pattern_value(config.get("alpha_pattern"), module, alpha)
        scale = own_alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        pairs[module] = LoraPair(A, B, scale, parts.get("bias"))
    return LoraFiles(path, pairs)
