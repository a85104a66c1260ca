"""Dropout's masks: their statistics, and that they follow from (seed, step, sequence, layer) alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cadapter.adapters.control import ControlledBlock, ControlSettings, GeneralAdapter
from cadapter.adapters.dropout import keep_mask, row_seeds
from cadapter.models.families import FAMILIES
from tests.tiny_models import make_model

SHAPE = (2, 64, 256)
COUNT = math.prod(SHAPE)


def dropped(mask: Tensor) -> Tensor:
    """1 where the mask drops."""
    return (mask == 0).double()


def rows(seed: int = 1, step: int = 1, sequences: tuple[int, ...] = (10, 11)) -> Tensor:
    return torch.tensor(row_seeds(seed, step, sequences))


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.1, 0.5, 0.9])
def test_the_rate_and_the_scale(rate):
    mask = keep_mask(rows(), 3, SHAPE, rate)
    assert mask.shape == SHAPE
    assert mask.dtype == torch.float32
    kept = torch.tensor(1 / (1 - rate))  # the one value beside zero
    assert torch.equal(mask, torch.where(mask > 0, kept, 0.0))
    # A share of n coins has the standard deviation √(p(1 − p)/n); 4 of them are exceeded once in 16,000.
    deviation = math.sqrt(rate * (1 - rate) / COUNT)
    assert abs(dropped(mask).mean().item() - rate) <= 4 * deviation
    assert abs(mask.double().mean().item() - 1) <= 4 * deviation / (1 - rate) + 1e-7  # +: float32 of 1 / (1 − rate)


def test_neither_tokens_nor_components_are_favoured():
    rate, n = 0.3, 400
    mask = dropped(keep_mask(rows(sequences=tuple(range(n))), 0, (n, 8, 32), rate))
    # The mean over n rows of each of 256 elements; 5 standard deviations are exceeded by one of 256 once in 7,000.
    assert (mask.mean(dim=0) - rate).abs().max() < 5 * math.sqrt(rate * (1 - rate) / n)


@pytest.mark.parametrize("shift", [1, 2, 256])
def test_neighbours_are_independent(shift):
    rate = 0.5
    flat = dropped(keep_mask(rows(), 3, SHAPE, rate)).flatten() - rate
    correlation = (flat[shift:] * flat[:-shift]).mean() / (rate * (1 - rate))
    assert abs(correlation) < 4 / math.sqrt(COUNT)


@pytest.mark.parametrize(
    ("other", "place"),
    [
        pytest.param(rows(seed=2), 3, id="seed"),
        pytest.param(rows(step=2), 3, id="step"),
        pytest.param(rows(sequences=(12, 13)), 3, id="sequence"),
        pytest.param(rows(), 4, id="layer"),
    ],
)
def test_another_seed_step_sequence_or_layer_has_an_independent_mask(other, place):
    rate = 0.5
    first = dropped(keep_mask(rows(), 3, SHAPE, rate)) - rate
    second = dropped(keep_mask(other, place, SHAPE, rate)) - rate
    assert abs((first * second).mean() / (rate * (1 - rate))) < 4 / math.sqrt(COUNT)


def test_masks_of_all_places_and_sequences_differ():
    numbers = torch.tensor(row_seeds(0, 1, range(500)))
    assert numbers.unique().numel() == 500
    assert ((numbers >= 0) & (numbers < 2**32)).all()
    masks = torch.stack([keep_mask(numbers, place, (500, 2, 64), 0.5) for place in range(4)])
    assert masks.flatten(2).flatten(0, 1).unique(dim=0).shape[0] == 2000


def test_the_place_in_the_micro_batch_and_the_batch_size_do_not_matter():
    together = keep_mask(rows(sequences=(3, 7, 9)), 5, (3, 16, 32), 0.2)
    backwards = keep_mask(rows(sequences=(9, 7, 3)), 5, (3, 16, 32), 0.2)
    assert torch.equal(together, backwards.flip(0))
    for place, sequence in enumerate((3, 7, 9)):
        alone = keep_mask(rows(sequences=(sequence,)), 5, (1, 16, 32), 0.2)
        assert torch.equal(alone[0], together[place])


def test_no_random_state_is_read_or_moved():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = keep_mask(rows(), 3, SHAPE, 0.4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(keep_mask(rows(), 3, SHAPE, 0.4), first)


@pytest.mark.parametrize("site", ["block", "writes"])
def test_recomputation_sees_the_same_mask(site):
    """Outputs and gradients of a recomputed block are bit-equal to those of a block that keeps everything."""
    model = make_model("llama")
    settings = ControlSettings(4, 2.0, site, dropout=0.25)
    adapter = GeneralAdapter(model.config.hidden_size, 1, settings, seed=0)
    torch.nn.init.normal_(adapter.control_B, std=0.1)
    block = ControlledBlock(model.model.layers[1], adapter, FAMILIES["llama"])
    hidden = torch.randn(2, 12, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    embeddings = model.model.rotary_emb(hidden, torch.arange(12).unsqueeze(0))
    classes = torch.tensor([1, -1, 0, 2] * 6, dtype=torch.int8).view(2, 12)

    def run(hidden: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
        return block.controlled(
            hidden,
            classes,
            adapter.class_transforms(),
            dropout_rows=seeds,
            penalise_neutral=True,
            kwargs={"position_embeddings": embeddings, "attention_mask": None},
        )

    def results(recompute: bool, seeds: Tensor) -> list[Tensor]:
        start = hidden.clone().requires_grad_()
        output, penalty = checkpoint(run, start, seeds, use_reentrant=False) if recompute else run(start, seeds)
        loss = output.square().sum() + penalty
        return [output, penalty, *torch.autograd.grad(loss, [start, adapter.control_A, adapter.control_B])]

    kept, again, others = results(False, rows()), results(True, rows()), results(True, rows(step=2))
    for one, two in zip(kept, again, strict=True):
        assert torch.equal(one, two)
    assert not torch.isclose(kept[0], others[0]).all()
