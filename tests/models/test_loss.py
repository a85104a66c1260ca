"""Cross-entropy from hidden states against torch's own on whole logits in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    PretrainedConfig,
)

from cadapter.classes import IGNORED_LABEL
from cadapter.models import loss
from cadapter.models.families import FAMILIES, LogitFacts, logit_facts
from cadapter.models.loss import (
    PLAIN,
    chunk_length,
    compare_rows,
    logits_of,
    scaled,
    score_products,
    weighted_cross_entropy,
)

TOKENS, WIDTH, VOCAB = 53, 24, 40
ROW_BYTES = 4 * VOCAB
# float32 sums over 24 components and 40 words: some 1e-7 of each result.
TOLERANCE = 2e-6

SCALED = LogitFacts(scale=0.3)
# Of logits up to 9, caps that bend them (to 2.9) and that flatten them.
CAPPED = LogitFacts(softcap=3.0)
BOTH = LogitFacts(scale=1.7, softcap=2.0)
every_kind_of_logits = pytest.mark.parametrize(
    "facts", [PLAIN, SCALED, CAPPED, BOTH], ids=["plain", "scaled", "capped", "both"]
)


class Found(NamedTuple):
    """Σ w·nll, the gradients of hidden states and head weight, and nll and hits of each token."""

    total: Tensor
    hidden_gradient: Tensor
    weight_gradient: Tensor
    nll: Tensor
    correct: Tensor


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
    hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, factor: float = 1.0, facts: LogitFacts = PLAIN
) -> Found:
    """Of ``factor`` times Σ w·nll."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    total, tokens = weighted_cross_entropy(hidden, weight, labels, weights, facts)
    return Found(total, *torch.autograd.grad(factor * total, (hidden, weight)), tokens.nll, tokens.correct)


def true_logits(hidden: Tensor, weight: Tensor, facts: LogitFacts) -> Tensor:
    """In float64, as the formula stands."""
    scaled = facts.scale * (hidden.double() @ weight.double().T)
    return scaled if facts.softcap is None else facts.softcap * torch.tanh(scaled / facts.softcap)


def reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, factor: float = 1.0, facts: LogitFacts = PLAIN
) -> Found:
    """The same from ``torch.nn.functional.cross_entropy`` and autograd in float64."""
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = true_logits(hidden, weight, facts)
    nll = functional.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED_LABEL)
    total = (weights.double() * nll).sum()
    gradients = torch.autograd.grad(factor * total, (hidden, weight))
    return Found(total, *gradients, nll, logits.argmax(dim=1) == labels)


class Results(TorchDispatchMode):
    """Collects shape and dtype of every tensor that operations make (views of what they got are left out)."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[tuple[int, ...], torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.made.append((tuple(tensor.shape), tensor.dtype))
        return result


@pytest.fixture(params=[1, 16, 20, 1024], ids=lambda rows: f"{rows} rows")
def rows_in_a_chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Shrinks chunks to so many tokens; 16 is the smallest there is."""
    monkeypatch.setattr(loss, "CHUNK_BYTES", request.param * ROW_BYTES)
    assert chunk_length(VOCAB) == max(16, request.param)
    return request.param


@every_kind_of_logits
@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
def test_value_gradients_and_tokens(rows_in_a_chunk, ignored, facts):
    data = inputs(ignored=ignored)
    found = ours(*data, factor=0.37, facts=facts)
    true = reference(*data, factor=0.37, facts=facts)
    torch.testing.assert_close(found.total.double(), true.total, rtol=TOLERANCE, atol=0)
    for name in ("hidden_gradient", "weight_gradient", "nll"):
        torch.testing.assert_close(getattr(found, name).double(), getattr(true, name), rtol=TOLERANCE, atol=TOLERANCE)
    assert torch.equal(found.correct, true.correct)
    assert found.correct.any() == (ignored < 1)
    assert found.nll[data[2] == IGNORED_LABEL].count_nonzero() == 0


def test_nothing_trained_gives_exact_zeros():
    found = ours(*inputs(ignored=1.0), facts=BOTH)
    assert found.total == 0
    assert found.hidden_gradient.count_nonzero() == 0
    assert found.weight_gradient.count_nonzero() == 0
    assert found.nll.count_nonzero() == 0
    assert not found.correct.any()


