"""The Control Adapters of one pipeline stage as the trainer sees them: parameters, decay, norms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cadapter.adapters.control import ControlAdapter, ControlSettings
from cadapter.adapters.trained import Norms
from cadapter.algebra import core, decay_, norms_from_gram


class TrainedControlAdapters:
    """The adapters of this stage, and where their numbers stand among those of the whole model.

    Args:
        adapters: this stage's, by layer.
        settings: of all of them.
        layers: all adapted layers of the model, in order.
        decay: λ of the composite decay, which float32 factors alone get: in bfloat16 it would be lost in rounding.
        device: of the stage.
    """

    copies: frozenset[str] = frozenset()

    def __init__(
        self,
        adapters: Sequence[ControlAdapter],
        settings: ControlSettings,
        layers: Sequence[int],
        decay: float,
        device: torch.device,
    ) -> None:
        self.adapters = list(adapters)
        self.settings = settings
        self.layers = list(layers)
        self.decay = decay if settings.dtype == torch.float32 else 0.0
        self.device = device

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters of this stage by name, such as ``layers.3.control_A``."""
        named: dict[str, nn.Parameter] = {}
        for adapter in self.adapters:
            named[f"layers.{adapter.layer}.control_A"] = adapter.control_A
            named[f"layers.{adapter.layer}.control_B"] = adapter.control_B
        return named

    @torch.no_grad()
    def after_step(self, lr: float) -> Tensor:
        """Decay every adapter of the stage with this step's learning rate, and return what their norms follow from.

        Returns:
            [adapted layers of the model, 3·r² + 2] float64: AAᵀ, BᵀB and the core M after the decay, ‖W‖_F²/s² before
            it, and whether the decay's bound acted. Rows of other stages' layers are zero, so that a sum over the
            stages is complete. Nothing here waits for the device.
        """
        rank, scale = self.settings.rank, self.settings.scale
        report = torch.zeros(len(self.layers), 3 * rank * rank + 2, dtype=torch.float64, device=self.device)
        if not self.adapters:
            return report
        first = self.layers.index(self.adapters[0].layer)
        A = torch.stack([adapter.control_A.detach().float() for adapter in self.adapters])
        B = torch.stack([adapter.control_B.detach().float() for adapter in self.adapters])
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

    def norms(self, report: Tensor) -> Norms:
        """The norms of all adapted layers, from the sum of what :meth:`after_step` returned on every stage."""
        rank, scale = self.settings.rank, self.settings.scale
        squares = rank * rank
        gram_A, gram_B, M = (report[:, k * squares : (k + 1) * squares].unflatten(1, (rank, rank)) for k in range(3))
        frobenius, spectral, radius = norms_from_gram(gram_A, gram_B, M, scale)
        before = scale * report[:, -2].clamp_min(0).sqrt()
        return Norms(frobenius, spectral, before - frobenius, radius, int(report[:, -1].sum()))
