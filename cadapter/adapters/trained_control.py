"""The Control Adapters of one pipeline stage as the trainer sees them: parameters, decay, norms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cadapter.adapters.control import ControlAdapter, ControlSettings
from cadapter.adapters.guidelines import SMALLEST_SIGMA, Guideline, frobenius_limit
from cadapter.adapters.trained import Norms
from cadapter.algebra import (
    core,
    decay_,
    norms_from_gram,
    orthonormalising,
    smallest_singular_value,
    symmetric_decay,
)

SMALL_SPECTRAL = 0.5
"""Up to this ‖W‖₂, ``σ_min(I + W) ≥ 1 − ‖W‖₂`` says enough, and the singular values themselves are not worked out."""


class TrainedControlAdapters:
    """The adapters of this stage, and where their numbers stand among those of the whole model.

    Args:
        adapters: this stage's, by layer.
        settings: of all of them.
        layers: all adapted layers of the model, in order.
        decay: λ of the composite decay, which float32 factors alone get: in bfloat16 it would be lost in rounding.
        device: of the stage.
        gamma: γ of the symmetric form.
    """

    copies: frozenset[str] = frozenset()

    def __init__(
        self,
        adapters: Sequence[ControlAdapter],
        settings: ControlSettings,
        layers: Sequence[int],
        decay: float,
        device: torch.device,
        gamma: float = 0.5,
    ) -> None:
        self.adapters = list(adapters)
        self.settings = settings
        self.layers = list(layers)
        self.decay = decay if settings.dtype == torch.float32 else 0.0
        self.device = device
        self.gamma = gamma

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters of this stage by name, such as ``layers.3.control_A``."""
        named: dict[str, nn.Parameter] = {}
        for adapter in self.adapters:
            named.update((f"layers.{adapter.layer}.{name}", value) for name, value in adapter.named_parameters())
        return named

    @torch.no_grad()
    def after_step(self, lr: float) -> Tensor:
        """Decay every adapter of the stage with this step's learning rate, and return what their norms follow from.

        In the symmetric form the columns of Q are made orthonormal again, too.

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
        A, B = self._factors()
        before = ((A @ A.mT).double() * (B.mT @ B).double()).sum(dim=(1, 2))
        if self.settings.form == "symmetric":
            bounded = self._after_symmetric_step(lr)
            A, B = self._factors()
        else:
            bounded = self._decay(A, B, lr)
        parts = [A @ A.mT, B.mT @ B, core(A, B, scale)]
        rows = [part.double().flatten(1) for part in parts]
        report[first : first + len(self.adapters)] = torch.cat([*rows, before[:, None], bounded[:, None]], dim=1)
        return report

    def _stacked(self, name: str) -> Tensor:
        """A parameter of all adapters of the stage as one float32 tensor [L, ..]."""
        return torch.stack([adapter.get_parameter(name).detach().float() for adapter in self.adapters])

    def _store(self, name: str, values: Tensor) -> None:
        torch._foreach_copy_([adapter.get_parameter(name) for adapter in self.adapters], list(values))

    def _factors(self) -> tuple[Tensor, Tensor]:
        """A [L, r, H] and B [L, H, r] with ``W = s·B·A``, whatever the form."""
        if self.settings.form == "symmetric":
            Q = self._stacked("control_Q")
            return Q.mT, Q * torch.expm1(self._stacked("control_S"))[:, None]
        return self._stacked("control_A"), self._stacked("control_B")

    def _decay(self, A: Tensor, B: Tensor, lr: float) -> Tensor:
        """Decay the general form, ``A`` and ``B`` as well as the parameters; returns where the bound acted [L]."""
        if not self.decay * lr:  # a skipped step: what is not finite times nothing would be NaN
            return A.new_zeros(len(A), dtype=torch.float64)
        scale = self.settings.scale
        coefficient, _, _ = decay_(A, B, scale, lr * self.decay)
        self._store("control_A", A)
        self._store("control_B", B)
        return (coefficient < lr * self.decay * scale**2 * (1 - 1e-6)).double()

    def _after_symmetric_step(self, lr: float) -> Tensor:
        """``S ← (1 − min(lr·λ/r, 0.5))·S``, and Q orthonormal again; returns where the bound acted [L]."""
        Q = self._stacked("control_Q").double()
        self._store("control_Q", Q @ orthonormalising(Q.mT @ Q, self.gamma))
        share, bounded = symmetric_decay(lr * self.decay, self.settings.rank)
        self._store("control_S", (1 - share) * self._stacked("control_S"))
        return Q.new_full((len(Q),), float(bounded))

    def norms(self, report: Tensor) -> Norms:
        """The norms of all adapted layers, from the sum of what :meth:`after_step` returned on every stage."""
        rank, scale = self.settings.rank, self.settings.scale
        squares = rank * rank
        gram_A, gram_B, M = (report[:, k * squares : (k + 1) * squares].unflatten(1, (rank, rank)) for k in range(3))
        frobenius, spectral, radius = norms_from_gram(gram_A, gram_B, M, scale)
        before = scale * report[:, -2].clamp_min(0).sqrt()
        if self.settings.inverse == "neumann":
            guideline = self._of_series(frobenius, radius)
        else:
            sigma = 1 - spectral
            large = ~(spectral <= SMALL_SPECTRAL)
            if large.any():
                sigma[large] = smallest_singular_value(gram_A[large], gram_B[large], M[large], scale)
            worst = int(sigma.argmin())
            name, value = "σ_min(I+W)", sigma[worst].item()
            guideline = Guideline(name, value, SMALLEST_SIGMA, self.layers[worst], True, not large[worst])
        bounded = int(report[:, -1].sum())
        return Norms(frobenius, spectral, before - frobenius, radius, bounded, guideline)

    def _of_series(self, frobenius: Tensor, radius: Tensor) -> Guideline:
        """What the Neumann series asks for: ρ(W) below 1, without which it diverges, and ‖W‖_F ≤ 0.25·√r."""
        diverging, largest = int(radius.argmax()), int(frobenius.argmax())
        if not radius[diverging] < 1:
            return Guideline("ρ(W)", radius[diverging].item(), 1.0, self.layers[diverging])
        return Guideline("‖W‖_F", frobenius[largest].item(), frobenius_limit(self.settings.rank), self.layers[largest])
