"""The Control Adapters of one pipeline stage as the trainer sees them: parameters, decay, norms, files.

The trainer, the checkpointer and the reports ask for nothing else, so that other kinds of training can answer the
same questions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cadapter.adapters.control import ControlAdapter
from cadapter.algebra import core, decay_, norms_from_gram


class TrainedControlAdapters:
    """The adapters of this stage, and where their numbers stand among those of the whole model.

    Args:
        adapters: this stage's, by layer.
        layers: all adapted layers of the model, in order.
        decay: λ of the composite decay.
        device: of the stage.
    """

    def __init__(
        self, adapters: Sequence[ControlAdapter], layers: Sequence[int], decay: float, device: torch.device
    ) -> None:
        self.adapters = list(adapters)
        self.layers = list(layers)
        self.decay = decay
        self.device = device

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters of this stage by name, such as ``layers.3.control_A``."""
        named: dict[str, nn.Parameter] = {}
        for adapter in self.adapters:
            named[f"layers.{adapter.layer}.control_A"] = adapter.control_A
            named[f"layers.{adapter.layer}.control_B"] = adapter.control_B
        return named

    @torch.no_grad()
    def after_step(self, lr: float, rank: int) -> Tensor:
        """Decay every adapter of the stage with this step's learning rate, and return what their norms follow from.

        Returns:
            [adapted layers of the model, 3·r² + 2] float64: AAᵀ, BᵀB and the core M after the decay, ‖W‖_F²/s² before
            it, and whether the decay's bound acted. Rows of other stages' layers are zero, so that a sum over the
            stages is complete. Nothing here waits for the device.
        """
        report = torch.zeros(len(self.layers), 3 * rank * rank + 2, dtype=torch.float64, device=self.device)
        if not self.adapters:
            return report
        first = self.layers.index(self.adapters[0].layer)
        scale = self.adapters[0].settings.scale
        A = torch.stack([adapter.control_A.detach() for adapter in self.adapters])
        B = torch.stack([adapter.control_B.detach() for adapter in self.adapters])
        before = ((A @ A.mT).double() * (B.mT @ B).double()).sum(dim=(1, 2))
        bounded = torch.zeros_like(before)
        if self.decay > 0:
            coefficient, _, _ = decay_(A, B, scale, lr * self.decay)
            bounded = (coefficient < lr * self.decay * scale**2 * (1 - 1e-6)).double()
            for adapter, new_A, new_B in zip(self.adapters, A, B, strict=True):
                adapter.control_A.copy_(new_A)
                adapter.control_B.copy_(new_B)
        parts = [A @ A.mT, B.mT @ B, core(A, B, scale)]
        rows = [part.double().flatten(1) for part in parts]
        report[first : first + len(self.adapters)] = torch.cat([*rows, before[:, None], bounded[:, None]], dim=1)
        return report


class NormSummary:
    """Norms of all adapted layers of a model at one step, made on the CPU from the stages' reports.

    Args:
        report: the sum of what :meth:`TrainedControlAdapters.after_step` returned on every stage.
        rank: r.
        scale: s.
    """

    def __init__(self, report: Tensor, rank: int, scale: float) -> None:
        layers = report.shape[0]
        squares = rank * rank
        gram_A, gram_B, M = (report[:, k * squares : (k + 1) * squares].view(layers, rank, rank) for k in range(3))
        self.frobenius, self.spectral, self.radius = norms_from_gram(gram_A, gram_B, M, scale)
        self.decayed = scale * report[:, -2].clamp_min(0).sqrt() - self.frobenius
        self.bounded_layers = int(report[:, -1].sum())

    def metrics(self) -> dict[str, float]:
        """The numbers of a step under the names of metrics.jsonl."""
        return {
            "train/norm_avg": self.frobenius.mean().item(),
            "train/norm_max": self.frobenius.max().item(),
            "train/spectral_max": self.spectral.max().item(),
            "train/radius_max": self.radius.max().item(),
            "train/weight_decay_avg": self.decayed.mean().item(),
            "train/weight_decay_max": self.decayed.max().item(),
        }
