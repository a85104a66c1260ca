"""Cross-entropy straight from hidden states: never a [tokens, vocabulary] tensor.

The head's product and the softmax run over chunks of tokens. Gradients are taken in the forward pass, while a
chunk's logits are there, so that nothing of a chunk's size is kept for backward: of the hidden states' gradient
[T, H], and, where the head itself is trained, of its weight's [V, H].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cadapter.classes import IGNORED_LABEL
from cadapter.models.families import LogitFacts

CHUNK_BYTES = 256 * 2**20
"""Bytes of float32 logits that one chunk may take."""

PLAIN = LogitFacts()
"""Logits that are the product of hidden states and head weight, and nothing else."""


class TokenLosses(NamedTuple):
    """What a forward pass says of each token, [T]: negative log-likelihood (nats; 0 where ignored) and top-1 hits."""

    nll: Tensor
    correct: Tensor


CHUNK_UNIT = 128
"""Chunks are multiples of this length, the height of the tiles in which GPUs multiply; a part of one costs a whole."""


def chunk_length(vocabulary: int) -> int:
    """Number of tokens whose float32 logits fit into ``CHUNK_BYTES``, at least 16."""
    fitting = CHUNK_BYTES // (4 * vocabulary)
    return max(16, fitting - fitting % CHUNK_UNIT if fitting > CHUNK_UNIT else fitting)


def logits_of(hidden: Tensor, weight: Tensor, facts: LogitFacts = PLAIN) -> Tensor:
    """Return the float32 logits [T, V] of normed hidden states [T, H].

    The product runs in the weight's dtype, what ``facts`` say is done to it in float32.
    """
    return facts.apply((hidden @ weight.T).float())


def _slope_of_products(
    logits: Tensor, log_normaliser: Tensor, targets: Tensor, factor: Tensor, facts: LogitFacts
) -> Tensor:
    """d(Σ f·nll)/d(hidden·weightᵀ) of a chunk, [T, V] float32; ``logits`` is overwritten.

    That is f·(softmax − one-hot)·d(logit)/d(product), where for a logit c·tanh(s·x/c) the last is
    s·(1 − (logit/c)²).
    """
    bend = None if facts.softcap is None else 1 - (logits / facts.softcap).square_()
    factor = factor * facts.scale
    slope = logits.sub_(log_normaliser).exp_().mul_(factor)
    if torch.compiler.is_compiling():  # fused with what stands before and after it
        places = torch.arange(slope.shape[1], device=slope.device)
        slope = torch.where(places == targets, slope - factor, slope)
    else:
        slope.scatter_add_(1, targets, -factor)
    return slope if bend is None else slope.mul_(bend)


def score_products(
    products: Tensor, labels: Tensor, token_weights: Tensor, facts: LogitFacts, with_slope: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the products hidden·weightᵀ [T, V] of a chunk say: nll [T], top-1 hits [T], and the loss's gradient [T, V].

    The gradient, that of Σ w·nll with respect to the products, is in their dtype.
    """
    counted = labels != IGNORED_LABEL
    targets = labels.clamp(min=0).unsqueeze(1)
    logits = facts.apply(products.float())
    log_normaliser = torch.logsumexp(logits, dim=1, keepdim=True)
    nll = torch.where(counted, (log_normaliser - logits.gather(1, targets)).squeeze(1), 0.0)
    correct = counted & (logits.argmax(dim=1) == targets.squeeze(1))
    if not with_slope:
        return nll, correct, None
    factor = torch.where(counted, token_weights, 0.0).unsqueeze(1)
    return nll, correct, _slope_of_products(logits, log_normaliser, targets, factor, facts).to(products.dtype)


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``gradient`` times a float32 scalar, in ``dtype``.

    Multiplied in float32: a factor rounded to bfloat16 would be up to 0.4 % off, for every token alike.
    """
    return gradient.float().mul_(factor).to(dtype)


class LossOperations(NamedTuple):
    """What the loss does with a chunk's products, and with its gradient in the end; as they are or compiled."""

    score: Callable[..., tuple[Tensor, Tensor, Tensor | None]] = score_products
    scale: Callable[[Tensor, Tensor, torch.dtype], Tensor] = scaled


PLAIN_OPERATIONS = LossOperations()