def test_large_logits_stay_finite():
    hidden, weight, labels, weights = inputs()
    found = ours(1e3 * hidden, weight, labels, weights)
    true = reference(1e3 * hidden, weight, labels, weights)
    # Logits of up to 1e4 carry float32's rounding of 1e-3, which the softmax turns into relative errors of that size.
    torch.testing.assert_close(found.total.double(), true.total, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.hidden_gradient.double(), true.hidden_gradient, rtol=2e-3, atol=2e-3)
    # The weight's gradient has hidden states of up to 3e3 in it.
    torch.testing.assert_close(found.weight_gradient.double(), true.weight_gradient, rtol=2e-3, atol=6)
    flat = ours(1e3 * hidden, weight, labels, weights, facts=CAPPED)
    # Where tanh is flat the loss says nothing of its inputs.
    flattened = reference(1e3 * hidden, weight, labels, weights, facts=CAPPED)
    torch.testing.assert_close(flat.total.double(), flattened.total, rtol=TOLERANCE, atol=0)
    assert flat.hidden_gradient.isfinite().all()


@every_kind_of_logits
def test_bfloat16(rows_in_a_chunk, facts):
    """Logits are rounded to bfloat16 by the head's product, as Hugging Face's are; all else is float32."""
    data = inputs(torch.bfloat16)
    found, true = ours(*data, facts=facts), reference(*data, facts=facts)
    assert found.nll.dtype == found.total.dtype == torch.float32
    assert found.hidden_gradient.dtype == found.weight_gradient.dtype == torch.bfloat16
    # One rounding of 2^-9 each: logits (of size 3) in the value; slope, product and result in the gradients.
    torch.testing.assert_close(found.total.double(), true.total, rtol=2e-3, atol=0)
    for name in ("hidden_gradient", "weight_gradient"):
        difference = getattr(found, name).double() - getattr(true, name)
        assert difference.norm() < 1e-2 * getattr(true, name).norm()


def test_in_bfloat16_the_weights_gradient_is_summed_in_float32(monkeypatch):
    """A bfloat16 sum of equal addends stands still at 256 of them; here are 600 chunks, each with the same tokens."""
    monkeypatch.setattr(loss, "CHUNK_BYTES", 16 * ROW_BYTES)
    hidden, weight, labels, weights = inputs(torch.bfloat16, ignored=0)
    repeated = [part[:16].repeat(600, *[1] * (part.dim() - 1)) for part in (hidden, labels, weights)]
    found = ours(repeated[0], weight, *repeated[1:]).weight_gradient.double()
    true = reference(repeated[0], weight, *repeated[1:]).weight_gradient
    assert (found - true).norm() < 1e-2 * true.norm()  # as in a single chunk


@pytest.mark.parametrize("which", ["hidden_gradient", "weight_gradient"])
def test_in_bfloat16_a_factor_of_the_loss_scales_the_gradients_without_a_bias(which):
    """1/N is no bfloat16 number: rounding it would scale every gradient of the step alike."""
    data = inputs(torch.bfloat16)
    factor = 1.50390625 / 256  # halfway between two bfloat16 numbers: 0.26 % off if it is rounded
    plain = getattr(ours(*data), which).double()
    scaled = getattr(ours(*data, factor=factor), which).double()
    # Each of 1,000 components is rounded once, to either side, by at most 0.4 %: 0.01 % is left of their mean.
    assert abs((scaled * plain).sum() / (plain * plain).sum() / factor - 1) < 5e-4


def test_a_weight_tied_to_the_embedding_gets_the_gradients_of_both_uses(rows_in_a_chunk):
    _, weight, labels, weights = inputs()
    ids = torch.randint(VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(5))
    tied, true = weight.clone().requires_grad_(), weight.double().requires_grad_()
    total, _ = weighted_cross_entropy(functional.embedding(ids, tied).tanh(), tied, labels, weights)
    nll = functional.cross_entropy(
        functional.embedding(ids, true).tanh() @ true.T, labels, reduction="none", ignore_index=IGNORED_LABEL
    )
    (gradient,) = torch.autograd.grad(total, tied)
    (true_gradient,) = torch.autograd.grad((weights.double() * nll).sum(), true)
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=TOLERANCE, atol=TOLERANCE)
    alone = torch.autograd.grad(weighted_cross_entropy(tied[ids].detach().tanh(), tied, labels, weights)[0], tied)[0]
    assert (alone - gradient).norm() > 0.1 * gradient.norm()  # the embedding's share is not small


