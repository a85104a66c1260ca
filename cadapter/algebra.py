"""Rank-space mathematics of a low-rank operator ``W = s·B·A``: nothing here ever forms an [H, H] matrix.

    A [r, H], B [H, r]   factors          s = alpha / r     scale (a float)
    M = s·A·B [r, r]     core             H hidden size, r rank

With ``z = A·x`` every operator of the method is ``y = s·B·T·z`` and differs only in the r × r matrix ``T``:

    W·x                  T = I
    ((I+W)^-1 − I)·x     T = −(I + M)^-1                           (Woodbury's identity)
    its Neumann series   T = −(I − M + M² − … ± M^(k−1))
    ((I+W)^t − I)·x      T = f_t(M),  f_t(x) = ((1 + x)^t − 1)/x   (one group: t = 1, −1, 0, ½, 2, …)

In the symmetric form, ``I + W = Q·diag(e^S)·Qᵀ + (I − QQᵀ)`` with orthonormal Q [H, r] and S [r], the operator is
``A = Qᵀ``, ``B = Q``, ``s = 1`` and ``T = diag(expm1(t·S))``: every power exists, and t = −1 is the inverse.

Leading dimensions batch where that is natural: [L, r, H] holds the factors of L layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cadapter.errors import UsageError

SINGULAR = 1e-6
"""I + M counts as singular below this smallest singular value (relative): 8 roundings of the stored float32."""

FRACTIONAL_ERROR = 1e-9
"""Largest relative error allowed in ``((I + M)^½)² = I + M`` before a fractional power is refused."""

QUADRATURE_POINTS = 32
QUADRATURE_REACH = 0.5
"""‖M‖₂ up to which the quadrature is exact to all digits; it fails from eigenvalues of I + M of 0.02 or 41 on."""
MOST_ROOTS = 20
MOST_ROOT_STEPS = 30
ROOT_STEP = 1e-14
"""Relative size of the steps toward a square root at which they end."""
BESIDE_THE_AXIS = 0.05
"""Angle (radians) from the negative real axis within which an eigenvalue counts as the reason that there is no root."""
SQUARINGS = 11

ORTHONORMAL = 1e-6
"""‖QᵀQ − I‖ up to which the columns of Q count as orthonormal: about what float32 can store."""
ORTHONORMALISING_STEPS = 4
CONTRACTING = 0.5
"""‖QᵀQ − I‖_F up to which steps toward orthonormal columns are taken: they contract there for every γ in (0, ½]."""


def _identity_like(M: Tensor) -> Tensor:
    return torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)


def core(A: Tensor, B: Tensor, scale: float) -> Tensor:
    """``M = s·A·B``: [.., r, H], [.., H, r] → [.., r, r]."""
    return scale * (A @ B)


def exact_inverse(M: Tensor) -> Tensor:
    """``T = −(I + M)^-1``: [.., r, r] → [.., r, r], so that ``s·B·T·A = (I + W)^-1 − I``.

    Differentiable, and without a host-side check: a singular ``I + M`` gives values that are not finite instead of
    an error, so that nothing in a training step waits for the device.
    """
    identity = _identity_like(M)
    inverse, _ = torch.linalg.solve_ex(identity + M, identity.expand_as(M), check_errors=False)
    return -inverse


def neumann_inverse(M: Tensor, order: int) -> Tensor:
    """``T = −(I − M + M² − … ± M^(order−1))``: [.., r, r] → [.., r, r].

    ``s·B·T·A = −W + W² − … ± W^order``, the first terms of the Neumann series of ``(I + W)^-1 − I``.
    """
    identity = _identity_like(M)
    partial_sum = identity.expand_as(M)
    for _ in range(order - 1):
        partial_sum = identity - M @ partial_sum
    return -partial_sum


def check_invertible(M: Tensor, where: str = "") -> None:
    """Make sure that ``I + W`` has an inverse, which it has if and only if ``I + M`` [.., r, r] has.

    Raises:
        UsageError: it is singular to the precision of float32; ``where`` (the layer) is named.
    """
    core_plus_identity = M.double() + _identity_like(M.double())
    if not torch.isfinite(core_plus_identity).all():
        raise UsageError(f"{_prefix(where)}the adapter's factors are not finite numbers.")
    singular_values = torch.linalg.svdvals(core_plus_identity)
    smallest, largest = singular_values.amin().item(), singular_values.amax().item()
    if smallest <= SINGULAR * max(1.0, largest):
        raise UsageError(
            f"{_prefix(where)}I + W is singular (smallest singular value of its core: {smallest:.1e}), so it has no "
            "inverse.\nClass −1, --inverse, strengths of −1 or less and fractional strengths do not exist for it."
        )


def _prefix(where: str) -> str:
    return f"{where}: " if where else ""


def _compose(F: Tensor, G: Tensor, M: Tensor) -> Tensor:
    """``f_(a+b) = f_a + f_b + f_a·M·f_b``: the group law ``(I+W)^a·(I+W)^b = (I+W)^(a+b)`` in rank space."""
    return F + G + F @ M @ G


def _integer_power(F: Tensor, M: Tensor, n: int) -> Tensor:
    """``f_(n·a)(M)`` from ``F = f_a(M)`` and n ≥ 1, by repeated squaring under the group law."""
    power, square = torch.zeros_like(F), F
    while n:
        if n & 1:
            power = _compose(power, square, M)
        n >>= 1
        if n:
            square = _compose(square, square, M)
    return power


def gauss_legendre(points: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights [points] in float64 for integrals over [0, 1] (Golub and Welsch, 1969)."""
    k = torch.arange(1, points, dtype=torch.float64)
    off_diagonal = k / torch.sqrt(4 * k * k - 1)
    nodes, vectors = torch.linalg.eigh(torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1))
    return (nodes + 1) / 2, vectors[0] ** 2


