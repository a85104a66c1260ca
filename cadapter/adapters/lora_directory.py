"""LoRA directories on disk: what those that were trained and those that were converted have in common, and the former.

A directory holds ``base_model.model.<module>.lora_A.weight`` and ``….lora_B.weight``, an ``adapter_config.json`` as
PEFT has it, and a model card. ``peft.PeftModel.from_pretrained`` loads it. Tensors of fused experts go by the name of
the module that holds them; of several in one module, all but the last have PEFT's ``base_layer`` behind that name, once
for each that follows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cadapter.adapters.directory import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    check_layer_list,
    flag,
    layer_ranges,
    name_or_none,
    positive_number,
    read_adapter_config,
    read_adapter_tensors,
)
from cadapter.adapters.lora import NESTED, LoraBlock, LoraSettings
from cadapter.adapters.lora_targets import ModelTargets, Targets
from cadapter.errors import CadapterError, UsageError
from cadapter.files import write_json, write_text

LORA_TYPE = "LORA"

_LORA_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.(?:default\.)?(weight|bias)")
_LAYER_MODULE = re.compile(r"model\.layers\.([0-9]{1,9})\.(.+)")

_UNSUPPORTED = {
    "use_dora": "DoRA",
    "modules_to_save": "modules_to_save",
    "fan_in_fan_out": "fan_in_fan_out",
    "trainable_token_indices": "trainable_token_indices",
    "layer_replication": "layer_replication",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA",
}
_HARMLESS_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of ``init_lora_weights`` that leave the base model's weights as they are."""


LayerPairs = dict[tuple[int, str], dict[str, Tensor]]
"""Factors, "A" and "B", by layer and by the name of the module within it."""


# ---- what all LoRA directories have in common -------------------------------------------------------------------


def lora_fields(
    peft_type: str, rank: int, alpha: float, target_modules: Iterable[str], layers: Iterable[int], base: str | None
) -> dict[str, Any]:
    """``adapter_config.json`` of plain pairs: no biases, no dropout, and ``alpha / r`` as the scale."""
    return {
        "peft_type": peft_type,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "bias": "none",
        "lora_bias": False,
        "target_modules": list(target_modules),
        "layers_to_transform": sorted(layers),
    }


def save_pairs(directory: Path, config: Mapping[str, Any], factors: Mapping[str, Tensor], card: str) -> None:
    """Write tensors by what follows ``base_model.model.``, their config and card into an existing directory."""
    tensors = {
        f"base_model.model.{name}": factor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, factor in factors.items()
    }  # copies: modules may share a factor, and safetensors refuses tensors that share memory
    save_file(tensors, directory / WEIGHTS_NAME, metadata={"format": "pt"})
    write_json(directory / CONFIG_NAME, dict(config))
    write_text(directory / "README.md", card)


def refuse_unsupported(config: Mapping[str, Any], file: Path, program: str) -> None:
    """Make sure that a LoRA is nothing but pairs of factors beside the base's own weights.

    Args:
        config: of the directory.
        file: which holds it.
        program: what cannot do more, for the message.

    Raises:
        UsageError: it is more.
    """
    for key, name in _UNSUPPORTED.items():
        if config.get(key):
            raise UsageError(f"{file}: {name} ({key}) is not supported by {program}.\nUse this adapter with peft.")
    if config.get("bias", "none") != "none":
        raise UsageError(
            f"{file}: bias = {config['bias']!r} (trained biases of the base) is not supported by {program}."
        )
    if config.get("init_lora_weights") not in _HARMLESS_INITIALISATIONS:
        raise UsageError(
            f"{file}: init_lora_weights = {config['init_lora_weights']!r} changes the base model's own weights, "
            f"which {program} does not repeat.\nConvert it to a plain LoRA with peft first."
        )


