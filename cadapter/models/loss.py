"""Cross-entropy straight from hidden states: never a [tokens, vocabulary] tensor.

The head's product and the softmax run over chunks of tokens. The gradient of the hidden states is taken in the
forward pass, while a chunk's logits are there, so that nothing of the vocabulary's width is kept for backward.
The head's weight is frozen here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cadapter.classes import IGNORED_LABEL

CHUNK_BYTES = 256 * 2**20
"""Bytes of float32 logits that one chunk may take."""


class TokenLosses(NamedTuple):
    """What a forward pass says of each token, [T]: negative log-likelihood (nats; 0 where ignored) and top-1 hits."""

    nll: Tensor
    correct: Tensor


def chunk_length(vocabulary: int) -> int:
    """Number of tokens whose float32 logits fit into ``CHUNK_BYTES``, at least 16."""
    return max(16, CHUNK_BYTES // (4 * vocabulary))


def logits_of(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return the float32 logits [T, V] of normed hidden states [T, H]; the product runs in the weight's dtype."""
    return (hidden @ weight.T).float()


class _WeightedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens = hidden.shape[0]
        wants_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wants_gradient else None
        nll = torch.empty(tokens, dtype=torch.float32, device=hidden.device)
        correct = torch.empty(tokens, dtype=torch.bool, device=hidden.device)
        step = chunk_length(weight.shape[0])
        for start in range(0, tokens, step):
            rows = slice(start, start + step)
            counted = labels[rows] != IGNORED_LABEL
            targets = labels[rows].clamp(min=0).unsqueeze(1)
            logits = logits_of(hidden[rows], weight)
            log_normaliser = torch.logsumexp(logits, dim=1)
            chosen = logits.gather(1, targets).squeeze(1)
            nll[rows] = torch.where(counted, log_normaliser - chosen, 0.0)
            correct[rows] = counted & (logits.argmax(dim=1) == targets.squeeze(1))
            if gradient is not None:
                # d(Σ w·nll)/d(logits) = w·(softmax − one-hot), made in place of the logits
                factor = torch.where(counted, token_weights[rows], 0.0).unsqueeze(1)
                slope = logits.sub_(log_normaliser.unsqueeze(1)).exp_().mul_(factor)
                slope.scatter_add_(1, targets, -factor)
                gradient[rows] = slope.to(weight.dtype) @ weight
        ctx.gradient = gradient
        ctx.mark_non_differentiable(nll, correct)
        return (nll * token_weights).sum(), nll, correct

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        gradient = ctx.gradient
        ctx.gradient = None
        # In float32: a factor rounded to bfloat16 would be up to 0.4 % off, for every token alike.
        scaled = (gradient.float() * output_gradients[0]).to(gradient.dtype)
        return scaled, None, None, None


def weighted_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor
) -> tuple[Tensor, TokenLosses]:
    """Return Σ w·nll over all tokens (a differentiable float32 scalar) and what it says of each token.

    Args:
        hidden: normed hidden states, [T, H].
        weight: the head's, [V, H], frozen.
        labels: [T] int64; ``IGNORED_LABEL`` where there is no cross-entropy.
        token_weights: w, [T] float32.
    """
    total, nll, correct = _WeightedCrossEntropy.apply(hidden, weight, labels, token_weights)
    return total, TokenLosses(nll, correct)


class Comparison(NamedTuple):
    """Several rows of hidden states for the same tokens, compared with the first row, each [K, T] float32.

    ``kl`` is KL(row 0 ‖ row k) per token in nats, 0 where the label is ignored.
    """

    nll: Tensor
    correct: Tensor
    kl: Tensor


@torch.no_grad()
def compare_rows(hidden: Tensor, weight: Tensor, labels: Tensor) -> Comparison:
    """Score K rows of normed hidden states [K, T, H] against the same labels [T], and against row 0."""
    count, tokens, _ = hidden.shape
    result = Comparison(*(torch.zeros(count, tokens, device=hidden.device) for _ in range(3)))
    step = max(1, chunk_length(weight.shape[0]) // (2 * count))
    for start in range(0, tokens, step):
        rows = slice(start, start + step)
        counted = labels[rows] != IGNORED_LABEL
        targets = labels[rows].clamp(min=0)
        base = None
        for k in range(count):
            logits = logits_of(hidden[k, rows], weight)
            log_probabilities = torch.log_softmax(logits, dim=1)
            base = log_probabilities if base is None else base
            chosen = log_probabilities.gather(1, targets.unsqueeze(1)).squeeze(1)
            result.nll[k, rows] = torch.where(counted, -chosen, 0.0)
            result.correct[k, rows] = (counted & (logits.argmax(dim=1) == targets)).float()
            divergence = (base.exp() * (base - log_probabilities)).sum(dim=1)
            result.kl[k, rows] = torch.where(counted, divergence, 0.0)
    return result
