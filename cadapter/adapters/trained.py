"""What the trainer asks of the thing that is trained, whatever it is: Control Adapters, LoRA or the model itself.

The trainer, the checkpointer and the reports ask for nothing else. One object speaks for one pipeline stage.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from cadapter.adapters.guidelines import Guideline


@dataclass(frozen=True)
class Norms:
    """Norms of all adapters of the whole model after a step, on the CPU in float64, each [k].

    Attributes:
        frobenius: ‖W‖_F of each adapted layer (Control Adapters) or pair (LoRA).
        spectral: ‖W‖₂.
        decayed: ‖W‖_F before the weight decay minus after.
        radius: ρ(W), where W is square; else empty.
        bounded: for how many of them the decay's bound acted.
        guideline: what decides whether W can be inverted as it is trained; None where nothing is inverted.
    """

    frobenius: Tensor
    spectral: Tensor
    decayed: Tensor
    radius: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    bounded: int = 0
    guideline: Guideline | None = None

    def metrics(self) -> dict[str, float]:
        """The numbers of a step under the names of metrics.jsonl."""
        found = {
            "train/norm_avg": self.frobenius.mean().item(),
            "train/norm_max": self.frobenius.max().item(),
            "train/spectral_max": self.spectral.max().item(),
            "train/weight_decay_avg": self.decayed.mean().item(),
            "train/weight_decay_max": self.decayed.max().item(),
        }
        if len(self.radius):
            found["train/radius_max"] = self.radius.max().item()
        return found


class Trained(Protocol):
    """The trained parameters of one pipeline stage, and what follows an optimiser step.

    Attributes:
        copies: names of those parameters that an earlier stage holds too; they are kept equal to it.
    """

    copies: frozenset[str]

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters of this stage by name, which is the same in every layout; may be empty."""

    def after_step(self, lr: float) -> Tensor:
        """Do what follows an optimiser step taken with ``lr``, and return what norms follow from.

        Returns:
            A float64 tensor whose shape is the same on every stage and which is zero where another stage's adapters
            stand, so that a sum over the stages is complete. Nothing here waits for the device.
        """

    def norms(self, report: Tensor) -> Norms | None:
        """The norms that follow from the sum of all stages' reports, which is on the CPU; None without adapters."""
