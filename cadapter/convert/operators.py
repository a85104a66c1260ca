"""What a conversion applies to each layer's residual writers: which operator, on which writers, and how exactly.

A residual writer is a linear layer whose output is added to the residual stream. A control adapter turned into
weights becomes ``(I + W_t)·W_lin`` on its writers, with ``I + W_t = (I + W)^t`` (strength) or ``I + x·W`` (scale).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from cadapter.adapters.directory import ControlAdapterFiles, validate_against
from cadapter.adapters.factors import Factors, LowRank
from cadapter.adapters.layer_facts import LayerFacts, describe_layers, patterns
from cadapter.adapters.strengths import neumann_note
from cadapter.errors import UsageError
from cadapter.models.checkpoint import Checkpoint
from cadapter.models.families import FAMILIES
from cadapter.models.loading import family_for

Writers = Literal["mlp", "all"]


@dataclass(frozen=True)
class Dial:
    """How far to turn an adapter: ``(I + W)^strength``, then the change itself times ``factor``.

    At most one of the two differs from 1: a linear scale x is (1, x), the inverse is (−1, 1). ``is_power`` tells a
    strength that was asked for by its name.
    """

    strength: float = 1.0
    factor: float = 1.0
    is_power: bool = False

    @classmethod
    def from_options(cls, strength: float | None = None, scale: float | None = None, inverse: bool = False) -> Dial:
        """The dial of the options --strength, --scale and --inverse, which exclude one another.

        Raises:
            UsageError: more than one of them is given, or a scale that is no finite number.
        """
        given = [
            name
            for name, is_given in (
                ("--strength", strength is not None),
                ("--scale", scale is not None),
                ("--inverse", inverse),
            )
            if is_given
        ]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} exclude one another: give one of them.")
        if scale is not None and not math.isfinite(scale):
            raise UsageError(f"--scale {scale}: give a finite number.")
        if inverse:
            return cls(strength=-1.0)
        return cls(1.0 if strength is None else strength, 1.0 if scale is None else scale, strength is not None)

    def __str__(self) -> str:
        return f"scale {self.factor:g}" if self.factor != 1 else f"strength {self.strength:g}"


def fold(factors: Factors, scale: float, dial: Dial, where: str) -> LowRank:
    """A and B with ``B·A = x·((I + W)^t − I)``: float64 inside, float32 out.

    Raises:
        UsageError: this power does not exist; ``where`` (the layer) is named.
    """
    turned = factors.turned(dial.strength, scale, where)
    return LowRank(turned.A.float(), (dial.factor * turned.B).float())


def does_nothing(operator: LowRank) -> bool:
    """Whether ``B·A = 0`` because a factor is zero."""
    return not (operator.A.any() and operator.B.any())


def operators(adapter: ControlAdapterFiles, dial: Dial) -> dict[int, LowRank]:
    """Folded factors by layer: the change of layer N's writers is ``B·A·W_lin``.

    Raises:
        UsageError: a power does not exist (the layer is named), or the adapter changes nothing at all.
    """
    folded = {
        layer: fold(factors, adapter.scale, dial, f"{adapter.path}, layer {layer}")
        for layer, factors in adapter.layers.items()
    }
    if all(does_nothing(operator) for operator in folded.values()):
        raise UsageError(
            f"{adapter.path} at {dial} changes nothing: W = 0 in every layer.\n"
            "Give another strength, or one that was trained."
        )
    return folded


@dataclass(frozen=True)
class Target:
    """Where an adapter's operators go.

    Attributes:
        facts: the layers' facts by layer number.
        writers: "mlp" or "all".
        exact: the change of the writers is the adapter, to rounding.
        notes: what the user must hear: that the result only approximates the adapter, that the base is of another
            type than the one it was trained on or of one that is in no table, or how far the exact inverse is from the
            one it was trained with.
    """

    facts: Mapping[int, LayerFacts]
    writers: Writers
    exact: bool
    notes: tuple[str, ...]

    def names(self, layer: int) -> tuple[str, ...]:
        """The chosen writers of ``layer``, by name within the layer."""
        facts = self.facts[layer]
        return facts.mlp if self.writers == "mlp" else (*facts.attention, *facts.mlp)


def _approximation(site: str, writers: Writers, parallel: bool, post_norms: bool) -> str | None:
    if (site, writers) in (("mlp", "mlp"), ("writes", "all")):
        return None
    if site == "block" and writers == "all" and parallel and not post_norms:
        return None
    if site == "block" and writers == "all":
        return (
            "This is an approximation: the adapter acts on the whole block, which no LoRA can express exactly here "
            '(control_site = "writes" or "mlp" converts exactly).'
        )
    return (
        f"This is an approximation: the adapter was trained at site {site!r}, and --writers {writers} differs from it."
    )


def find_target(adapter: ControlAdapterFiles, base: Checkpoint | None, dial: Dial, writers: Writers | None) -> Target:
    """Tell the writers to change: from the base where it is given, else from what the adapter records.

    Args:
        dial: how far the adapter will be turned, for the notes.
        writers: None follows the site: the MLP's for "mlp", the attention's and the MLP's for "block" and "writes".

    Raises:
        UsageError: the base does not fit the adapter, nothing tells its family, or not all writers are known.
    """
    writers = writers or ("mlp" if adapter.site == "mlp" else "all")
    model_type, parallel, facts = _base_facts(adapter, base)
    _refuse_unknown(adapter, facts, writers)
    post_norms = any(layer.post_norms for layer in facts.values())
    approximation = _approximation(adapter.site, writers, parallel, post_norms)
    target = Target(facts, writers, approximation is None, ())
    notes = (
        approximation,
        _other_family(adapter, base),
        _unlisted_family(model_type, target),
        neumann_note(adapter, [dial.strength]),
    )
    return replace(target, notes=tuple(note for note in notes if note))


def _base_facts(
    adapter: ControlAdapterFiles, base: Checkpoint | None
) -> tuple[str | None, bool, Mapping[int, LayerFacts]]:
    """The base's type where it is known, whether its blocks are parallel, and the facts of the adapted layers."""
    if base is not None:
        validate_against(adapter, base.config.hidden_size, base.config.num_hidden_layers)
        family = family_for(base)
        return base.config.model_type, family.parallel, describe_layers(base, family, adapter.layers)
    model_type = adapter.base_model_type
    listed = FAMILIES.get(model_type) if model_type else None
    if adapter.facts:
        return model_type, listed is not None and listed.parallel, adapter.facts
    if listed is None or listed.experts:
        what = "the family" if listed is None else "the experts"
        raise UsageError(f"{adapter.path} does not record {what} of its base model.\nGive the base model with --base.")
    facts = LayerFacts(listed.attention_writers, listed.mlp_writers, listed.post_norms)
    return model_type, listed.parallel, dict.fromkeys(adapter.layers, facts)


