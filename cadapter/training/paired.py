"""A base and what became of it, side by side: half the rows of a micro-batch go through each.

A Control Adapter tells rows apart by itself; LoRA and fully fine-tuned weights do not, so each part is here twice, or
is switched over between the halves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cadapter.adapters.lora import LoraBlock
from cadapter.models.loading import CausalLM


class Parts(nn.Module):
    """Applies one function to each of some equal parts of its input [rows, ..] and puts the results together.

    Args:
        calls: one for each part, in order.
        modules: what the calls use, so that it is known as part of the pipeline.
    """

    def __init__(self, calls: Sequence[Callable[..., Tensor]], modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self._calls = list(calls)
        self.used = nn.ModuleList(modules)

    def forward(self, rows: Tensor, by_part: Sequence[dict[str, Any]] | None = None, **kwargs: Any) -> Tensor:
        """Part k of the rows goes through call k, with the keyword arguments ``by_part[k]`` where there are any."""
        count = len(self._calls)
        further = by_part or [kwargs] * count
        parts = zip(self._calls, rows.chunk(count), further, strict=True)
        return torch.cat([call(part, **each) for call, part, each in parts])


def with_and_without(block: nn.Module) -> Parts:
    """A block whose first half of rows sees no LoRA and whose second half does, where it has one."""

    def bare(*args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(block, LoraBlock):
            return block(*args, **kwargs)
        block.switch(False)
        try:
            return block(*args, **kwargs)
        finally:
            block.switch(True)

    return Parts([bare, block], [block])


class PairedModel(CausalLM):
    """Two models of one shape, taken apart as one: every module exists twice, for each half of the rows.

    Args:
        base, other: with hidden states, layers and tokens alike in number, and embeddings and logits scaled alike.
    """

    def __init__(self, base: CausalLM, other: CausalLM) -> None:
        self.__dict__.update(base.__dict__)
        self._both = (base, other)

    def layer_bytes(self) -> list[int]:
        """Bytes of weights of each pipeline layer, of both models."""
        return [sum(pair) for pair in zip(*(model.layer_bytes() for model in self._both), strict=True)]

    @staticmethod
    def _halves(modules: Sequence[nn.Module]) -> Parts:
        return Parts(modules, modules)

    def embedding(self, device: torch.device | None = None) -> nn.Module:
        """Both token embeddings."""
        return self._halves([model.embedding(device) for model in self._both])

    def block(self, index: int) -> nn.Module:
        """Decoder block ``index`` of both."""
        return self._halves([model.block(index) for model in self._both])

    def block_arguments(self, length: int) -> list[dict[str, Any]]:
        """The keyword arguments of each block: those with which each model calls its own."""
        own = [model.block_arguments(length) for model in self._both]
        return [{"by_part": pair} for pair in zip(*own, strict=True)]

    def final_norm(self) -> nn.Module:
        """The norm before the head of both."""
        return self._halves([model.final_norm() for model in self._both])

    def head_weights(self, embedding: nn.Module | None = None) -> list[nn.Parameter]:
        """The head's weight of each."""
        return [model.head_weight() for model in self._both]
