"""The trained weights of one pipeline stage in full fine-tuning, as the trainer sees them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cadapter.adapters.trained import Norms


class TrainedWeights:
    """Weights of the model itself, which have no norms to report and no decay.

    Args:
        parameters: the trained ones of this stage by the names they have in the whole model.
        copies: the names among them that an earlier stage holds too: a head that is tied to the embedding.
        device: of the stage.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], copies: frozenset[str], device: torch.device) -> None:
        self._parameters = dict(parameters)
        self.copies = copies
        self._device = device

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name."""
        return self._parameters

    def after_step(self, lr: float) -> Tensor:
        """Nothing follows a step."""
        return torch.zeros(0, dtype=torch.float64, device=self._device)

    def norms(self, report: Tensor) -> Norms | None:
        """There are no adapters."""
        return None
