"""The method with ``W`` formed as an [H, H] matrix, in float64: each function is its formula and nothing else.

Rows are tokens: a row vector ``x`` becomes ``x @ W.T``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def full_matrix(A: Tensor, B: Tensor, scale: float) -> Tensor:
    """``W = s·B·A`` [H, H]."""
    return scale * B.double() @ A.double()


def identity(W: Tensor) -> Tensor:
    """I [H, H]."""
    return torch.eye(W.shape[0], dtype=W.dtype)


def inverse_minus_identity(W: Tensor) -> Tensor:
    """``(I + W)^-1 − I`` [H, H]."""
    return torch.linalg.inv(identity(W) + W) - identity(W)


def neumann_minus_identity(W: Tensor, order: int) -> Tensor:
    """``−W + W² − … ± W^order`` [H, H]."""
    total, power = torch.zeros_like(W), identity(W)
    for j in range(1, order + 1):
        power = power @ W
        total = total + (-1) ** j * power
    return total


def forward(delta: Tensor, classes: Tensor, W: Tensor, inverse: str = "exact", order: int = 2) -> Tensor:
    """What is added to the residual stream, y [T, H], for Δh [T, H] and a class code [T]; other classes than ±1: 0."""
    negative = inverse_minus_identity(W) if inverse == "exact" else neumann_minus_identity(W, order)
    y = torch.zeros_like(delta)
    y = torch.where((classes == 1)[:, None], delta @ W.T, y)
    return torch.where((classes == -1)[:, None], delta @ negative.T, y)


def neutral_loss(delta: Tensor, W: Tensor) -> Tensor:
    """Mean over rows of ``‖W·Δh‖² / max(‖Δh‖², 1e-6)``: delta [T, H] of neutral positions → scalar."""
    changed = (delta @ W.T).square().sum(dim=1)
    return (changed / delta.square().sum(dim=1).clamp_min(1e-6)).mean()


def gradients(loss: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    """Autograd's gradients of ``loss``."""
    return torch.autograd.grad(loss, parameters)


def decay_gradients(A: Tensor, B: Tensor, scale: float, weight: float) -> tuple[Tensor, Tensor]:
    """Gradients of ``weight·½‖s·B·A‖_F²`` with respect to A and B, by autograd through the full matrix."""
    A, B = A.double().requires_grad_(), B.double().requires_grad_()
    loss = weight * 0.5 * full_matrix(A, B, scale).square().sum()
    grad_A, grad_B = torch.autograd.grad(loss, [A, B])
    return grad_A, grad_B


def norms(W: Tensor) -> dict[str, float]:
    """Norms and health by ``torch.linalg`` on the full matrix."""
    sigma = torch.linalg.svdvals(W)
    of_sum = torch.linalg.svdvals(identity(W) + W)
    squares = sigma.square().sum()
    exact = torch.linalg.inv(identity(W) + W)
    return {
        "frobenius": torch.linalg.matrix_norm(W).item(),
        "spectral": torch.linalg.matrix_norm(W, 2).item(),
        "radius": torch.linalg.eigvals(W).abs().max().item(),
        "sigma_min": of_sum.min().item(),
        "sigma_max": of_sum.max().item(),
        "condition": torch.linalg.cond(identity(W) + W).item(),
        "effective_rank": (sigma.sum() ** 2 / squares).item() if squares > 0 else 0.0,
        "neumann_remainder_1": torch.linalg.matrix_norm(exact - identity(W) - neumann_minus_identity(W, 1), 2).item(),
        "neumann_remainder_2": torch.linalg.matrix_norm(exact - identity(W) - neumann_minus_identity(W, 2), 2).item(),
    }


def merged(weight: Tensor, W: Tensor) -> Tensor:
    """``(I + W)·W_lin``: [H, in] → [H, in]; also for a bias [H]."""
    return (identity(W) + W) @ weight.double()


def truncation(product: Tensor, rank: int) -> tuple[Tensor, float]:
    """Best approximation of ``product`` [out, in] at ``rank`` and the share of its ‖·‖_F² that this keeps."""
    U, S, Vh = torch.linalg.svd(product.double(), full_matrices=False)
    kept = (S[:rank].square().sum() / S.square().sum()).item()
    return U[:, :rank] * S[:rank] @ Vh[:rank], kept