def read_pairs(path: Path, program: str) -> dict[str, dict[str, Tensor]]:
    """Read the factors of a LoRA directory, by module: "A" [r.., in], "B" [out, r..], and "bias" where there is one.

    Raises:
        UsageError: a tensor is of another kind, not finite, alone, or of another rank than its fellow.
    """
    file = path / WEIGHTS_NAME
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_adapter_tensors(path).items():
        match = _LORA_KEY.fullmatch(name)
        if match is None or (match[2], match[3]) == ("A", "bias"):
            raise UsageError(
                f"{file}: {name} is no lora_A or lora_B weight of a linear layer: not supported by {program}."
            )
        part = match[2] if match[3] == "weight" else "bias"
        if part in found.setdefault(match[1], {}):
            raise UsageError(f"{file}: {name} names module {match[1]} a second time.")
        found[match[1]][part] = tensor
    for module, parts in found.items():
        missing = {"A", "B"} - parts.keys()
        if missing:
            raise UsageError(f"{file}: {module} has no lora_{missing.pop()}; its other factor is there.")
        A, B = parts["A"], parts["B"]
        if A.ndim != 2 or B.ndim != 2 or B.shape[1] != A.shape[0] or A.shape[0] == 0:
            raise UsageError(
                f"{file}: {module} has lora_A {list(A.shape)} and lora_B {list(B.shape)}: their ranks do not agree."
            )
    return found


# ---- directories of trained LoRAs -------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoraAdapterFiles:
    """A trained LoRA as its directory holds it.

    Attributes:
        path: the directory (for messages).
        settings: of all pairs; the targets are the names that were found.
        targets: what it goes to, by layer.
        tensors: by the names of ``TrainedLora.parameters``, as stored.
        base_model_name_or_path: the base, where recorded.
    """

    path: Path
    settings: LoraSettings
    targets: Mapping[int, Targets]
    tensors: Mapping[str, Tensor]
    base_model_name_or_path: str | None


def write_lora_adapter(
    directory: Path,
    tensors: Mapping[str, Tensor],
    settings: LoraSettings,
    targets: ModelTargets,
    base_name: str,
    base_type: str,
) -> None:
    """Write a trained LoRA into ``directory``, which exists (see :func:`cadapter.files.new_directory`).

    Factors and scale are kept as trained.

    Args:
        tensors: all factors of the model, by the names of ``TrainedLora.parameters``.
        settings, targets: of the run.
        base_name: the base as PEFT's config shall name it.
        base_type: its ``model_type``.
    """
    expected = {f"{name}.lora_{factor}" for name in targets.pair_names() for factor in "AB"}
    if tensors.keys() != expected:
        raise CadapterError(f"Factors of {sorted(tensors.keys() ^ expected)[:4]} are missing, or are none of this run.")
    factors = {
        f"model.layers.{layer}.{module}.lora_{factor}.weight": tensors[f"layers.{layer}.{name}.lora_{factor}"]
        for layer, each in targets.by_layer.items()
        for name, module in modules_on_disk(each).items()
        for factor in "AB"
    }
    config = lora_fields(LORA_TYPE, settings.rank, settings.alpha, targets.target_modules, targets.by_layer, base_name)
    if targets.target_parameters:
        config["target_parameters"] = list(targets.target_parameters)
    else:  # PEFT loads no target_parameters beside a dropout, although it would not act
        config["lora_dropout"] = settings.dropout
    save_pairs(directory, config, factors, _card(config, settings, targets, base_type))


def modules_on_disk(targets: Targets) -> dict[str, str]:
    """By target, the module whose name the factors of each target have in the file, both within the block."""
    modules = {name: name for name in targets.linears}
    following: dict[str, int] = {}
    for name in reversed(targets.experts):
        owner = name.rpartition(".")[0]
        modules[name] = owner + NESTED * following.get(owner, 0)
        following[owner] = following.get(owner, 0) + 1
    return modules


