"""Where a step's gradients add up: over micro-batches, over replicas, over the two uses of a tied embedding."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

from cadapter.training.distributed import GradientGroups, average


class Gradients:
    """The gradients of this stage's trained parameters.

    A float32 parameter's gradient adds up where autograd puts it. That of a bfloat16 parameter would lose small
    contributions there, so with ``dtype`` float32 it is taken over into a float32 buffer after each micro-batch.

    Args:
        parameters: by name.
        copies: names of those that an earlier stage holds too.
        dtype: in which gradients of bfloat16 parameters add up.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], copies: frozenset[str], dtype: torch.dtype) -> None:
        self._parameters = parameters
        self._copies = copies
        self._buffers: dict[str, Tensor] = {}
        self._buffered: set[str] = set()
        for name, parameter in parameters.items():
            if parameter.dtype != torch.float32 and dtype == torch.float32:
                parameter.register_post_accumulate_grad_hook(partial(self._take_over, name))
                self._buffered.add(name)

    def _take_over(self, name: str, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            return
        if name in self._buffers:
            self._buffers[name].add_(gradient)
        else:
            self._buffers[name] = gradient.float()

    def of(self, name: str) -> Tensor | None:
        """The gradient of a parameter so far, in the dtype in which it adds up."""
        return self._buffers.get(name, self._parameters[name].grad)

    def _present(self, names: Iterable[str]) -> list[Tensor]:
        return [gradient for name in names if (gradient := self.of(name)) is not None]

    def _complete(self, names: Iterable[str]) -> None:
        """Put zeros where a parameter had no part in the step.

        Every process then brings as many numbers to a reduction, and Adam's state is the same in every layout.
        """
        for name in names:
            if self.of(name) is not None:
                continue
            parameter = self._parameters[name]
            if name in self._buffered:
                self._buffers[name] = torch.zeros_like(parameter, dtype=torch.float32)
            else:
                parameter.grad = torch.zeros_like(parameter)

    def reduce(self, groups: GradientGroups) -> None:
        """Average over replicas; the gradient of a tied parameter is the sum of those of its two stages."""
        if groups.alone:
            return
        self._complete(self._parameters)
        tied = groups.tied_name
        average(self._present(name for name in self._parameters if name != tied), groups.replicas, groups.count)
        if tied in self._parameters:
            average(self._present([tied]), groups.tied, groups.count)

    def squared_norm(self, device: torch.device) -> Tensor:
        """Return Σ g² over all gradients but those of copies, a float64 scalar on ``device``."""
        gradients = self._present(name for name in self._parameters if name not in self._copies)
        if not gradients:
            return torch.zeros((), dtype=torch.float64, device=device)
        return torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)).double().square().sum()

    def hand_over(self, names: Iterable[str], factor: float) -> None:
        """Put the gradients of ``names``, times ``factor`` if it is below 1, where the optimiser looks for them."""
        names = list(names)
        self._complete(names)
        if factor < 1.0 and names:
            torch._foreach_mul_(self._present(names), factor)
        for name in names:
            if name in self._buffers:
                parameter = self._parameters[name]
                parameter.grad = self._buffers.pop(name).to(parameter.dtype)

    def clear(self) -> None:
        """Forget everything."""
        self._buffers.clear()
        for parameter in self._parameters.values():
            parameter.grad = None
