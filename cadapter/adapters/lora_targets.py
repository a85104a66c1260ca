"""Which linear layers and which tensors of experts LoRA goes to, and how that is spelled for PEFT."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from cadapter.errors import UsageError

RENAMED_BY_PEFT = ("gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")
"""Last names of modules that PEFT (0.21), when it loads an adapter for a mixture of experts, takes for those of the
unfused experts of older checkpoints and looks for in the fused tensors, wherever else they stand."""

_NUMBERED_EXPERT = re.compile(r"(.*\.)?experts\.\d+\..*")


@dataclass(frozen=True)
class Targets:
    """What LoRA goes to in one decoder block, by name within the block.

    Attributes:
        linears: linear layers, such as "self_attn.q_proj".
        experts: tensors of fused experts, [E, out, in], such as "mlp.experts.down_proj", in the block's order.
    """

    linears: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return self.linears + self.experts


@dataclass(frozen=True)
class ModelTargets:
    """What LoRA goes to in a whole model.

    Attributes:
        by_layer: of each layer where it goes to anything, in order.
        target_modules, target_parameters: the same as PEFT's config spells it.
    """

    by_layer: Mapping[int, Targets]
    target_modules: tuple[str, ...]
    target_parameters: tuple[str, ...]

    def pair_names(self) -> list[str]:
        """The names of all pairs of factors of the model, in order, such as "layers.3.self_attn.q_proj"."""
        return [f"layers.{layer}.{name}" for layer, targets in self.by_layer.items() for name in targets.names]


def last_part(name: str) -> str:
    """The name after the last dot: "self_attn.q_proj" → "q_proj"."""
    return name.rpartition(".")[2]


def _linears(block: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def _expert_tensors(block: nn.Module) -> list[str]:
    """Three-dimensional parameters of modules within a block, but for the kernels of convolutions."""
    return [
        f"{owner}.{name}"
        for owner, module in block.named_modules()
        if owner and not isinstance(module, (nn.Conv1d, nn.ConvTranspose1d))
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    ]


def scores(name: str, linear: nn.Linear) -> bool:
    """Whether a linear layer scores: it has one output, is called "gate" or has "router" in its name.

    Such a layer says how much of what others compute is used (``mlp.shared_expert_gate``) or which expert a token goes
    to; it is small, and moving it changes more than a low rank suggests.
    """
    return linear.out_features == 1 or last_part(name) == "gate" or "router" in name


def _fits(name: str, target: str) -> bool:
    """PEFT's rule for the names in a list."""
    return name == target or name.endswith(f".{target}")


def match_targets(block: nn.Module, targets: Iterable[str] | None) -> Targets:
    """Find what LoRA goes to in one decoder block, whose tensors need no memory.

    Args:
        block: as it is before anything was put in it.
        targets: names of linear layers and of tensors of fused experts: within the block, or only their ends from a
            dot on. None: every linear layer but those that score (see :func:`scores`), and no experts, for which
            PEFT has no dropout and few programs can serve a LoRA.
    """
    linears = _linears(block)
    if targets is None:
        return Targets(tuple(name for name, linear in linears.items() if not scores(name, linear)))
    wanted = list(targets)

    def chosen(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(name for name in names if any(_fits(name, target) for target in wanted))

    return Targets(chosen(linears), chosen(_expert_tensors(block)))


def match_model(
    blocks: Sequence[nn.Module],
    layers: Iterable[int],
    targets: Sequence[str] | None,
    dropout: float = 0.0,
    four_bit: bool = False,
) -> ModelTargets:
    """Find what LoRA goes to in a model, and make sure that it is all there.

    Args:
        blocks: all decoder blocks of the model (the meta device is enough).
        layers: those that may be adapted.
        targets: see :func:`match_targets`.
        dropout: that is wanted.
        four_bit: the base will be held in 4 bits.

    Raises:
        UsageError: a target is in none of these layers, or is one of experts that cannot have what is wanted.
    """
    layers = list(layers)
    found = {layer: match_targets(blocks[layer], targets) for layer in layers}
    by_layer = {layer: each for layer, each in found.items() if each.names}
    _check_matched([blocks[layer] for layer in layers], by_layer.values(), targets)
    experts = dict.fromkeys(name for each in by_layer.values() for name in each.experts)
    if four_bit and experts:
        raise _impossible("load_in_4bit", "peft has no LoRA on experts in 4 bits", experts)
    numbered = [name for each in by_layer.values() for name in each.linears if _NUMBERED_EXPERT.fullmatch(name)]
    if dropout > 0 and (experts or numbered):
        raise _impossible("lora_dropout", "inside experts it has no place to act", experts or numbered)
    return ModelTargets(by_layer, *_spelling(blocks, by_layer))


def _impossible(key: str, reason: str, experts: Iterable[str]) -> UsageError:
    return UsageError(
        f"{key} does not go with LoRA on experts ({', '.join(list(experts)[:4])}): {reason}.\n"
        f"Remove {key}, or leave experts out of target_modules."
    )


def count_parameters(block: nn.Module, targets: Targets, rank: int) -> int:
    """Return how many numbers the factors of a block's targets hold: r·(in + out) for each layer or expert."""
    linears = sum(
        linear.in_features + linear.out_features for name, linear in _linears(block).items() if name in targets.linears
    )
    shapes = [block.get_parameter(name).shape for name in targets.experts]
    return rank * (linears + sum(experts * (first + second) for experts, first, second in shapes))


def _check_matched(blocks: Iterable[nn.Module], found: Iterable[Targets], targets: Sequence[str] | None) -> None:
    names = [name for each in found for name in each.names]
    unmatched = [target for target in targets or () if not any(_fits(name, target) for name in names)]
    if names and not unmatched:
        return
    linears: dict[str, None] = {}  # a set that keeps its order
    experts: dict[str, None] = {}
    for block in blocks:
        linears.update(dict.fromkeys(_linears(block)))
        experts.update(dict.fromkeys(_expert_tensors(block)))
    if targets is None:
        problem = "The layers that are trained have no linear layer that LoRA could go to."
    else:
        lost = ", ".join(f'"{target}"' for target in unmatched) or "nothing"
        listed = ", ".join(f'"{target}"' for target in targets)
        problem = f"target_modules = [{listed}]: {lost} is in no layer that is trained."
    raise UsageError(
        f"{problem}\nTheir linear layers: {', '.join(linears) or 'none'}.\n"
        + (f"Their tensors of experts: {', '.join(experts)}.\n" if experts else "")
        + "A target is such a name, or its end from a dot on."
    )


def _spelling(blocks: Sequence[nn.Module], by_layer: Mapping[int, Targets]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What PEFT must be told so that it adapts exactly these: ``target_modules`` and ``target_parameters``.

    Modules go by their last names where no other module of these layers is called so. ``target_parameters`` holds for
    all layers unless it names one, so that each name is spelled with its layer.
    """
    mixture = any(_expert_tensors(block) for block in blocks)
    modules: dict[str, None] = {}
    parameters: list[str] = []
    for layer, targets in by_layer.items():
        parameters += [f"layers.{layer}.{name}" for name in targets.experts]
        for name in targets.linears:
            if mixture and last_part(name) in RENAMED_BY_PEFT:
                parameters.append(f"layers.{layer}.{name}.weight")
            else:
                modules[name] = None
    shortest = dict.fromkeys(last_part(name) for name in modules)
    ambiguous = any(
        last_part(name) in shortest and name not in targets.linears
        for layer, targets in by_layer.items()
        for name, _ in blocks[layer].named_modules()
    )
    return tuple(modules if ambiguous else shortest), tuple(parameters)