def test_no_gradient_is_made_where_none_is_asked_for():
    hidden, weight, labels, weights = inputs()
    with torch.no_grad():
        total, tokens = weighted_cross_entropy(hidden, weight, labels, weights)
    expected = reference(hidden, weight, labels, weights)
    torch.testing.assert_close(total.double(), expected.total, rtol=TOLERANCE, atol=0)
    torch.testing.assert_close(tokens.nll.double(), expected.nll, rtol=TOLERANCE, atol=TOLERANCE)
    frozen, _ = weighted_cross_entropy(hidden, weight, labels, weights)
    assert not frozen.requires_grad


@pytest.mark.parametrize("hidden_trained", [True, False])
@pytest.mark.parametrize("weight_trained", [True, False])
def test_each_gradient_costs_only_where_it_is_asked_for(monkeypatch, hidden_trained, weight_trained):
    monkeypatch.setattr(loss, "CHUNK_BYTES", 16 * ROW_BYTES)
    hidden, weight, labels, weights = inputs(torch.bfloat16)
    hidden.requires_grad_(hidden_trained)
    weight.requires_grad_(weight_trained)
    buffer = ((VOCAB, WIDTH), torch.float32)
    with Results() as results:
        total, _ = weighted_cross_entropy(hidden, weight, labels, weights)
    assert results.made.count(buffer) == weight_trained
    assert (hidden.shape, hidden.dtype) in results.made or not hidden_trained
    if hidden_trained or weight_trained:
        total.backward()
        true = reference(hidden.detach(), weight.detach(), labels, weights)
        for given, wanted, gradient in (
            (hidden, hidden_trained, true.hidden_gradient),
            (weight, weight_trained, true.weight_gradient),
        ):
            assert (given.grad is not None) == wanted
            assert not wanted or (given.grad.double() - gradient).norm() < 1e-2 * gradient.norm()
    with torch.no_grad(), Results() as results:
        weighted_cross_entropy(hidden, weight, labels, weights)
    assert buffer not in results.made
    assert ((TOKENS, WIDTH), torch.bfloat16) not in results.made


@every_kind_of_logits
def test_nothing_as_wide_as_the_vocabulary_is_made_whole_or_kept(monkeypatch, facts):
    monkeypatch.setattr(loss, "CHUNK_BYTES", 16 * ROW_BYTES)
    hidden, weight, labels, weights = inputs()
    hidden.requires_grad_()
    weight.requires_grad_()
    with Results() as results:
        total, _ = weighted_cross_entropy(hidden, weight, labels, weights, facts)
    assert ((16, VOCAB), torch.float32) in results.made
    assert all(len(shape) < 2 or shape[0] * shape[1] < TOKENS * VOCAB for shape, _ in results.made)
    kept = [leaf for leaf in tree_leaves(vars(total.grad_fn)) if isinstance(leaf, Tensor)]
    kept += total.grad_fn.saved_tensors
    assert {tuple(tensor.shape) for tensor in kept} == {(TOKENS, WIDTH), (VOCAB, WIDTH)}


TINY: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCAB, "pad_token_id": 0, "initializer_range": 0.5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "ulps"),
    [
        (CohereConfig(**TINY, logit_scale=0.3), 0),
        (Cohere2Config(**TINY, logit_scale=0.3), 0),
        (GraniteConfig(**TINY, logits_scaling=8.0), 0),
        (GraniteConfig(**TINY, logits_scaling=6.0), 1),  # times 1/6 instead of divided by 6
        (Gemma2Config(**TINY, head_dim=8, final_logit_softcapping=3.0), 0),
        (Gemma3TextConfig(**TINY, head_dim=8, final_logit_softcapping=3.0), 0),
    ],
    ids=lambda value: value.model_type if isinstance(value, PretrainedConfig) else f"{value}ulp",
)
@torch.no_grad()
def test_logits_are_hugging_faces(config, ulps):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    ids = torch.arange(12).unsqueeze(0)
    hidden, expected = model.model(ids).last_hidden_state, model(ids).logits
    facts = logit_facts(FAMILIES[config.model_type], config)
    assert facts != PLAIN
    torch.testing.assert_close(logits_of(hidden, model.lm_head.weight, facts), expected, rtol=ulps * 2**-23, atol=0)
    assert not torch.allclose(logits_of(hidden, model.lm_head.weight), expected, rtol=0.1)


