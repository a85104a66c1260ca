"""The pipeline of a model: one builder for each layer, cut into stages, with Control Adapters around the blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from cadapter.adapters.control import ControlAdapter, ControlledBlock, ControlSettings
from cadapter.config import Config
from cadapter.models.layers import CarrierFormat, DecoderLayer, EmbeddingLayer, Frame, HeadLayer
from cadapter.models.loading import CausalLM
from cadapter.training.recompute import Recompute


class StageBuilder:
    """Builds pipeline layers; a process calls only the builders of its own stage.

    Args:
        model: the base on disk.
        adapted: the layers that get an adapter.
        settings: of the adapters.
        seed: of their initial values.
        carrier: what travels.
        recompute: which blocks are computed again in the backward pass.
    """

    def __init__(
        self,
        model: CausalLM,
        adapted: Sequence[int],
        settings: ControlSettings,
        seed: int,
        carrier: CarrierFormat,
        recompute: Recompute,
    ) -> None:
        self.model = model
        self.adapted = set(adapted)
        self.settings = settings
        self.seed = seed
        self.carrier = carrier
        self.recompute = recompute
        self._frame = Frame(model)
        self._embedding: nn.Module | None = None

    def builders(self) -> list[Callable[[], nn.Module]]:
        """One function for each pipeline layer: embedding, blocks, final norm with head."""
        blocks = [partial(self._block, index) for index in range(self.model.layer_count)]
        return [self._first, *blocks, self._last]

    def trainable(self) -> list[int]:
        """Trained parameters of each pipeline layer."""
        each = 2 * self.settings.rank * self.model.hidden_size
        return [0, *(each if index in self.adapted else 0 for index in range(self.model.layer_count)), 0]

    @property
    def applications(self) -> int:
        """L: how often adapters act on a token in the whole model."""
        return len(self.adapted) * (2 if self.settings.site == "writes" else 1)

    def _first(self) -> nn.Module:
        self._embedding = self.model.embedding()
        return EmbeddingLayer(self._embedding, self.carrier)

    def _block(self, index: int) -> nn.Module:
        block = self.model.block(index)
        if index in self.adapted:
            adapter = ControlAdapter(self.model.hidden_size, index, self.settings, self.seed, self.model.device)
            block = ControlledBlock(block, adapter, self.model.family)
        return DecoderLayer(block, index, self._frame, self.carrier, self.recompute.block(index))

    def _last(self) -> nn.Module:
        return HeadLayer(self.model.final_norm(), self.model.head_weight(self._embedding), self.carrier)


def adapters_of(layers: Sequence[nn.Module]) -> list[ControlAdapter]:
    """The Control Adapters among a stage's pipeline layers, in order."""
    blocks = [layer.block for layer in layers if isinstance(layer, DecoderLayer)]
    return [block.adapter for block in blocks if isinstance(block, ControlledBlock)]


def control_settings(config: Config) -> ControlSettings:
    """What a config says of its Control Adapters."""
    return ControlSettings(
        rank=config.lora_rank,
        alpha=config.alpha,
        site=config.control_site,
        inverse=config.control_inverse,
        neumann_order=config.control_neumann_order,
        dropout=config.lora_dropout,
    )