def _refuse_unknown(adapter: ControlAdapterFiles, facts: Mapping[int, LayerFacts], writers: Writers) -> None:
    """Make sure that all writers of every adapted layer are known."""
    for layer, found in facts.items():
        if found.unknown:
            unknown = ", ".join(found.unknown)
        elif not found.mlp or (writers == "all" and not found.attention):
            unknown = "the attention module" if found.mlp else "the MLP"
        else:
            continue
        raise UsageError(
            f"{adapter.path} cannot be converted: how the base model writes to the residual stream is not known in "
            f"layer {layer} ({unknown}).\n"
            "The model's family is in no table, or its files do not have the names of the original model. Apply the "
            "adapter without converting it: cadapter generate --adapter."
        )


def _unlisted_family(model_type: str | None, target: Target) -> str | None:
    if model_type is None or model_type in FAMILIES:
        return None
    names = patterns(name for layer in target.facts for name in target.names(layer))
    return (
        f"Models of type {model_type!r} are in no table of families: what writes to the residual stream was told from "
        f"the model's structure ({', '.join(names)})."
    )


def _other_family(adapter: ControlAdapterFiles, base: Checkpoint | None) -> str | None:
    if base is None or adapter.base_model_type in (None, base.config.model_type):
        return None
    return f"The adapter was trained on a {adapter.base_model_type} model; this base is {base.config.model_type}."


def module_name(layer: int, writer: str) -> str:
    """Full name of a writer of a decoder layer, as on disk: "model.layers.3.mlp.down_proj"."""
    return f"model.layers.{layer}.{writer}"


def weight_name(base: Checkpoint, module: str) -> str:
    """The name of the tensor of ``module``: that of a linear layer, or of fused experts, which have no ``.weight``."""
    return module if module in base else f"{module}.weight"


def work_dtype(tensor: Tensor) -> torch.dtype:
    """In which precision a base tensor is worked on: float32, float64 where it is that already."""
    return torch.promote_types(tensor.dtype, torch.float32)