def _inverse(X: Tensor) -> Tensor:
    """``X^-1`` [.., r, r], not finite where there is none."""
    return torch.linalg.solve_ex(X, _identity_like(X).expand_as(X))[0]


def _square_root(X: Tensor) -> Tensor:
    """``X^½`` [.., r, r] float64, with eigenvalues in the right half-plane, by the iteration of Denman and Beavers.

    ``Y ← (Y + Z^-1)/2``, ``Z ← (Z + Y^-1)/2`` from ``Y = X``, ``Z = I``. It goes nowhere where there is no such root.
    """
    Y, Z = X, _identity_like(X).expand_as(X)
    for _ in range(MOST_ROOT_STEPS):
        before = Y
        Y, Z = (Y + _inverse(Z)) / 2, (Z + _inverse(Y)) / 2
        moved = torch.linalg.matrix_norm(Y - before) / torch.linalg.matrix_norm(Y)
        if not bool((moved > ROOT_STEP).any()):
            break
    return Y


def _logarithm_over(M: Tensor) -> Tensor:
    """``K = ∫₀¹ (I + u·M)^-1 du``, so that ``K·M = log(I + M)``: [.., r, r] float64.

    By quadrature, where M is small. Where it is not, of roots: with ``I + N = (I + M)^(2^-k)`` there is an F with
    ``N = F·M``, and ``K(M) = 2^k·K(N)·F``. Each root gives a factor ``(I + (I + N)^½)^-1`` of F, which loses no digits.
    """
    identity = _identity_like(M)
    N, F, roots = M, identity.expand_as(M), 0
    while roots < MOST_ROOTS and bool((torch.linalg.matrix_norm(N) > QUADRATURE_REACH).any()):
        factor = _inverse(identity + _square_root(identity + N))
        N, F, roots = factor @ N, factor @ F, roots + 1
    K = torch.zeros_like(M)
    for node, weight in zip(*gauss_legendre(QUADRATURE_POINTS), strict=True):
        K += weight.item() * _inverse(identity + node.item() * N)
    return 2.0**roots * K @ F


