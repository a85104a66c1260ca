"""Training Control Adapters around the blocks of a frozen base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cadapter.adapters.control import ControlAdapter, ControlledBlock, ControlSettings, new_adapter
from cadapter.adapters.directory import (
    ControlAdapterFiles,
    LayerFacts,
    control_card,
    describe_layers,
    layer_ranges,
    read_control_adapter,
    validate_against,
    write_control_adapter,
)
from cadapter.adapters.factors import FORMS
from cadapter.adapters.strengths import load_factors
from cadapter.adapters.trained_control import TrainedControlAdapters
from cadapter.config import Config
from cadapter.errors import UsageError
from cadapter.models.layers import DecoderLayer
from cadapter.models.loading import DTYPES, CausalLM
from cadapter.planning.blocks import Change
from cadapter.training.modes.base import check_rank_and_alpha, trained_bytes


def control_settings(config: Config) -> ControlSettings:
    """What a config says of its Control Adapters."""
    return ControlSettings(
        rank=config.lora_rank,
        alpha=config.alpha,
        site=config.control_site,
        form=config.control_form,
        inverse=config.control_inverse,
        neumann_order=config.control_neumann_order,
        dropout=config.lora_dropout,
        dtype=DTYPES[config.lora_weight_dtype],
    )


class ControlMode:
    """Control Adapters on some layers of a model.

    Args:
        model: the base.
        layers: the blocks that get an adapter.
        settings: of the adapters.
        seed: of their initial values.
        decay: λ of the composite decay, or of the decay of S.
        gamma: γ, how far a step goes toward orthonormal columns of Q in the symmetric form.
        base_name: the base as the config names it.

    Raises:
        UsageError: more directions than the hidden size are asked for.
    """

    name = "control"

    def __init__(
        self,
        model: CausalLM,
        layers: Sequence[int],
        settings: ControlSettings,
        seed: int = 0,
        decay: float = 0.0,
        gamma: float = 0.5,
        base_name: str = "",
    ) -> None:
        if settings.form == "symmetric" and settings.rank > model.hidden_size:
            raise UsageError(
                f"lora_rank = {settings.rank}: the symmetric form has at most as many directions as the model's hidden "
                f"size, {model.hidden_size}.\nSet a smaller lora_rank."
            )
        self.model = model
        self.layers = list(layers)
        self.settings = settings
        self.seed = seed
        self.decay = decay
        self.gamma = gamma
        self.base_name = base_name
        self.per_trained = trained_bytes(settings.dtype, torch.float32)

    @property
    def applications(self) -> int:
        """L: how often adapters act on a token in the whole model."""
        return len(self.layers) * (2 if self.settings.site == "writes" else 1)

    def wrap(self, block: nn.Module, index: int) -> nn.Module:
        """Put an adapter around an adapted block."""
        if index not in self.layers:
            return block
        adapter = new_adapter(self.model.hidden_size, index, self.settings, self.seed, self.model.device)
        return ControlledBlock(block, adapter, self.model.family, self.model.residual_scale)

    def trainable(self) -> list[int]:
        """Numbers of each adapted block: 2·r·H, or r·H + r in the symmetric form."""
        wide = self.settings.rank * self.model.hidden_size
        each = wide + self.settings.rank if self.settings.form == "symmetric" else 2 * wide
        return [0, *(each if index in self.layers else 0 for index in range(self.model.layer_count)), 0]

    def change(self, index: int) -> Change:
        """An adapter keeps the Δh that it reads and r numbers, wherever it acts."""
        if index not in self.layers:
            return Change()
        settings, places = self.settings, self.applications // len(self.layers)
        read = places * self.model.hidden_size
        return Change(
            numbers=self.trainable()[1 + index],
            after=settings.site != "writes",
            deltas=read,
            narrow=places * settings.rank,
            masked=read if settings.dropout > 0 else 0,
        )

    def trained(self, layers: Sequence[nn.Module]) -> TrainedControlAdapters:
        """The adapters of this stage."""
        return TrainedControlAdapters(
            adapters_of(layers), self.settings, self.layers, self.decay, self.model.device, self.gamma
        )

    def parts(self, layers: Sequence[nn.Module]) -> Iterator[dict[str, Tensor]]:
        """All factors of this stage at once: they are small."""
        yield {name: parameter.detach() for name, parameter in self.trained(layers).parameters().items()}

    def writer(self, directory: Path) -> ControlAdapterWriter:
        """A writer of a control-adapter directory."""
        return ControlAdapterWriter(directory, self)

    @cached_property
    def layer_facts(self) -> dict[int, LayerFacts]:
        """What conversions must know of each adapted layer of the base."""
        return describe_layers(self.model.checkpoint, self.model.family, self.layers)

    def look_up_base(self) -> None:
        """Look up :attr:`layer_facts`: tensors of the base are read, and modules of unknown families are tried."""
        _ = self.layer_facts

    def check_start(self, directory: Path) -> None:
        """Make sure that ``directory`` holds this run's layers, at its rank, scale and site.

        Raises:
            UsageError: it does not.
        """
        self._read(directory)

    def _read(self, directory: Path) -> ControlAdapterFiles:
        files, settings = read_control_adapter(directory), self.settings
        validate_against(files, self.model.hidden_size, self.model.layer_count)
        if files.form != settings.form:
            raise UsageError(f'{directory} was trained with control_form = "{files.form}", not "{settings.form}".')
        wanted = settings.rank, settings.alpha
        check_rank_and_alpha(directory, (files.rank, files.alpha), wanted, settings.form == "general")
        if files.site != settings.site:
            raise UsageError(f'{directory} was trained with control_site = "{files.site}", not "{settings.site}".')
        if files.layers.keys() != set(self.layers):
            raise UsageError(
                f"{directory} does not hold the layers of this run: it has {layer_ranges(files.layers)}, this run "
                f"trains {layer_ranges(self.layers)}.\nSee layers_to_transform."
            )
        return files

    def load(self, layers: Sequence[nn.Module], directory: Path) -> None:
        """Take over the factors of this stage's adapters.

        Raises:
            UsageError: ``directory`` does not fit, see :meth:`check_start`.
        """
        files = self._read(directory)
        for adapter in adapters_of(layers):
            load_factors(adapter, files)

    def facts(self) -> dict[str, Any]:
        """Shape and place of the adapters."""
        return {
            "layers": self.layers,
            "lora_rank": self.settings.rank,
            "lora_alpha": self.settings.alpha,
            "control_form": self.settings.form,
            "control_site": self.settings.site,
        }

    def description(self) -> str:
        """Rank, scale, site, layers, parameters."""
        settings = self.settings
        form = "symmetric" if settings.form == "symmetric" else f"scale {settings.scale:g}"
        return (
            f"Control Adapters: rank {settings.rank}, {form}, site {settings.site}, "
            f"{len(self.layers)} of {self.model.layer_count} layers, {sum(self.trainable()):,} parameters."
        )


class ControlAdapterWriter:
    """Writes a control-adapter directory once all stages' factors are there."""

    def __init__(self, directory: Path, mode: ControlMode) -> None:
        self._directory = directory
        self._mode = mode
        self._tensors: dict[str, Tensor] = {}

    def add(self, part: dict[str, Tensor]) -> None:
        """Keep a stage's factors."""
        self._tensors.update(part)

    def finish(self) -> None:
        """Write the directory."""
        mode, settings = self._mode, self._mode.settings
        form = FORMS[settings.form]
        factors = {
            layer: form(*(self._tensors[f"layers.{layer}.control_{each.name}"] for each in fields(form)))
            for layer in mode.layers
        }
        adapter = ControlAdapterFiles(
            path=self._directory,
            rank=settings.rank,
            alpha=settings.alpha,
            layers=factors,
            site=settings.site,
            inverse=settings.inverse,
            neumann_order=settings.neumann_order,
            base_model_type=mode.model.config.model_type,
            base_model_name_or_path=mode.base_name,
            facts=mode.layer_facts,
        )
        write_control_adapter(self._directory, adapter, control_card(adapter))


def adapters_of(layers: Sequence[nn.Module]) -> list[ControlAdapter]:
    """The Control Adapters among a stage's pipeline layers, in order."""
    blocks = [layer.block for layer in layers if isinstance(layer, DecoderLayer)]
    return [block.adapter for block in blocks if isinstance(block, ControlledBlock)]