class _WeightedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        token_weights: Tensor,
        facts: LogitFacts,
        operations: LossOperations,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens = hidden.shape[0]
        hidden_gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        nll = torch.empty(tokens, dtype=torch.float32, device=hidden.device)
        correct = torch.empty(tokens, dtype=torch.bool, device=hidden.device)
        is_recorded = hidden_gradient is not None or weight_gradient is not None
        step = chunk_length(weight.shape[0])
        for start in range(0, tokens, step):
            rows = slice(start, start + step)
            products = hidden[rows] @ weight.T
            nll[rows], correct[rows], slope = operations.score(
                products, labels[rows], token_weights[rows], facts, is_recorded
            )
            del products
            if slope is not None and hidden_gradient is not None:
                hidden_gradient[rows] = slope @ weight
            if slope is not None and weight_gradient is not None:
                weight_gradient += slope.T @ hidden[rows]
        ctx.scale = operations.scale
        ctx.gradients = ((hidden_gradient, hidden.dtype), (weight_gradient, weight.dtype))
        ctx.mark_non_differentiable(nll, correct)
        return (nll * token_weights).sum(), nll, correct

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        gradients = ctx.gradients
        ctx.gradients = None
        hidden, weight = (
            None if gradient is None else ctx.scale(gradient, output_gradients[0], dtype)
            for gradient, dtype in gradients
        )
        return hidden, weight, None, None, None, None


def weighted_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor,
    logits: LogitFacts = PLAIN,
    operations: LossOperations = PLAIN_OPERATIONS,
) -> tuple[Tensor, TokenLosses]:
    """Return Σ w·nll over all tokens (a differentiable float32 scalar) and what it says of each token.

    A weight that requires a gradient costs one float32 buffer [V, H] from forward to backward, and within a chunk its
    product [V, H] in the weight's dtype. The chunks' products, each rounded to that dtype, are summed in float32, so
    the sum is about as exact as the one rounding to the weight's dtype that autograd's result has anyway. A frozen
    weight costs nothing of this.

    Args:
        hidden: normed hidden states, [T, H].
        weight: the head's, [V, H]; trained or frozen.
        labels: [T] int64; ``IGNORED_LABEL`` where there is no cross-entropy.
        token_weights: w, [T] float32.
        logits: what the model does to its logits.
        operations: as they are or compiled.
    """
    if not torch.is_grad_enabled():  # a custom function's inputs say that they need gradients even so
        hidden, weight = hidden.detach(), weight.detach()
    total, nll, correct = _WeightedCrossEntropy.apply(hidden, weight, labels, token_weights, logits, operations)
    return total, TokenLosses(nll, correct)


class Comparison(NamedTuple):
    """Several rows of hidden states for the same tokens, compared with the first row, each [K, T] float32.

    ``kl`` is KL(row 0 ‖ row k) per token in nats, ``agrees`` 1 where both find the same token most probable; all are 0
    where the label is ignored.
    """

    nll: Tensor
    correct: Tensor
    kl: Tensor
    agrees: Tensor


@torch.no_grad()
def compare_rows(
    hidden: Tensor, weight: Tensor | Sequence[Tensor], labels: Tensor, logits: LogitFacts = PLAIN
) -> Comparison:
    """Score K rows of normed hidden states [K, T, H] against the same labels [T], and against row 0.

    Args:
        weight: the head's, [V, H]: one for all rows, or one for each of them.
        logits: what the model does to its logits.
    """
    count, tokens, _ = hidden.shape
    heads = [weight] * count if isinstance(weight, Tensor) else list(weight)
    result = Comparison(*(torch.zeros(count, tokens, device=hidden.device) for _ in Comparison._fields))
    step = max(1, chunk_length(heads[0].shape[0]) // (2 * count))
    for start in range(0, tokens, step):
        rows = slice(start, start + step)
        counted = labels[rows] != IGNORED_LABEL
        targets = labels[rows].clamp(min=0)
        base = first = None
        for k, (row, head) in enumerate(zip(hidden, heads, strict=True)):
            row_logits = logits_of(row[rows], head, logits)
            log_probabilities = torch.log_softmax(row_logits, dim=1)
            top = row_logits.argmax(dim=1)
            if base is None or first is None:
                base, first = log_probabilities, top
            chosen = log_probabilities.gather(1, targets.unsqueeze(1)).squeeze(1)
            result.nll[k, rows] = torch.where(counted, -chosen, 0.0)
            result.correct[k, rows] = (counted & (top == targets)).float()
            result.agrees[k, rows] = (counted & (top == first)).float()
            divergence = (base.exp() * (base - log_probabilities)).sum(dim=1)
            result.kl[k, rows] = torch.where(counted, divergence, 0.0)
    return result