def _phi1(X: Tensor) -> Tensor:
    """``φ₁(X) = (e^X − I)/X`` [.., r, r], as the upper right block of the exponential of ``[[X, I], [0, 0]]``."""
    r = X.shape[-1]
    block = X.new_zeros(*X.shape[:-2], 2 * r, 2 * r)
    block[..., :r, :r] = X
    block[..., :r, r:] = _identity_like(X)
    return torch.linalg.matrix_exp(block)[..., :r, r:]


def _fractional_power(M: Tensor, t: float, where: str) -> Tensor:
    """``f_t(M) = t·φ₁(t·L)·K`` with ``L = K·M``; right for defective M and for tiny eigenvalues."""
    identity, K = _identity_like(M), _logarithm_over(M)
    L = K @ M
    root = identity + M @ (0.5 * _phi1(0.5 * L) @ K)
    target = identity + M
    error = torch.linalg.matrix_norm(root @ root - target) / torch.linalg.matrix_norm(target)
    if not bool((error <= FRACTIONAL_ERROR).all()):
        raise UsageError(f"{_prefix(where)}{_why_no_root(target, t)}\nWhole-number strengths need no root.")
    return t * _phi1(t * L) @ K


def _why_no_root(target: Tensor, t: float) -> str:
    """What keeps ``I + M`` = ``target`` from having a power t that can be worked out."""
    eigenvalues = torch.linalg.eigvals(target).flatten()
    nearest = eigenvalues[eigenvalues.angle().abs().argmax()]
    if math.pi - nearest.angle().abs().item() < BESIDE_THE_AXIS:
        return (
            f"strength {t:g} does not exist or cannot be computed accurately: I + W has the eigenvalue "
            f"{nearest.item():.3g}, on or near the negative real axis."
        )
    sizes = torch.linalg.svdvals(target)
    return (
        f"strength {t:g} cannot be computed accurately: the core of I + W has singular values from "
        f"{sizes.amin().item():.3g} to {sizes.amax().item():.3g}, too far apart for its roots."
    )


def balancing(A: Tensor, B: Tensor) -> Tensor:
    """d [r] such that the rows of ``A/d`` and the columns of ``B·d`` are of like size, for A [r, H], B [H, r].

    ``W = s·B·A`` is the same for both pairs, but cores of factors that are far apart in size lose digits, and look
    singular where ``I + W`` is not. Powers of two, by which nothing is rounded; 1 where a row or a column is zero.
    """
    d = (torch.linalg.vector_norm(A, dim=1) / torch.linalg.vector_norm(B, dim=0)).sqrt().log2().round().exp2()
    return torch.where(torch.isfinite(d) & (d > 0), d, 1.0)


def strength_transform(M: Tensor, t: float, where: str = "") -> Tensor:
    """``f_t(M)`` with ``f_t(x) = ((1 + x)^t − 1)/x``: [.., r, r] → [.., r, r] in float64.

    ``(I + W)^t = I + s·B·f_t(M)·A``: t = 1 gives I, t = −1 gives −(I + M)^-1, t = 0 gives 0. Whole t go by products
    and solves; others by the logarithm (roots and Gauss–Legendre) and a block matrix exponential.

    Raises:
        UsageError: the power does not exist, with ``where`` (the layer) named.
    """
    M = M.double()
    if not math.isfinite(t):
        raise UsageError(f"{_prefix(where)}the strength {t} is not a finite number.\nGive one, such as 1, -1 or 0.5.")
    if not torch.isfinite(M).all():
        raise UsageError(f"{_prefix(where)}the adapter's factors are not finite numbers.")
    if t == 0:
        return torch.zeros_like(M)
    whole = float(t).is_integer()
    if t < 0 or not whole:
        check_invertible(M, where)
    if whole:
        step = _identity_like(M).expand_as(M).clone() if t > 0 else exact_inverse(M)
        result = _integer_power(step, M, abs(int(t)))
    else:
        result = _fractional_power(M, t, where)
    if not torch.isfinite(result).all():
        raise UsageError(f"{_prefix(where)}strength {t:g} leaves the range of floating-point numbers.")
    return result


