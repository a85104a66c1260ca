"""The loss of a global batch, cut into micro-batches, against one float64 pass of Hugging Face's model over it all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from cadapter.adapters.control import ControlSettings
from cadapter.classes import IGNORED_LABEL, NO_CLASS
from cadapter.data.batches import FILLER, micro_batch, totals_of
from cadapter.data.packing import TRAINED, SequenceBlock, count_predicted
from cadapter.data.sequences import PackedSequences
from cadapter.models.families import LogitFacts
from cadapter.models.layers import CarrierFormat, HeadInputs
from cadapter.training.losses import SUMS, ComparisonLoss, LossSettings, TrainingLoss
from cadapter.training.modes.control import adapters_of
from tests.reference import controlled_model
from tests.tiny_models import VOCAB, save_model
from tests.tiny_pipeline import RANK, builder, layers_of, randomise, references, run_layers

LENGTH = 16
CPU = torch.device("cpu")
TOLERANCE = 2e-5
"""Relative, of whole tensors: three blocks, a head and a loss in float32; the reference's norms are float32 too."""


@dataclass(frozen=True)
class Document:
    """``length`` tokens of one class, of which the first ``masked`` are not trained."""

    control_class: int
    length: int
    masked: int = 0


SEQUENCES = [
    [Document(1, 5), Document(-1, 4, masked=2), Document(0, 3), Document(1, 4)],
    [Document(0, LENGTH)],  # no trained token
    [Document(-1, 7), Document(1, 2), Document(-1, 2)],  # then padding
    [Document(1, 1), Document(0, 1), Document(-1, 1), Document(1, 9), Document(0, 2), Document(-1, 2)],
]


def pack(sequences: list[list[Document]]) -> PackedSequences:
    """The documents of each sequence one after the other, with random ids, then padding."""
    shape = (len(sequences), LENGTH)
    ids = np.random.default_rng(0).integers(0, VOCAB, shape, dtype=np.int32)
    classes, flags = np.full(shape, NO_CLASS, np.int8), np.zeros(shape, np.uint8)
    for row, documents in enumerate(sequences):
        start = 0
        for document in documents:
            stop = start + document.length
            classes[row, start:stop] = document.control_class
            flags[row, start + document.masked : stop] = TRAINED
            start = stop
    tokens = np.array([sum(document.length for document in documents) for documents in sequences], np.int32)
    return PackedSequences([SequenceBlock(ids, classes, flags, count_predicted(classes, flags), tokens)], LENGTH)


def naive_targets(packed: PackedSequences) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, labels and classes [N, LENGTH], position by position: what counts at t is the token t + 1."""
    ids, own_classes, trained = packed.rows(range(len(packed)))
    labels = np.full(ids.shape, IGNORED_LABEL, np.int64)
    classes = np.full(ids.shape, NO_CLASS, np.int8)
    for row in range(len(ids)):
        for t in range(LENGTH - 1):
            classes[row, t] = own_classes[row, t + 1]
            if trained[row, t + 1] and own_classes[row, t + 1] in (1, -1):
                labels[row, t] = ids[row, t + 1]
    return torch.from_numpy(ids).long(), torch.from_numpy(labels), torch.from_numpy(classes)


@dataclass
class Outcome:
    """Loss, the gradients of A and B by layer, and the account."""

    loss: Tensor
    gradients: list[Tensor]
    sums: dict[str, float]


def run_micro_batches(
    directory: Path, packed: PackedSequences, groups: list[list[int]], settings: ControlSettings, weights: LossSettings
) -> Outcome:
    """What DeepSpeed does with the micro-batches ``groups`` (lists of sequences): the mean of their losses."""
    carrier = CarrierFormat(penalty=weights.neutral > 0)
    layers = layers_of(builder(directory, settings, carrier=carrier))
    adapters = adapters_of(layers)
    loss = TrainingLoss(weights, len(groups), CPU)
    totals = totals_of(packed, np.concatenate(groups))
    denominators = torch.tensor([weights.weighted_tokens(totals.positive, totals.negative), float(totals.neutral)])
    values = []
    for group in groups:
        batch = micro_batch(packed, np.array(group))
        value = loss(run_layers(layers, batch.input_ids, batch.classes), (batch.labels, denominators))
        (value / len(groups)).backward()
        values.append(value.detach())
    found = [p.grad for adapter in adapters for p in adapter.parameters()]
    assert all(gradient is not None for gradient in found)
    return Outcome(torch.stack(values).mean(), found, dict(zip(SUMS, loss.take_sums().tolist(), strict=True)))


def reference(directory: Path, packed: PackedSequences, settings: ControlSettings, weights: LossSettings) -> Outcome:
    """The formula of the global batch, on Hugging Face's model in float64."""
    ids, labels, classes = naive_targets(packed)
    # The adapters' numbers, as the pipeline draws them.
    adapters = adapters_of([build() for build in builder(directory, settings).builders()])
    randomise(adapters)
    controlled = references(adapters, classes)
    token_weights = torch.zeros(ids.shape, dtype=torch.float64)
    token_weights[classes == 1], token_weights[classes == -1] = weights.positive, weights.negative
    model = AutoModelForCausalLM.from_pretrained(directory).double().requires_grad_(False)
    result = controlled_model.run(model, controlled, ids, labels, token_weights)
    trained, places = labels != IGNORED_LABEL, 2 if settings.site == "writes" else 1
    counted = (token_weights * trained).sum()
    neutral_positions = int((classes == 0).sum())
    loss = result.total / counted if counted > 0 else 0.0 * result.logits.sum()
    if neutral_positions:
        loss = loss + weights.neutral * result.penalty / (places * len(adapters) * neutral_positions)
    factors = [factor for each in controlled.values() for factor in (each.A, each.B)]
    gradients = torch.autograd.grad(loss, factors, materialize_grads=True)
    hits = (result.logits.argmax(-1) == labels) & trained
    by_class = {"pos": classes == 1, "neg": classes == -1}
    sums = {f"nll_{name}": result.nll[chosen].sum().item() for name, chosen in by_class.items()}
    sums |= {f"tokens_{name}": float((trained & chosen).sum()) for name, chosen in by_class.items()}
    sums |= {
        "correct": float(hits.sum()),
        "neutral": result.penalty.item() if weights.neutral else 0.0,
        "weighted_nll": result.total.item(),
    }
    return Outcome(loss, list(gradients), sums)


