"""The optimiser's part of a step: clipping, Adam; and Adam's state by parameter name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch
from optimi import Adam
from torch import Tensor, nn

from cadapter.errors import UsageError
from cadapter.training.gradients import Gradients

MOMENTS = ("exp_avg", "exp_avg_sq", "kahan_comp")
STEPS = "steps"


GROUP_BYTES = 1 << 30
"""The optimiser's step works on about this many bytes of parameters at a time, to bound its intermediate results."""


class Optimiser:
    """optimi's Adam over this stage's trained parameters, which may be none.

    Args:
        parameters: by name.
        betas, eps: Adam's.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], betas: tuple[float, float], eps: float) -> None:
        self.parameters = parameters
        self._groups = list(_grouped(parameters))
        # foreach and not Triton: the same arithmetic on every device, and a resume that is exact.
        self._adams = [
            Adam([parameters[name] for name in names], lr=1.0, betas=betas, eps=eps, foreach=True, triton=False)
            for names in self._groups
        ]

    def step(self, lr: float, clip_factor: float, gradients: Gradients) -> None:
        """Multiply the gradients by ``clip_factor`` if it is below 1, then take one Adam step."""
        for names, adam in zip(self._groups, self._adams, strict=True):
            gradients.hand_over(names, clip_factor)
            for group in adam.param_groups:
                group["lr"] = lr
            adam.step()
            for name in names:
                self.parameters[name].grad = None

    def missing_bytes(self) -> int:
        """Bytes of the state that the first step will make; 0 where it is there.

        Each moment has its parameter's dtype, and below float32 Kahan's compensation is the third.
        """
        return sum(
            parameter.nbytes * (2 if parameter.dtype == torch.float32 else 3)
            for group, adam in zip(self._groups, self._adams, strict=True)
            for parameter in (self.parameters[name] for name in group)
            if not adam.state.get(parameter)
        )

    def state(self, names: Collection[str]) -> Iterator[dict[str, Tensor]]:
        """Adam's moments of the parameters ``names`` as ``NAME.exp_avg`` and so on, a group at a time.

        Each group has Adam's own count of steps as ``steps`` beside it.
        """
        for group, adam in zip(self._groups, self._adams, strict=True):
            tensors = {
                f"{name}.{moment}": adam.state[self.parameters[name]][moment]
                for name in group
                for moment in MOMENTS
                if name in names and adam.state[self.parameters[name]].get(moment) is not None
            }
            if tensors:
                yield {**tensors, STEPS: adam.param_groups[0]["step"].clone()}

    def load_state(self, read: Callable[[list[str]], dict[str, Tensor]]) -> None:
        """Take over a state that :meth:`state` gave.

        Args:
            read: gives those of the named tensors that there are.

        Raises:
            UsageError: a moment of a parameter or the count of steps is missing, or a moment has another shape.
        """
        for group, adam in zip(self._groups, self._adams, strict=True):
            wanted = [f"{name}.{moment}" for name in group for moment in MOMENTS]
            tensors = read([*wanted, STEPS])
            if not tensors:  # no step was taken yet that was not skipped
                continue
            if STEPS not in tensors:
                raise UsageError("The checkpoint's optimiser state does not fit: it has no count of steps.")
            for name in group:
                self._load_moments(adam, name, tensors)
            settings = adam.param_groups[0]
            settings["setup"] = True
            settings["step"] = tensors[STEPS].to(torch.int32).clone()

    def _load_moments(self, adam: Adam, name: str, tensors: dict[str, Tensor]) -> None:
        parameter = self.parameters[name]
        state = adam.state[parameter]
        for moment in MOMENTS:
            saved = tensors.get(f"{name}.{moment}")
            if saved is None and moment == "kahan_comp":
                state[moment] = None
            elif saved is None or saved.shape != parameter.shape:
                raise UsageError(f"The checkpoint's optimiser state does not fit: {name}.{moment}.")
            else:
                state[moment] = saved.to(parameter.device, parameter.dtype, copy=True)
        if state["kahan_comp"] is not None:
            adam.param_groups[0]["kahan_sum"] = True  # optimi decides this where it makes a state, as it does not here


def _grouped(parameters: dict[str, nn.Parameter]) -> Iterator[list[str]]:
    """Names of parameters of one dtype that stand together and take about ``GROUP_BYTES``."""
    group: list[str] = []
    size = 0
    for name, parameter in parameters.items():
        if group and (size >= GROUP_BYTES or parameter.dtype != parameters[group[0]].dtype):
            yield group
            group, size = [], 0
        group.append(name)
        size += parameter.numel() * parameter.element_size()
    if group:
        yield group