@dataclass(frozen=True)
class Health:
    """What one layer's ``W`` does, as numbers.

    Attributes:
        frobenius, spectral: ``‖W‖_F`` and ``‖W‖₂``.
        radius: spectral radius ``ρ(W)``; the Neumann series converges if and only if it is below 1.
        sigma_min, sigma_max, condition: extreme singular values of ``I + W`` and their quotient.
        effective_rank: ``(Σσ)² / Σσ²`` over the singular values of W; 0 for W = 0.
        neumann_remainder_1, neumann_remainder_2: ``‖(I+W)^-1 − Σ_{j≤k} (−W)^j‖₂`` for k = 1 and 2; infinite where
            ``I + W`` is singular.
        singular_values: of W, the r that need not be zero, in descending order.
    """

    frobenius: float
    spectral: float
    radius: float
    sigma_min: float
    sigma_max: float
    condition: float
    effective_rank: float
    neumann_remainder_1: float
    neumann_remainder_2: float
    singular_values: tuple[float, ...]


def _triangular(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """R_B and R_A [2r, r] (or [H, r] where H < 2r) with ``B = Q·R_B`` and ``Aᵀ = Q·R_A`` for one Q with orthonormal
    columns: in that basis W is ``s·R_B·R_Aᵀ`` and everything below is small. In float64."""
    R = torch.linalg.qr(torch.cat([B.double(), A.double().mT], dim=1), mode="r").R
    return R[:, : A.shape[0]], R[:, A.shape[0] :]


def _remainder(R_A: Tensor, R_B: Tensor, scale: float, order: int) -> float:
    M = core(R_A.mT, R_B, scale)
    left_out = scale * R_B @ torch.linalg.matrix_power(M, order) @ exact_inverse(M) @ R_A.mT
    return torch.linalg.matrix_norm(left_out, 2).item() if torch.isfinite(left_out).all() else math.inf


def neumann_remainder(A: Tensor, B: Tensor, scale: float, order: int) -> float:
    """``‖(I+W)^-1 − Σ_{j≤k} (−W)^j‖₂ = ‖s·B·M^k·(I+M)^-1·A‖₂``: what order k leaves out; inf where I + W is singular.

    A [r, H], B [H, r]; worked out in float64 through the triangular factors of B and Aᵀ.
    """
    R_B, R_A = _triangular(A, B)
    return _remainder(R_A, R_B, scale, order)


def health(A: Tensor, B: Tensor, scale: float) -> Health:
    """Norms and health of ``W = s·B·A`` for A [r, H], B [H, r], in float64 through one QR of [B, Aᵀ].

    The singular values of ``I + W`` are those of ``I + s·R_B·R_Aᵀ``, and 1 where H > 2r.
    """
    R_B, R_A = _triangular(A, B)
    inner = scale * R_B @ R_A.mT
    sigma = torch.linalg.svdvals(inner)[: A.shape[0]]
    of_sum = torch.linalg.svdvals(_identity_like(inner) + inner)
    if A.shape[1] > 2 * A.shape[0]:
        of_sum = torch.cat([of_sum, of_sum.new_ones(1)])
    squares = sigma.square().sum().item()
    smallest, largest = of_sum.amin().item(), of_sum.amax().item()
    return Health(
        frobenius=math.sqrt(squares),
        spectral=sigma.amax().item(),
        radius=torch.linalg.eigvals(core(R_A.mT, R_B, scale)).abs().amax().item(),
        sigma_min=smallest,
        sigma_max=largest,
        condition=largest / smallest if smallest > 0 else math.inf,
        effective_rank=sigma.sum().item() ** 2 / squares if squares > 0 else 0.0,
        neumann_remainder_1=_remainder(R_A, R_B, scale, 1),
        neumann_remainder_2=_remainder(R_A, R_B, scale, 2),
        singular_values=tuple(sigma.tolist()),
    )


def norms_from_gram(gram_A: Tensor, gram_B: Tensor, M: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """``‖W‖_F``, ``‖W‖₂`` and ``ρ(W)`` of L layers from what a training step leaves behind.

    ``gram_A = A·Aᵀ``, ``gram_B = Bᵀ·B``, ``M``: [L, r, r] in float64 on the CPU → three tensors [L]. With
    ``‖W‖_F = s·√tr(BᵀB·AAᵀ)`` and ``‖W‖₂ = s·√λ_max(BᵀB·AAᵀ)``; a layer whose matrices are not finite gets inf.
    """
    finite = torch.isfinite(gram_A + gram_B + M).all(dim=(-2, -1))
    gram_A, gram_B, M = (torch.where(finite[:, None, None], matrix, 0.0) for matrix in (gram_A, gram_B, M))
    values, vectors = torch.linalg.eigh(gram_A)
    root_A = vectors * values.clamp_min(0).sqrt().unsqueeze(-2) @ vectors.mT
    frobenius = scale * (gram_A * gram_B).sum(dim=(-2, -1)).clamp_min(0).sqrt()
    spectral = scale * torch.linalg.eigvalsh(root_A @ gram_B @ root_A)[:, -1].clamp_min(0).sqrt()
    radius = torch.linalg.eigvals(M).abs().amax(dim=-1)
    frobenius, spectral, radius = (torch.where(finite, norm, math.inf) for norm in (frobenius, spectral, radius))
    return frobenius, spectral, radius


def smallest_singular_value(gram_A: Tensor, gram_B: Tensor, M: Tensor, scale: float) -> Tensor:
    """``σ_min(I + W)`` of L layers from ``gram_A = A·Aᵀ``, ``gram_B = Bᵀ·B`` and ``M``: [L, r, r] → [L], at most 1.

    With ``G = ZᵀZ`` the Gram matrix of ``Z = [B, Aᵀ]`` there is a Q with orthonormal columns and ``Z = Q·√G``. In its
    basis W is ``s·√G·E·√G``, where E [2r, 2r] is the identity in its upper right [r, r] and zero elsewhere; orthogonal
    to it ``I + W`` is the identity (H > 2r). For float64 on the CPU; a layer that is not finite gets 0.
    """
    finite = torch.isfinite(gram_A + gram_B + M).all(dim=(-2, -1))
    gram_A, gram_B, M = (torch.where(finite[:, None, None], matrix, 0.0) for matrix in (gram_A, gram_B, M))
    rank, product = M.shape[-1], M / scale  # A·B
    gram = torch.cat([torch.cat([gram_B, product.mT], dim=-1), torch.cat([product, gram_A], dim=-1)], dim=-2)
    values, vectors = torch.linalg.eigh(gram)
    root = vectors * values.clamp_min(0).sqrt().unsqueeze(-2) @ vectors.mT
    W = scale * root[..., :rank] @ root[..., rank:, :]
    smallest = torch.linalg.svdvals(_identity_like(W) + W)[..., -1].clamp_max(1)
    return torch.where(finite, smallest, 0.0)


def largest_eigenvalue(G: Tensor) -> Tensor:
    """``λ_max`` of symmetric non-negative G [.., r, r] → [..], from above, without a host synchronisation.

    ``‖G^p‖_F^(1/p) ≤ λ_max·r^(1/2p)`` with p = 2^SQUARINGS: 0.1 % too much at rank 64, 0.2 % at rank 1024.
    """
    norms = []
    for k in range(SQUARINGS + 1):
        G = G @ G if k else G
        norms.append(torch.linalg.matrix_norm(G).clamp_min(torch.finfo(G.dtype).tiny))
        G = G / norms[-1][..., None, None]
    shares = torch.arange(len(norms), dtype=G.dtype, device=G.device).neg().exp2()
    return (torch.stack(norms, dim=-1).log() @ shares).exp()


def decay_coefficient(gram_A: Tensor, gram_B: Tensor, scale: float, lr_times_lambda: float | Tensor) -> Tensor:
    """``c = min(lr·λ·s², 0.5 / max(σ_max(BᵀB), σ_max(AAᵀ)))``: [.., r, r] twice → [..].

    The bound keeps a decay step from overshooting; it acted where the result is below ``lr·λ·s²``.
    """
    bound = 0.5 / largest_eigenvalue(torch.stack([gram_A, gram_B])).amax(dim=0)  # together: half the launches on a GPU
    return torch.clamp(bound, max=lr_times_lambda * scale**2)


@torch.no_grad()
def decay_(A: Tensor, B: Tensor, scale: float, lr_times_lambda: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One step of ``λ·½‖W‖_F²`` in place: ``A ← A − c·(BᵀB)·A``, ``B ← B − c·B·(AAᵀ)``, both from the same (A, B).

    A [.., r, in] and B [.., out, r] are float32 factors: Control Adapters or LoRA pairs. Returns ``c`` [..] of
    :func:`decay_coefficient`, ``AAᵀ`` and ``BᵀB`` [.., r, r], the latter two from before the step. O(H·r²).
    """
    gram_A, gram_B = A @ A.mT, B.mT @ B
    c = decay_coefficient(gram_A, gram_B, scale, lr_times_lambda)
    A_step, B_step = gram_B @ A, B @ gram_A
    A.sub_(c[..., None, None] * A_step)
    B.sub_(c[..., None, None] * B_step)
    return c, gram_A, gram_B


def symmetric_decay(lr_times_lambda: float, rank: int) -> tuple[float, bool]:
    """``min(lr·λ/r, 0.5)``, the share that S loses in a step, and whether the bound acted.

    The division by r puts λ on the scale that it has in the general form.
    """
    share = lr_times_lambda / rank
    return min(share, 0.5), share > 0.5


def orthogonality_error(Q: Tensor) -> float:
    """``‖QᵀQ − I‖₂`` for Q [H, r], in float64."""
    gram = Q.double().mT @ Q.double()
    return torch.linalg.matrix_norm(gram - _identity_like(gram), 2).item()


def orthonormalising(gram: Tensor, gamma: float) -> Tensor:
    """C [.., r, r] such that the columns of ``Q·C`` are orthonormal, from ``gram = QᵀQ`` in float64.

    ``Q ← Q − γ·Q·(QᵀQ − I)`` until ``‖QᵀQ − I‖_F ≤ 1e-6`` (the spectral norm is smaller still), at most four times,
    then QR with the signs kept. All of it stays in the span of Q, ``Q_k = Q·C_k`` and ``Q_kᵀQ_k = C_kᵀ·gram·C_k``, so
    it runs on r × r matrices; the R of the QR is a Cholesky factor of ``gram``. Where Q is orthonormal already C is
    exactly I. Nothing waits for the device.
    """
    identity = _identity_like(gram).expand_as(gram)
    C = identity

    def error(C: Tensor) -> Tensor:
        return torch.linalg.matrix_norm(C.mT @ gram @ C - identity)[..., None, None]

    for _ in range(ORTHONORMALISING_STEPS):
        moves = (error(C) > ORTHONORMAL) & (error(C) <= CONTRACTING)
        C = torch.where(moves, C - gamma * C @ (C.mT @ gram @ C - identity), C)
    R = torch.linalg.cholesky_ex(gram, check_errors=False)[0].mT
    by_qr = torch.linalg.solve_triangular(R, identity, upper=True)
    by_qr = torch.where(torch.isfinite(by_qr).all(-1).all(-1)[..., None, None], by_qr, C)
    return torch.where(error(C) > ORTHONORMAL, by_qr, C)
