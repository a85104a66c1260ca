"""A pipeline's layers called one after the other in this process, with random adapters around its blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from cadapter.adapters.control import ControlAdapter, ControlSettings
from cadapter.classes import NO_CLASS
from cadapter.models.layers import CarrierFormat, HeadInputs
from cadapter.models.loading import CausalLM
from cadapter.models.loss import logits_of
from cadapter.training.modes.control import ControlMode, adapters_of
from cadapter.training.modes.full import FullMode
from cadapter.training.recompute import Recompute
from cadapter.training.stages import StageBuilder
from tests.reference.controlled_model import Controlled
from tests.tiny_models import LAYERS

RANK = 4
ALL_LAYERS = tuple(range(LAYERS))
SETTINGS = ControlSettings(RANK, math.sqrt(RANK))
HIDDEN_ONLY = CarrierFormat()

CAPPED_ATTENTION = ("gemma2", "vaultgemma")
"""Families whose attention scores are capped, which sdpa cannot do; some versions of transformers choose it even so."""


def builder(
    directory: Path,
    settings: ControlSettings = SETTINGS,
    adapted: Sequence[int] = ALL_LAYERS,
    carrier: CarrierFormat = HIDDEN_ONLY,
    recompute_every: int = 0,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    device: str = "cpu",
) -> StageBuilder:
    """A builder of a model's pipeline layers; ``recompute_every`` 0: nothing is recomputed, n: every nth block."""
    model = CausalLM(directory, dtype, device, attention)
    return StageBuilder(model, ControlMode(model, adapted, settings), carrier, Recompute(recompute_every))


def full_builder(directory: Path, dtype: torch.dtype = torch.float32) -> StageBuilder:
    """A builder of a model's pipeline layers in which all of its own weights are trained."""
    model = CausalLM(directory, dtype)
    mode = FullMode(model, None, None, directory, str(dtype).removeprefix("torch."))
    return StageBuilder(model, mode, HIDDEN_ONLY, Recompute(0))


def hugging_faces(directory: Path, dtype: torch.dtype = torch.float32, attention: str | None = None) -> Any:
    """Hugging Face's own model, frozen."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation=attention)
    if model.config.model_type in CAPPED_ATTENTION:
        model.set_attn_implementation("eager")
    return model.requires_grad_(False)


def randomise(adapters: Sequence[ControlAdapter], spectral: float = 0.5) -> None:
    """Give each adapter a random B for which ‖W‖₂ = ``spectral``: a function of the layer alone."""
    for adapter in adapters:
        B = torch.randn(adapter.control_B.shape, generator=torch.Generator().manual_seed(50 + adapter.layer))
        size = torch.linalg.matrix_norm(adapter.settings.scale * B @ adapter.control_A.detach().cpu(), 2)
        adapter.control_B.data.copy_(spectral / size * B)


def layers_of(stages: StageBuilder) -> list[nn.Module]:
    """All pipeline layers, with random adapters."""
    layers = [build() for build in stages.builders()]
    randomise(adapters_of(layers))
    return layers


def run_layers(layers: Sequence[nn.Module], ids: Tensor, classes: Tensor, rows: Tensor | None = None) -> HeadInputs:
    """Call the layers in order on token ids and classes, both [B, T]."""
    parts: Any = (ids, classes, torch.zeros(len(ids), dtype=torch.int64) if rows is None else rows)
    for layer in layers:
        parts = layer(parts)
    return parts


def output_logits(outputs: HeadInputs) -> Tensor:
    """The float32 logits [B, T, V] that the loss makes of what the last layer gives."""
    (weight,) = outputs.weights
    return logits_of(outputs.hidden, weight, outputs.logits)


def references(adapters: Sequence[ControlAdapter], classes: Tensor) -> dict[int, Controlled]:
    """The same adapters for the float64 reference, by layer, for a pass with these classes [B, T]."""
    return {
        adapter.layer: Controlled(
            adapter.control_A.detach().double().requires_grad_(),
            adapter.control_B.detach().double().requires_grad_(),
            adapter.settings.scale,
            adapter.settings.site,
            classes,
            adapter.settings.inverse,
            adapter.settings.neumann_order,
        )
        for adapter in adapters
    }


def no_classes(ids: Tensor) -> Tensor:
    """Classes [B, T] of which no adapter does anything."""
    return torch.full(ids.shape, NO_CLASS, dtype=torch.int8)


def random_tokens(rows: int, tokens: int, vocabulary: int, seed: int = 0) -> Tensor:
    """Token ids [B, T]."""
    return torch.randint(vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def random_classes(rows: int, tokens: int, seed: int = 1) -> Tensor:
    """Classes [B, T] int8: +1, −1, 0 and none, mixed within every row; the last position has none."""
    draws = torch.randint(4, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    classes = torch.tensor([1, -1, 0, 2], dtype=torch.int8)[draws]
    classes[:, -1] = 2
    return classes
