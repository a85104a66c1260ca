"""The pipeline of a model: one builder for each layer, cut into stages, with what is trained put into the blocks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from cadapter.adapters.control import ClassTransforms, ControlledBlock
from cadapter.models.execution import BlockRunner
from cadapter.models.isolation import check_block
from cadapter.models.layers import CarrierFormat, DecoderLayer, EmbeddingLayer, Frame, HeadLayer, run_block, run_norm
from cadapter.models.loading import CausalLM
from cadapter.training.modes.base import Mode
from cadapter.training.recompute import Recompute


def embedding_on_device(model: CausalLM, mode: Mode, stages: int) -> bool:
    """Whether the table of token embeddings lies where the blocks are: if it is trained, or serves the head there too.

    Otherwise it stays on the host, where the few rows of a micro-batch are looked up. With several ``stages`` a tied
    head is on another one than the embedding, and has a copy of its own.
    """
    return mode.trainable()[0] > 0 or (model.tied and stages == 1)


class StageBuilder:
    """Builds pipeline layers; a process calls only the builders of its own stage.

    Args:
        model: the base on disk.
        mode: what is put into the blocks.
        carrier: what travels.
        recompute: which blocks are computed again in the backward pass.
        runner: of the blocks; None: they run as they are.
        stages: how many stages the pipeline layers are shared out over.
        run_norm: calls the final norm.
    """

    def __init__(
        self,
        model: CausalLM,
        mode: Mode,
        carrier: CarrierFormat,
        recompute: Recompute,
        runner: BlockRunner | None = None,
        stages: int = 1,
        run_norm: Callable[[nn.Module, Tensor], Tensor] = run_norm,
    ) -> None:
        self.model = model
        self.mode = mode
        self.carrier = carrier
        self.recompute = recompute
        self.runner = runner or BlockRunner(run_block)
        self.stages = stages
        self.run_norm = run_norm
        self._frame = Frame(model)
        self._classes = ClassTransforms()
        self._embedding: nn.Module | None = None

    def builders(self) -> list[Callable[[], nn.Module]]:
        """One function for each pipeline layer: embedding, blocks, final norm with head."""
        blocks = [partial(self._block, index) for index in range(self.model.layer_count)]
        return [self._first, *blocks, self._last]

    def _first(self) -> nn.Module:
        on_device = embedding_on_device(self.model, self.mode, self.stages)
        self._embedding = self.model.embedding(self.model.device if on_device else torch.device("cpu"))
        return EmbeddingLayer(self._embedding, self.model.embedding_scale, self.carrier, self.model.device)

    def _block(self, index: int) -> nn.Module:
        plain = self.model.block(index)
        if self.carrier.positions:
            check_block(self.model, plain, index)
        block = self.mode.wrap(plain, index)
        if isinstance(block, ControlledBlock):
            self._classes.add(block.adapter)
        keep = self.recompute.block(index)
        return DecoderLayer(block, index, self._frame, self.carrier, keep, self.runner, self._classes)

    def _last(self) -> nn.Module:
        weights = self.model.head_weights(self._embedding)
        return HeadLayer(self.model.final_norm(), weights, self.model.logits, self.carrier, self.run_norm)
