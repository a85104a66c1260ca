"""What a conversion applies to each layer's residual writers: which operator, on which writers, and how exactly.

A residual writer is a linear layer whose output is added to the residual stream. A control adapter turned into
weights becomes ``(I + W_t)·W_lin`` on its writers, with ``I + W_t = (I + W)^t`` (strength) or ``I + x·W`` (scale).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cadapter.adapters.directory import ControlAdapterFiles, LayerFacts, LowRank, describe_layers, validate_against
from cadapter.adapters.strengths import neumann_note
from cadapter.algebra import core, strength_transform
from cadapter.errors import UsageError
from cadapter.models.checkpoint import Checkpoint
from cadapter.models.families import FAMILIES, family_of
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
            UsageError: more than one of them is given.
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
        if inverse:
            return cls(strength=-1.0)
        return cls(1.0 if strength is None else strength, 1.0 if scale is None else scale, strength is not None)

    def __str__(self) -> str:
        return f"scale {self.factor:g}" if self.factor != 1 else f"strength {self.strength:g}"


def fold(A: Tensor, B: Tensor, scale: float, dial: Dial, where: str) -> LowRank:
    """``A' = A``, ``B' = x·s·B·f_t(M)``, so that ``B'·A' = x·((I + s·B·A)^t − I)``: float64 inside, float32 out.

    Raises:
        UsageError: this power does not exist; ``where`` (the layer) is named.
    """
    A, B = A.double(), B.double()
    turned = B if dial.strength == 1 else B @ strength_transform(core(A, B, scale), dial.strength, where)
    return LowRank(A.float(), (dial.factor * scale * turned).float())


def does_nothing(operator: LowRank) -> bool:
    """Whether ``B·A = 0`` because a factor is zero."""
    return not (operator.A.any() and operator.B.any())


def operators(adapter: ControlAdapterFiles, dial: Dial) -> dict[int, LowRank]:
    """Folded factors by layer: the change of layer N's writers is ``B·A·W_lin``.

    Raises:
        UsageError: a power does not exist (the layer is named), or the adapter changes nothing at all.
    """
    folded = {
        layer: fold(factors.A, factors.B, adapter.scale, dial, f"{adapter.path}, layer {layer}")
        for layer, factors in adapter.layers.items()
    }
    if all(does_nothing(operator) for operator in folded.values()):
        raise UsageError(f"{adapter.path} at {dial} changes nothing: W = 0 in every layer.\nNothing was written.")
    return folded


@dataclass(frozen=True)
class Target:
    """Where an adapter's operators go.

    Attributes:
        facts: the layers' facts by layer number.
        writers: "mlp" or "all".
        notes: what the user must hear: that the result only approximates the adapter, that the base is of another
            type than the one it was trained on, or how far the exact inverse is from the one it was trained with.
    """

    facts: Mapping[int, LayerFacts]
    writers: Writers
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
        UsageError: the base does not fit the adapter, or nothing tells its family.
    """
    writers = writers or ("mlp" if adapter.site == "mlp" else "all")
    parallel = False
    if base is not None:
        validate_against(adapter, base.config.hidden_size, base.config.num_hidden_layers)
        family = family_for(base)
        facts, parallel = describe_layers(base, family, adapter.layers), family.parallel
    elif adapter.facts:
        facts = adapter.facts
        if adapter.base_model_type in FAMILIES:
            parallel = family_of(adapter.base_model_type).parallel
    elif adapter.base_model_type:
        family = family_of(adapter.base_model_type)
        if family.experts:
            raise UsageError(
                f"{adapter.path} does not record the experts of its base model.\nGive the base model with --base."
            )
        layer_facts = LayerFacts(family.attention_writers, family.mlp_writers, family.post_norms)
        facts, parallel = dict.fromkeys(adapter.layers, layer_facts), family.parallel
    else:
        raise UsageError(
            f"{adapter.path} does not record the family of its base model.\nGive the base model with --base."
        )
    for layer, found in facts.items():
        if not found.mlp or (writers == "all" and not found.attention):
            raise UsageError(
                f"{adapter.path}: none of the base model's layers that write to the residual stream is known for layer "
                f"{layer}.\nIts family is in no table, or its files do not have the names of the original model."
            )
    post_norms = any(layer.post_norms for layer in facts.values())
    notes = (
        _approximation(adapter.site, writers, parallel, post_norms),
        _other_family(adapter, base),
        neumann_note(adapter, [dial.strength]),
    )
    return Target(facts, writers, tuple(note for note in notes if note))


def _other_family(adapter: ControlAdapterFiles, base: Checkpoint | None) -> str | None:
    if base is None or adapter.base_model_type in (None, base.config.model_type):
        return None
    return f"The adapter was trained on a {adapter.base_model_type} model; this base is {base.config.model_type}."


def module_name(layer: int, writer: str) -> str:
    """Full name of a writer of a decoder layer, as in the checkpoint: "model.layers.3.mlp.down_proj"."""
    return f"model.layers.{layer}.{writer}"


def weight_name(base: Checkpoint, module: str) -> str:
    """The name of the tensor of ``module``: that of a linear layer, or of fused experts, which have no ``.weight``."""
    return module if module in base else f"{module}.weight"


def work_dtype(tensor: Tensor) -> torch.dtype:
    """In which precision a base tensor is worked on: float32, float64 where it is that already."""
    return torch.promote_types(tensor.dtype, torch.float32)