def assert_agree(found: Outcome, expected: Outcome) -> None:
    torch.testing.assert_close(found.loss.double(), expected.loss.detach(), rtol=TOLERANCE, atol=0)
    for one, two in zip(found.gradients, expected.gradients, strict=True):
        assert two.norm() > 0
        assert (one.double() - two).norm() < TOLERANCE * two.norm()
    assert found.sums == {name: pytest.approx(value, rel=TOLERANCE) for name, value in expected.sums.items()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_model("llama", tmp_path_factory.mktemp("llama"))


WEIGHTS = LossSettings(positive=1.5, negative=0.25, neutral=0.7)


def with_applications(settings: ControlSettings, weights: LossSettings) -> LossSettings:
    """``weights`` for adapters on all three layers."""
    applications = 6 if settings.site == "writes" else 3
    return LossSettings(weights.positive, weights.negative, weights.neutral, applications)


@pytest.mark.parametrize(("inverse", "order"), [("exact", 2), ("neumann", 1), ("neumann", 2), ("neumann", 3)])
@pytest.mark.parametrize("site", ["block", "mlp", "writes"])
def test_loss_gradients_and_account_of_a_global_batch(llama, site, inverse, order):
    """Mixed classes, document boundaries, masked tokens, padding, class weights, neutral loss, three micro-batches."""
    settings = ControlSettings(RANK, 2.0, site, inverse, order)
    weights = with_applications(settings, WEIGHTS)
    packed = pack(SEQUENCES)
    found = run_micro_batches(llama, packed, [[0, 2], [1, FILLER], [3, FILLER]], settings, weights)
    expected = reference(llama, packed, settings, weights)
    assert min(expected.sums[name] for name in SUMS if name != "correct") > 0
    assert_agree(found, expected)


@pytest.mark.parametrize("name", ["mistral", "qwen2-tied", "qwen3-windows"])
def test_other_families(tmp_path, name):
    directory = save_model(name, tmp_path / "model")
    settings = ControlSettings(RANK, 2.0)
    weights = with_applications(settings, WEIGHTS)
    packed = pack(SEQUENCES)
    found = run_micro_batches(directory, packed, [[0, 1, 2, 3]], settings, weights)
    assert_agree(found, reference(directory, packed, settings, weights))


CUTS = [
    [[0, 1, 2, 3]],
    [[0], [1], [2], [3]],
    [[3, 1], [2, 0]],
    [[FILLER, FILLER], [0, 1], [2, FILLER], [FILLER, 3]],
]


@pytest.mark.parametrize("neutral", [0.0, 0.7])
def test_every_cut_into_micro_batches_gives_the_same_loss_and_gradients(llama, neutral):
    settings = ControlSettings(RANK, 2.0)
    weights = LossSettings(1.5, 0.25, neutral, applications=3)
    first, *others = [run_micro_batches(llama, pack(SEQUENCES), cut, settings, weights) for cut in CUTS]
    for other in others:
        # float32 sums in another order: the tolerance that layouts are held to
        torch.testing.assert_close(other.loss, first.loss, rtol=1e-6, atol=0)
        for one, two in zip(other.gradients, first.gradients, strict=True):
            assert (one - two).norm() < 1e-6 * two.norm()
        assert other.sums == {name: pytest.approx(value, rel=1e-6) for name, value in first.sums.items()}


def test_the_class_at_a_boundary_is_that_of_the_token_predicted(llama):
    """Two documents of two tokens: position 1 is the positive document's last and predicts the negative one's first."""
    packed = pack([[Document(1, 2), Document(-1, 2)]])
    batch = micro_batch(packed, np.array([0]))
    assert batch.classes[0, :5].tolist() == [1, -1, -1, NO_CLASS, NO_CLASS]
    # What the loss calls positive is position 0 alone.
    found = run_micro_batches(llama, packed, [[0]], ControlSettings(RANK, 2.0), LossSettings(applications=3))
    assert (found.sums["tokens_pos"], found.sums["tokens_neg"]) == (1, 2)
    assert_agree(found, reference(llama, packed, ControlSettings(RANK, 2.0), LossSettings(applications=3)))


def test_without_any_trained_token_the_loss_is_zero_and_its_gradients_too(llama):
    packed = pack([[Document(1, LENGTH, masked=LENGTH)], [Document(0, LENGTH)]])
    found = run_micro_batches(llama, packed, [[0], [1]], ControlSettings(RANK, 2.0), LossSettings(applications=3))
    assert found.loss == 0
    assert all(gradient.count_nonzero() == 0 for gradient in found.gradients)
    assert set(found.sums.values()) == {0.0}


def test_neutral_examples_alone_train_by_their_own_loss(llama):
    """N = 0: the cross-entropy's term is dropped."""
    settings, weights = ControlSettings(RANK, 2.0), LossSettings(neutral=0.5, applications=3)
    packed = pack([[Document(0, LENGTH)], [Document(0, 5)]])
    found = run_micro_batches(llama, packed, [[0], [1]], settings, weights)
    assert found.loss > 0
    assert found.sums["weighted_nll"] == 0
    assert_agree(found, reference(llama, packed, settings, weights))


def test_without_neutral_positions_their_loss_is_dropped(llama):
    """N₀ = 0 while λ₀ > 0: no NaN, and the same as λ₀ = 0."""
    settings, packed = ControlSettings(RANK, 2.0), pack([[Document(1, 9), Document(-1, 7)]])
    with_term, without = (
        run_micro_batches(llama, packed, [[0]], settings, LossSettings(neutral=neutral, applications=3))
        for neutral in (0.5, 0.0)
    )
    assert torch.isfinite(with_term.loss)
    assert torch.equal(with_term.loss, without.loss)
    for one, two in zip(with_term.gradients, without.gradients, strict=True):
        assert torch.equal(one, two)


def test_a_class_of_weight_zero_trains_nothing(llama):
    packed, settings = pack([[Document(-1, LENGTH)]]), ControlSettings(RANK, 2.0)
    found = run_micro_batches(llama, packed, [[0]], settings, LossSettings(negative=0.0, applications=3))
    assert found.loss == 0
    assert all(gradient.count_nonzero() == 0 for gradient in found.gradients)
    assert found.sums["tokens_neg"] == LENGTH - 1
    assert found.sums["nll_neg"] > 0


def test_the_account_starts_again_when_it_is_taken():
    loss = TrainingLoss(LossSettings(), 1, CPU)
    outputs = HeadInputs(
        torch.randn(1, 4, 8), [torch.randn(10, 8)], LogitFacts(), torch.ones(1, 4, dtype=torch.int8), None
    )
    targets = (torch.tensor([[1, 2, 3, -100]]), torch.tensor([3.0, 0.0]))
    loss(outputs, targets)
    loss(outputs, targets)
    sums = loss.take_sums()
    assert sums[SUMS.index("tokens_pos")] == 6
    assert sums.dtype == torch.float64
    assert loss.take_sums().count_nonzero() == 0


def test_documents_compared_under_several_strengths():
    """Sums over a document's tokens, row by row; a filler counts nothing of its own."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(3, 6, 8, generator=generator), torch.randn(10, 8, generator=generator)
    labels = torch.tensor([1, 2, -100, 9, 0, -100])
    loss = ComparisonLoss()
    value = loss(
        HeadInputs(hidden, [weight], LogitFacts(), torch.zeros(3, 6), None), (labels.expand(3, 6), torch.tensor([7]))
    )
    assert value == 0
    loss(
        HeadInputs(hidden, [weight], LogitFacts(), torch.zeros(3, 6), None),
        (torch.full((3, 6), IGNORED_LABEL), torch.tensor([-1])),
    )
    (index, sums), (filler, nothing) = loss.take_results()
    assert loss.take_results() == []
    assert (index, filler) == (7, -1)
    assert nothing.count_nonzero() == 0
    counted = labels >= 0
    logs = torch.log_softmax(hidden.double() @ weight.double().T, dim=-1)[:, counted]
    nll = -logs.gather(2, labels[counted].expand(3, -1).unsqueeze(2)).squeeze(2)
    kl = (logs[0].exp() * (logs[0] - logs)).sum(-1)
    hits = (logs.argmax(-1) == labels[counted]).double()
    agrees = (logs.argmax(-1) == logs[0].argmax(-1)).double()
    tokens = torch.full((3,), 4.0, dtype=torch.float64)
    expected = torch.stack([nll.sum(1), hits.sum(1), kl.sum(1), agrees.sum(1), tokens], dim=1)
    torch.testing.assert_close(sums, expected, rtol=1e-6, atol=1e-6)  # float32 logits
