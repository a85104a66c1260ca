"""The pipeline of a model: one builder for each layer, cut into stages, with what is trained put into the blocks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from cadapter.models.isolation import check_block
from cadapter.models.layers import CarrierFormat, DecoderLayer, EmbeddingLayer, Frame, HeadLayer
from cadapter.models.loading import CausalLM
from cadapter.training.modes.base import Mode
from cadapter.training.recompute import Recompute


class StageBuilder:
    """Builds pipeline layers; a process calls only the builders of its own stage.

    Args:
        model: the base on disk.
        mode: what is put into the blocks.
        carrier: what travels.
        recompute: which blocks are computed again in the backward pass.
    """

    def __init__(self, model: CausalLM, mode: Mode, carrier: CarrierFormat, recompute: Recompute) -> None:
        self.model = model
        self.mode = mode
        self.carrier = carrier
        self.recompute = recompute
        self._frame = Frame(model)
        self._embedding: nn.Module | None = None

    def builders(self) -> list[Callable[[], nn.Module]]:
        """One function for each pipeline layer: embedding, blocks, final norm with head."""
        blocks = [partial(self._block, index) for index in range(self.model.layer_count)]
        return [self._first, *blocks, self._last]

    def _first(self) -> nn.Module:
        self._embedding = self.model.embedding()
        return EmbeddingLayer(self._embedding, self.model.embedding_scale, self.carrier)

    def _block(self, index: int) -> nn.Module:
        plain = self.model.block(index)
        if self.carrier.positions:
            check_block(self.model, plain, index)
        block = self.mode.wrap(plain, index)
        return DecoderLayer(block, index, self._frame, self.carrier, self.recompute.block(index))

    def _last(self) -> nn.Module:
        weights = self.model.head_weights(self._embedding)
        return HeadLayer(self.model.final_norm(), weights, self.model.logits, self.carrier)
