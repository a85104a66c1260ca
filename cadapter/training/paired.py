"""A base and what became of it, side by side: row 0 of a micro-batch goes through the base, row 1 through the other.

A Control Adapter tells rows apart by itself; LoRA and fully fine-tuned weights do not, so each part is here twice, or
is switched over between the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cadapter.adapters.lora import LoraBlock
from cadapter.models.layers import Frame
from cadapter.models.loading import CausalLM


class Rows(nn.Module):
    """Applies one function to each row of its input [rows, ..] and puts the results together.

    Args:
        calls: one for each row, in order.
        modules: what the calls use, so that it is known as part of the pipeline.
    """

    def __init__(self, calls: Sequence[Callable[..., Tensor]], modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self._calls = list(calls)
        self.parts = nn.ModuleList(modules)

    def forward(self, rows: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Row k goes through call k."""
        return torch.cat([call(rows[k : k + 1], *args, **kwargs) for k, call in enumerate(self._calls)])


def with_and_without(block: LoraBlock) -> Rows:
    """A block whose row 0 sees no LoRA and whose row 1 does."""

    def bare(*args: Any, **kwargs: Any) -> Tensor:
        block.switch(False)
        try:
            return block(*args, **kwargs)
        finally:
            block.switch(True)

    return Rows([bare, block], [block])


class PairedModel(CausalLM):
    """Two models of one shape, taken apart as one: every module exists twice, for row 0 and for row 1.

    Args:
        base, other: with hidden states, layers and tokens alike in number, and embeddings and logits scaled alike.
    """

    def __init__(self, base: CausalLM, other: CausalLM) -> None:
        self.__dict__.update(base.__dict__)
        self._both = (base, other)
        self._others_frame = Frame(other)

    def layer_bytes(self) -> list[int]:
        """Bytes of weights of each pipeline layer, of both models."""
        return [sum(pair) for pair in zip(*(model.layer_bytes() for model in self._both), strict=True)]

    @staticmethod
    def _rows(modules: Sequence[nn.Module]) -> Rows:
        return Rows(modules, modules)

    def embedding(self, device: torch.device | None = None) -> nn.Module:
        """Both token embeddings."""
        return self._rows([model.embedding(device) for model in self._both])

    def block(self, index: int) -> nn.Module:
        """Decoder block ``index`` of both; each is called as its own model calls it."""
        base, other = (model.block(index) for model in self._both)

        def other_call(hidden: Tensor, **_of_base: Any) -> Tensor:
            return other(hidden, **self._others_frame.arguments(hidden, index))

        return Rows([base, other_call], [base, other])

    def final_norm(self) -> nn.Module:
        """The norm before the head of both."""
        return self._rows([model.final_norm() for model in self._both])

    def head_weights(self, embedding: nn.Module | None = None) -> list[nn.Parameter]:
        """The head's weight of each."""
        return [model.head_weight() for model in self._both]