def read_lora_adapter(path: Path) -> LoraAdapterFiles:
    """Read and validate the directory of a trained LoRA, ours or another that PEFT loads and that is as plain.

    ``use_rslora`` is folded into ``alpha``, so that ``scale = alpha / r`` always holds. Of several tensors of experts
    in one module, ``target_parameters`` must name them in the module's order, as ours does.

    Raises:
        UsageError: anything is not right, with file and tensor or key named.
    """
    config, settings, pairs = _read(path)
    file = path / CONFIG_NAME
    tensors, targets = _named(path / WEIGHTS_NAME, pairs, settings.rank, parameters_named(config, file))
    check_layer_list(config, targets, file)
    names = tuple(dict.fromkeys(name for each in targets.values() for name in each.names))
    return LoraAdapterFiles(
        path, replace(settings, targets=names), targets, tensors, name_or_none(config, "base_model_name_or_path", file)
    )


def _read(path: Path) -> tuple[dict[str, Any], LoraSettings, LayerPairs]:
    """The config, what it says of all pairs, and the pairs; checked as far as each goes alone."""
    config, file = read_adapter_config(path), path / CONFIG_NAME
    if config.get("peft_type") != LORA_TYPE:
        raise UsageError(f"{file}: peft_type is {config.get('peft_type')!r}, so this is no LoRA.")
    refuse_unsupported(config, file, "training")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        raise UsageError(f"{file}: ranks or scales of single modules (rank_pattern, alpha_pattern) cannot be trained.")
    rank, alpha = positive_number(config, "r", file), positive_number(config, "lora_alpha", file)
    if not rank.is_integer():
        raise UsageError(f"{file}: r must be a whole number, not {rank}.")
    dropout = config.get("lora_dropout", 0.0)
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise UsageError(f"{file}: lora_dropout must be a number from 0 to below 1, not {dropout!r}.")
    pairs: LayerPairs = {}
    for module, parts in read_pairs(path, "training").items():
        match = _LAYER_MODULE.fullmatch(module)
        if match is None:
            raise UsageError(f"{path / WEIGHTS_NAME}: {module} is no module of a decoder layer: it cannot be trained.")
        if "bias" in parts:
            raise UsageError(f"{path / WEIGHTS_NAME}: {module} has a bias beside lora_B, which cannot be trained.")
        pairs[int(match[1]), match[2]] = parts
    half = all(parts[factor].dtype == torch.bfloat16 for parts in pairs.values() for factor in "AB")
    alpha = alpha * math.sqrt(rank) if flag(config, "use_rslora", file) else alpha
    settings = LoraSettings(int(rank), alpha, float(dropout), torch.bfloat16 if half else torch.float32)
    return config, settings, pairs


def parameters_named(config: Mapping[str, Any], file: Path) -> list[str]:
    """The tensors, by the ends of their names, that PEFT's ``target_parameters`` lists.

    Raises:
        UsageError: it is no list of names.
    """
    parameters = config.get("target_parameters") or []
    if not isinstance(parameters, list) or not all(isinstance(name, str) for name in parameters):
        raise UsageError(f"{file}: target_parameters must be a list of names.")
    return parameters


def _named(
    file: Path, pairs: LayerPairs, rank: int, parameters: Sequence[str]
) -> tuple[dict[str, Tensor], dict[int, Targets]]:
    """The factors by the names that they have in training, and the targets by layer."""
    tensors: dict[str, Tensor] = {}
    linears: dict[int, list[str]] = {}
    experts: dict[int, dict[str, int]] = {}
    for (layer, module), parts in pairs.items():
        name, rows = module.replace(NESTED, ""), parts["A"].shape[0]
        held = _tensors_of(f"layers.{layer}.{name}", parameters)
        is_expert = held not in ([], ["weight"])
        if rows % rank != 0 if is_expert else rows != rank:
            expected = f"[{rank}{' · experts' if is_expert else ''}, in]"
            raise UsageError(
                f"{file}: lora_A of layers.{layer}.{module} has shape {list(parts['A'].shape)}; with r = {rank} it "
                f"must be {expected}."
            )
        if is_expert:
            depth = module.count(NESTED)
            if depth >= len(held):
                raise UsageError(f"{file}: layers.{layer}.{module} is one more than target_parameters names.")
            name = f"{name}.{held[-1 - depth]}"
            experts.setdefault(layer, {})[name] = depth
        else:
            linears.setdefault(layer, []).append(name)
        for factor in "AB":
            tensors[f"layers.{layer}.{name}.lora_{factor}"] = parts[factor]
    return tensors, {
        layer: Targets(tuple(linears.get(layer, ())), _innermost_first(experts.get(layer, {})))
        for layer in sorted(linears.keys() | experts.keys())
    }