@every_kind_of_logits
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own_heads", [False, True])
def test_rows_compared_with_the_first(rows_in_a_chunk, dtype, own_heads, facts):
    hidden, weight, labels, _ = inputs(dtype)
    generator = torch.Generator().manual_seed(8)
    others = [hidden + step * torch.randn(TOKENS, WIDTH, generator=generator).to(dtype) for step in (0.1, 1.0)]
    stack = torch.stack([hidden, *others])
    heads = [weight, weight, weight]
    if own_heads:
        heads = [weight, *(weight + 0.1 * torch.randn(VOCAB, WIDTH, generator=generator).to(dtype) for _ in others)]
    found = compare_rows(stack, heads if own_heads else weight, labels, facts)
    # The head's product is rounded to its own dtype: take these logits, and all else in float64.
    products = [(each @ head.T).double() for each, head in zip(stack, heads, strict=True)]
    logs = [torch.log_softmax(true_logits(each, torch.eye(VOCAB), facts), dim=1) for each in products]
    counted = labels != IGNORED_LABEL
    targets = labels.clamp(min=0).unsqueeze(1)
    for k, log in enumerate(logs):
        nll = torch.where(counted, -log.gather(1, targets).squeeze(1), 0.0)
        kl = torch.where(counted, functional.kl_div(log, logs[0], log_target=True, reduction="none").sum(1), 0.0)
        torch.testing.assert_close(found.nll[k].double(), nll, rtol=TOLERANCE, atol=TOLERANCE)
        torch.testing.assert_close(found.kl[k].double(), kl, rtol=1e-5, atol=TOLERANCE)  # a sum of differences
        assert torch.equal(found.correct[k] > 0, counted & (log.argmax(1) == targets.squeeze(1)))
        assert torch.equal(found.agrees[k] > 0, counted & (log.argmax(1) == logs[0].argmax(1)))
    assert found.kl[0].count_nonzero() == 0
    assert 0 < found.agrees[2].sum() < counted.sum()
    assert (found.kl[2][counted] > 0).all()
    assert found.kl.dtype == found.nll.dtype == torch.float32


def test_rows_and_heads_must_be_as_many():
    hidden, weight, labels, _ = inputs()
    with pytest.raises(ValueError, match="shorter"):
        compare_rows(torch.stack([hidden] * 3), [weight] * 2, labels)


# ---- compiled ------------------------------------------------------------------------------------------------------


@every_kind_of_logits
def test_compiled_scores_are_those_of_the_plain_function(facts):
    """Compiled, the one-hot part of the gradient is worked out in another way."""
    hidden, weight, labels, weights = inputs(ignored=0.3)
    products = (hidden @ weight.T).float()
    compiled = torch.compile(score_products, fullgraph=True, dynamic=False, backend="aot_eager")
    for with_slope in (True, False):
        expected = score_products(products.clone(), labels, weights, facts, with_slope)
        found = compiled(products.clone(), labels, weights, facts, with_slope)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-6)
        assert torch.equal(found[1], expected[1])
        if with_slope:
            torch.testing.assert_close(found[2], expected[2], rtol=1e-5, atol=1e-7)
        else:
            assert found[2] is expected[2] is None
    torch._dynamo.reset()


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("held", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float32])
def test_a_gradient_is_scaled_by_the_factor_itself(held, wanted, compiles):
    """By 0.3, which is 0.3008 in bfloat16."""
    scale = torch.compile(scaled, fullgraph=True, dynamic=False, backend="aot_eager") if compiles else scaled
    gradient = torch.randn(64, 9, generator=torch.Generator().manual_seed(3)).to(held)
    exact = gradient.double() * 0.3
    found = scale(gradient.clone(), torch.tensor(0.3), wanted)
    assert found.dtype == wanted
    # Rounded once to what is wanted, after a product in float32.
    torch.testing.assert_close(found.double(), exact, rtol=2 * torch.finfo(wanted).eps, atol=0)
    # On average without error; a rounded factor would show as 0.0026.
    assert (found.double().abs().sum() / exact.abs().sum()).item() == pytest.approx(1, abs=5e-4)
    torch._dynamo.reset()
