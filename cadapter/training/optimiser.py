"""The optimiser's part of a step: one global gradient norm, clipping, Adam; and Adam's state by parameter name."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from optimi import Adam
from torch import Tensor, nn

from cadapter.errors import UsageError

MOMENTS = ("exp_avg", "exp_avg_sq", "kahan_comp")


def squared_gradient_norm(parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
    """Return Σ g² over the parameters' gradients, a float64 scalar on ``device``."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for parameter in parameters:
        if parameter.grad is not None:
            total = total + parameter.grad.float().square().sum().double()
    return total


class Optimiser:
    """optimi's Adam over this stage's trained parameters, which may be none.

    Args:
        parameters: by name.
        betas, eps: Adam's.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], betas: tuple[float, float], eps: float) -> None:
        self.parameters = parameters
        # foreach and not Triton: the same arithmetic on every device, and a resume that is exact.
        self._adam = (
            Adam(list(parameters.values()), lr=1.0, betas=betas, eps=eps, foreach=True, triton=False)
            if parameters
            else None
        )

    def step(self, lr: float, clip_factor: float) -> None:
        """Multiply the gradients by ``clip_factor`` if it is below 1, then take one Adam step."""
        if self._adam is None:
            return
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        if clip_factor < 1.0:
            torch._foreach_mul_(gradients, clip_factor)
        for group in self._adam.param_groups:
            group["lr"] = lr
        self._adam.step()

    def clear_gradients(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Adam's moments as ``NAME.exp_avg`` and so on, and its own count of steps as ``steps``."""
        if self._adam is None or not self._adam.state:
            return {}
        tensors = {
            f"{name}.{moment}": self._adam.state[parameter][moment]
            for name, parameter in self.parameters.items()
            for moment in MOMENTS
            if self._adam.state[parameter].get(moment) is not None
        }
        return {**tensors, "steps": self._adam.param_groups[0]["step"].clone()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take over a state that :meth:`state` gave; names of other stages' parameters are passed over.

        Raises:
            UsageError: a moment of a parameter or the count of steps is missing, or a moment has another shape.
        """
        if self._adam is None or not tensors:
            return
        if "steps" not in tensors:
            raise UsageError("The checkpoint's optimiser state does not fit: steps.")
        group = self._adam.param_groups[0]
        for name, parameter in self.parameters.items():
            state = self._adam.state[parameter]
            for moment in MOMENTS:
                saved = tensors.get(f"{name}.{moment}")
                if saved is None and moment == "kahan_comp":
                    state[moment] = None
                elif saved is None or saved.shape != parameter.shape:
                    raise UsageError(f"The checkpoint's optimiser state does not fit: {name}.{moment}.")
                else:
                    state[moment] = saved.to(parameter.device, parameter.dtype, copy=True)
            if state["kahan_comp"] is not None:
                group["kahan_sum"] = True  # optimi decides this where it makes a state, which it does not here
        group["setup"] = True
        group["step"] = tensors["steps"].to(torch.int32).clone()