def _innermost_first(depths: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(sorted(depths, key=lambda name: -depths[name]))


def _tensors_of(module: str, parameters: Sequence[str]) -> list[str]:
    """The last names of those of PEFT's ``target_parameters`` that ``module`` holds, in their order."""
    found = []
    for parameter in parameters:
        owner, _, tensor = parameter.rpartition(".")
        if owner and f".{module}".endswith(f".{owner}"):
            found.append(tensor)
    return found


def load_into(blocks: Iterable[LoraBlock], directory: Path, layers: Collection[int] | None = None) -> None:
    """Take over the factors that ``directory`` holds for these blocks.

    Args:
        blocks: of this stage.
        directory: ours, or another that PEFT loads and that is as plain.
        layers: all adapted layers of the model, where no other may be in the directory.

    Raises:
        UsageError: a pair of a block is not there, one is there that the run does not have, or shapes or the scale
            differ.
    """
    _, settings, pairs = _read(directory)
    file = directory / WEIGHTS_NAME
    for layer, module in pairs:
        if layers is not None and layer not in layers:
            raise UsageError(
                f"{file} holds {module} of layer {layer}, which this run does not train.\nSee layers_to_transform."
            )
    for block in blocks:
        if not math.isclose(settings.scale, block.settings.scale, rel_tol=1e-9):
            raise UsageError(
                f"{directory / CONFIG_NAME}: the scale alpha / r is {settings.scale:g}; in this run it is "
                f"{block.settings.scale:g}.\nSet lora_rank = {settings.rank} and lora_alpha = {settings.alpha:g}."
            )
        own = {block.paths[name]: pair for name, pair in block.pairs().items()}
        where = f"of layer {block.layer}"
        for layer, module in pairs:
            if layer == block.layer and module not in own:
                raise UsageError(f"{file} holds {module} {where}, which this run does not train.\nSee target_modules.")
        for module, pair in own.items():
            stored = pairs.get((block.layer, module))
            if stored is None:
                raise UsageError(f"{file} does not hold {module} {where}, which this run trains.\nSee target_modules.")
            for factor, parameter in (("A", pair.A), ("B", pair.B)):
                if stored[factor].shape != parameter.shape:
                    raise UsageError(
                        f"{file}: lora_{factor} of {module} {where} has shape {list(stored[factor].shape)}; this run "
                        f"needs {list(parameter.shape)}."
                    )
                parameter.data.copy_(stored[factor])


def _card(config: Mapping[str, Any], settings: LoraSettings, targets: ModelTargets, base_type: str) -> str:
    names = dict.fromkeys(name for each in targets.by_layer.values() for name in each.names)
    return f"""---
library_name: peft
tags:
- lora
---

# LoRA

Trained by `cadapter train`. The factors and their scale are as they were trained.

| | |
|---|---|
| base model | `{config["base_model_name_or_path"]}` ({base_type}) |
| rank, alpha, scale | {settings.rank}, {settings.alpha:g}, {settings.scale:g} |
| layers | {layer_ranges(targets.by_layer)} ({len(targets.by_layer)}) |
| targets | {", ".join(f"`{name}`" for name in names)} |

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "THIS_DIRECTORY")
```
"""
