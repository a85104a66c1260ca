"""Control Adapters on Hugging Face's own model in float64: hooks on its blocks, W as [H, H] matrix, plain autograd.

Nothing of a family is known here: a block has modules ``self_attn`` and ``mlp``, and what it adds is its output minus
its input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.reference import naive


class Float64(TorchFunctionMode):
    """A context in which whatever asks torch for float32 gets float64.

    Hugging Face's norms, softmax, rotary embeddings and routers ask for it, in a float64 model too, whose results
    would otherwise be no better than float32's.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        def wider(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*map(wider, args), **{key: wider(value) for key, value in (kwargs or {}).items()})


@dataclass
class Controlled:
    """One decoder block under a Control Adapter, for one forward pass with these classes [B, T].

    ``keep`` holds dropout's masks [B, T, H] in the order in which the adapter acts. ``penalty`` sums
    ``‖W·Δh‖²/max(‖Δh‖², 1e-6)`` over the neutral positions of every place where it acts.
    """

    A: Tensor
    B: Tensor
    scale: float
    site: str
    classes: Tensor
    inverse: str = "exact"
    order: int = 2
    keep: list[Tensor] = field(default_factory=list)
    penalty: Any = 0.0

    def change(self, delta: Tensor) -> Tensor:
        """y for Δh [B, T, H]."""
        W, rows, classes = naive.full_matrix(self.A, self.B, self.scale), delta.flatten(0, 1), self.classes.flatten()
        neutral = rows[classes == 0]
        if len(neutral):
            self.penalty = self.penalty + len(neutral) * naive.neutral_loss(neutral, W)
        if self.keep:
            rows = rows * self.keep.pop(0).flatten(0, 1).double()
        return naive.forward(rows, classes, W, self.inverse, self.order).view_as(delta)

    def attach(self, block: Any) -> list[Any]:
        """Hook the adapter to ``block``; returns the hooks' handles."""
        if self.site == "block":
            return [block.register_forward_hook(lambda _m, inputs, out: out + self.change(out - inputs[0]))]
        modules = [block.self_attn, block.mlp] if self.site == "writes" else [block.mlp]
        return [module.register_forward_hook(self._after_module) for module in modules]

    def _after_module(self, _module: Any, _inputs: Any, output: Any) -> Any:
        """Change what a module writes: its output, or the first part of it."""
        if isinstance(output, tuple):
            return (output[0] + self.change(output[0]), *output[1:])
        return output + self.change(output)


@dataclass
class Reference:
    """What the reference found: logits [B, T, V], Σ w·nll, the penalty summed over layers, and nll [B, T]."""

    logits: Tensor
    total: Tensor
    penalty: Any
    nll: Tensor


def run(
    model: Any,
    adapters: Mapping[int, Controlled],
    input_ids: Tensor,
    labels: Tensor,
    weights: Tensor,
) -> Reference:
    """Run the float64 ``model`` with ``adapters`` on its layers; ``labels`` are already shifted, −100 is ignored."""
    model.set_experts_implementation("eager")  # the grouped product of the default has no float64,
    model.set_attn_implementation("eager")  # and sdpa no cap of attention scores
    hooks = [hook for layer, adapter in adapters.items() for hook in adapter.attach(model.model.layers[layer])]
    try:
        with Float64():
            logits = model(input_ids=input_ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    nll = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none"
    ).view_as(labels)
    penalty = sum(adapter.penalty for adapter in adapters.values())
    return Reference(logits, (weights * nll).sum(), penalty, nll)
