"""The two forms of a layer's operator W as they are stored, which answer the same questions.

    general      W = s·B·A                 A [r, H], B [H, r]
    symmetric    W = Q·diag(expm1(S))·Qᵀ   Q [H, r] with orthonormal columns, S [r]; there is no scale (s = 1)

Every answer is worked out in float64.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from cadapter.algebra import balancing, core, strength_transform
from cadapter.errors import UsageError


@dataclass
class LowRank:
    """The general form: A [r, H] and B [H, r]."""

    form: ClassVar[str] = "general"
    A: Tensor
    B: Tensor

    def power(self, t: float, scale: float, where: str) -> Tensor | None:
        """T = f_t(M) [r, r] with ``(I + W)^t = I + s·B·T·A``; None is the identity (t = 1).

        Raises:
            UsageError: this power does not exist; ``where`` (the layer) is named.
        """
        if t == 1:
            return None
        A, B = self.A.double(), self.B.double()
        d = balancing(A, B)
        return d[:, None] * strength_transform(core(A / d[:, None], B * d, scale), t, where) / d

    def turned(self, t: float, scale: float, where: str) -> LowRank:
        """A and B' = s·B·T of ``(I + W)^t = I + B'·A``; raises as :meth:`power` does."""
        T, B = self.power(t, scale, where), scale * self.B.double()
        return LowRank(self.A.double(), B if T is None else B @ T)


@dataclass
class Symmetric:
    """The symmetric form: Q [H, r] and S [r]."""

    form: ClassVar[str] = "symmetric"
    Q: Tensor
    S: Tensor

    @property
    def A(self) -> Tensor:  # noqa: N802 (the name of the method's matrix)
        """Qᵀ [r, H]: with :attr:`B` the general form of the same W at scale 1."""
        return self.Q.double().mT

    @property
    def B(self) -> Tensor:  # noqa: N802
        """Q·diag(expm1(S)) [H, r]."""
        return self.Q.double() * torch.expm1(self.S.double())

    def power(self, t: float, scale: float, where: str) -> Tensor:
        """The diagonal of T, expm1(t·S) [r], with ``(I + W)^t = I + Q·T·Qᵀ``.

        Raises:
            UsageError: it leaves the range of float32; ``where`` (the layer) is named.
        """
        diagonal = torch.expm1(t * self.S.double())
        if not torch.isfinite(diagonal.float()).all():
            raise UsageError(f"{where}: strength {t:g} leaves the range of floating-point numbers.")
        return diagonal

    def turned(self, t: float, scale: float, where: str) -> LowRank:
        """A = Qᵀ and B' = Q·T of ``(I + W)^t = I + B'·A``; raises as :meth:`power` does."""
        return LowRank(self.A, self.Q.double() * self.power(t, scale, where))


Factors = LowRank | Symmetric
FORMS: dict[str, type[LowRank] | type[Symmetric]] = {kind.form: kind for kind in (LowRank, Symmetric)}


def named(factors: Factors) -> dict[str, Tensor]:
    """The tensors by the names under which they are stored and trained: control_A and control_B, or control_Q …"""
    return {f"control_{each.name}": getattr(factors, each.name) for each in fields(factors)}
