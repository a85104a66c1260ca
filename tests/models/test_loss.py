"""Cross-entropy from hidden states against torch's own on whole logits in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cadapter.classes import IGNORED_LABEL
from cadapter.models import loss
from cadapter.models.loss import chunk_length, compare_rows, logits_of, weighted_cross_entropy

TOKENS, WIDTH, VOCAB = 53, 24, 40
ROW_BYTES = 4 * VOCAB
# float32 sums over 24 components and 40 words: some 1e-7 of each result.
TOLERANCE = 2e-6


def inputs(dtype: torch.dtype = torch.float32, ignored: float = 0.3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, the head's weight, labels of which a share is ignored, and token weights (some zero)."""
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype)
    weight = (0.5 * torch.randn(VOCAB, WIDTH, generator=generator)).to(dtype)
    labels = torch.randint(VOCAB, (TOKENS,), generator=generator)
    labels[torch.rand(TOKENS, generator=generator) < ignored] = IGNORED_LABEL
    weights = torch.rand(TOKENS, generator=generator) * 2
    weights[::9] = 0
    return hidden, weight, labels, weights


def ours(
    hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, factor: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Σ w·nll, the gradient of ``factor`` times it, nll and hits."""
    hidden = hidden.clone().requires_grad_()
    total, tokens = weighted_cross_entropy(hidden, weight, labels, weights)
    (gradient,) = torch.autograd.grad(factor * total, hidden)
    return total, gradient, tokens.nll, tokens.correct


def reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, factor: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same from ``torch.nn.functional.cross_entropy`` in float64."""
    hidden = hidden.double().requires_grad_()
    logits = hidden @ weight.double().T
    nll = functional.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED_LABEL)
    total = (weights.double() * nll).sum()
    (gradient,) = torch.autograd.grad(factor * total, hidden)
    return total, gradient, nll, logits.argmax(dim=1) == labels


@pytest.fixture(params=[1, 16, 20, 1000], ids=lambda rows: f"{rows} rows")
def rows_in_a_chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Shrinks chunks to so many tokens; 16 is the smallest there is."""
    monkeypatch.setattr(loss, "CHUNK_BYTES", request.param * ROW_BYTES)
    assert chunk_length(VOCAB) == max(16, request.param)
    return request.param


@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
def test_value_gradient_and_tokens(rows_in_a_chunk, ignored):
    data = inputs(ignored=ignored)
    total, gradient, nll, correct = ours(*data, factor=0.37)
    true_total, true_gradient, true_nll, true_correct = reference(*data, factor=0.37)
    torch.testing.assert_close(total.double(), true_total, rtol=TOLERANCE, atol=0)
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(nll.double(), true_nll, rtol=TOLERANCE, atol=TOLERANCE)
    assert torch.equal(correct, true_correct)
    assert correct.any() == (ignored < 1)
    assert nll[data[2] == IGNORED_LABEL].count_nonzero() == 0


def test_nothing_trained_gives_exact_zeros():
    total, gradient, nll, correct = ours(*inputs(ignored=1.0))
    assert total == 0
    assert gradient.count_nonzero() == 0
    assert nll.count_nonzero() == 0
    assert not correct.any()


def test_large_logits_stay_finite():
    hidden, weight, labels, weights = inputs()
    total, gradient, _, _ = ours(1e3 * hidden, weight, labels, weights)
    true_total, true_gradient, _, _ = reference(1e3 * hidden, weight, labels, weights)
    # Logits of up to 1e4 carry float32's rounding of 1e-3, which the softmax turns into relative errors of that size.
    torch.testing.assert_close(total.double(), true_total, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=2e-3, atol=2e-3)


def test_bfloat16():
    """Logits are rounded to bfloat16 by the head's product, as Hugging Face's are; all else is float32."""
    data = inputs(torch.bfloat16)
    total, gradient, nll, _ = ours(*data)
    true_total, true_gradient, _, _ = reference(*data)
    assert nll.dtype == total.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    # One rounding of 2^-9 each: logits (of size 3) in the value; slope, product and result in the gradient.
    torch.testing.assert_close(total.double(), true_total, rtol=2e-3, atol=0)
    assert (gradient.double() - true_gradient).norm() < 1e-2 * true_gradient.norm()


def test_in_bfloat16_a_factor_of_the_loss_scales_the_gradient_without_a_bias():
    """1/N is no bfloat16 number: rounding it would scale every gradient of the step alike."""
    data = inputs(torch.bfloat16)
    factor = 1.50390625 / 256  # halfway between two bfloat16 numbers: 0.26 % off if it is rounded
    plain = ours(*data)[1].double()
    scaled = ours(*data, factor=factor)[1].double()
    # Each of 1,000 components is rounded once, to either side, by at most 0.4 %: 0.01 % is left of their mean.
    assert abs((scaled * plain).sum() / (plain * plain).sum() / factor - 1) < 5e-4


def test_no_gradient_is_made_where_none_is_asked_for():
    hidden, weight, labels, weights = inputs()
    with torch.no_grad():
        total, tokens = weighted_cross_entropy(hidden, weight, labels, weights)
    expected = reference(hidden, weight, labels, weights)
    torch.testing.assert_close(total.double(), expected[0], rtol=TOLERANCE, atol=0)
    torch.testing.assert_close(tokens.nll.double(), expected[2], rtol=TOLERANCE, atol=TOLERANCE)
    frozen, _ = weighted_cross_entropy(hidden, weight, labels, weights)
    assert not frozen.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_compared_with_the_first(rows_in_a_chunk, dtype):
    hidden, weight, labels, _ = inputs(dtype)
    generator = torch.Generator().manual_seed(8)
    others = [hidden + step * torch.randn(TOKENS, WIDTH, generator=generator).to(dtype) for step in (0.1, 1.0)]
    stack = torch.stack([hidden, *others])
    found = compare_rows(stack, weight, labels)
    # The head's product is rounded to its own dtype: take these logits, and all else in float64.
    logs = [torch.log_softmax(logits_of(each, weight).double(), dim=1) for each in stack]
    counted = labels != IGNORED_LABEL
    targets = labels.clamp(min=0).unsqueeze(1)
    for k, log in enumerate(logs):
        nll = torch.where(counted, -log.gather(1, targets).squeeze(1), 0.0)
        kl = torch.where(counted, functional.kl_div(log, logs[0], log_target=True, reduction="none").sum(1), 0.0)
        torch.testing.assert_close(found.nll[k].double(), nll, rtol=TOLERANCE, atol=TOLERANCE)
        torch.testing.assert_close(found.kl[k].double(), kl, rtol=1e-5, atol=TOLERANCE)  # a sum of differences
        assert torch.equal(found.correct[k] > 0, counted & (log.argmax(1) == targets.squeeze(1)))
    assert found.kl[0].count_nonzero() == 0
    assert (found.kl[2][counted] > 0).all()
    assert found.kl.dtype == found.nll.dtype == torch.float32
