"""Steps: each sequence once an epoch, the same ones in every layout, and micro-batches shifted by one."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from cadapter.classes import IGNORED_LABEL, NO_CLASS
from cadapter.data.batches import (
    FILLER,
    BatchPlan,
    MicroBatch,
    StepBatches,
    StepTotals,
    epoch_order,
    evaluation_batches,
    micro_batch,
)
from cadapter.data.packing import Layout, Pieces, in_a_row, pack
from cadapter.data.sequences import PackedSequences
from tests.data.test_data_packing import reader

LENGTH = 8
LAYOUTS = [(1, 1, 8), (1, 8, 1), (2, 2, 2), (4, 1, 2), (8, 1, 1), (2, 4, 1)]
"""(replicas, micro-batch size, accumulation) for steps of eight sequences."""


def sequences(count: int, seed: int = 0) -> PackedSequences:
    """``count`` sequences of documents of all classes, the last with padding, in several blocks."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, 30, count * (LENGTH - 1) - 3).astype(np.int32)
    cuts = np.sort(rng.choice(np.arange(1, len(tokens)), len(tokens) // 5, replace=False))
    starts, stops = np.r_[0, cuts], np.r_[cuts, len(tokens)]
    classes = rng.integers(-1, 2, len(starts)).astype(np.int8)
    pieces = Pieces(starts, stops, classes, np.zeros(len(starts), np.int16), np.zeros(len(starts), bool))
    layout = Layout(LENGTH, (1,), 0)
    placement = in_a_row(pieces, layout, np.zeros(len(pieces), bool))
    whole = next(pack(placement, reader(tokens, ~np.isin(tokens, (5, 6))), layout))
    third = max(1, count // 3)
    return PackedSequences(
        [whole.select(np.arange(count)[low : low + third]) for low in range(0, count, third)], LENGTH
    )


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 64, 1000])
@pytest.mark.parametrize("per_step", [1, 3, 8, 50])
def test_every_sequence_comes_once_an_epoch(count: int, per_step: int) -> None:
    plan = BatchPlan(count, per_step, epochs=3, seed=5)
    assert plan.steps_per_epoch == -(-count // per_step)
    assert plan.total_steps == 3 * plan.steps_per_epoch
    for epoch in (1, 2, 3):
        steps = [step for step in range(1, plan.total_steps + 1) if plan.epoch_of(step) == epoch]
        taken = np.concatenate([plan.indices(step) for step in steps])
        assert len(steps) == plan.steps_per_epoch
        assert sorted(taken[taken != FILLER]) == list(range(count))
        assert (taken[:count] != FILLER).all()  # fillers come last


def test_a_plan_is_a_function_of_its_numbers() -> None:
    plan = BatchPlan(100, 8, epochs=4, seed=1)
    forwards = [plan.indices(step).tolist() for step in range(1, 53)]
    again = BatchPlan(100, 8, epochs=4, max_steps=52, seed=1)
    assert [again.indices(step).tolist() for step in range(52, 0, -1)] == forwards[::-1]
    assert BatchPlan(100, 8, epochs=4, seed=2).indices(1).tolist() != forwards[0]
    assert epoch_order(100, 1, 1).tolist() != epoch_order(100, 1, 2).tolist()
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(100, 1, 1)[0] = 5


@pytest.mark.parametrize("before", [1, 3, 8])
@pytest.mark.parametrize("after", [1, 3, 8, 50])
def test_a_run_that_goes_on_with_other_steps_reads_every_sequence_once_an_epoch(before: int, after: int) -> None:
    count, epochs = 19, 3
    first = BatchPlan(count, before, epochs, seed=5)
    for done in range(first.total_steps + 1):
        then = BatchPlan(count, after, epochs, seed=5, after_step=done, after_sequences=first.read_by(done))
        steps = [*(first.indices(step) for step in range(1, done + 1))]
        steps += [then.indices(step) for step in range(done + 1, then.total_steps + 1)]
        taken = np.concatenate(steps)
        taken = taken[taken != FILLER]
        straight = [first.indices(step) for step in range(1, first.total_steps + 1)]
        straight = np.concatenate(straight)
        assert taken.tolist() == straight[straight != FILLER].tolist()
        ends = [step for step in range(done + 1, then.total_steps + 1) if then.ends_epoch(step)]
        assert [then.epoch_of(step) for step in ends] == list(range(epochs - len(ends) + 1, epochs + 1))
        assert then.read_by(then.total_steps) == epochs * count
        if done:
            assert then.epoch_of(done) == first.epoch_of(done)
        if before == after:
            assert then.total_steps == first.total_steps


def test_the_order_never_changes() -> None:
    """A resumed run must find the order it began with, whatever the versions of Python and numpy."""
    assert epoch_order(10, 42, 1).tolist() == [4, 6, 7, 3, 0, 8, 5, 1, 9, 2]


def test_max_steps_and_bounds() -> None:
    plan = BatchPlan(10, 4, epochs=5, max_steps=7)
    assert (plan.steps_per_epoch, plan.total_steps, plan.epoch_of(7)) == (3, 7, 3)
    for step in (0, 8):
        with pytest.raises(IndexError, match=f"step {step} is not among the steps 1 to 7"):
            plan.indices(step)
    for wrong in ({"count": 0}, {"epochs": 0}, {"max_steps": 0}, {"sequences_per_step": 0}):
        with pytest.raises(ValueError, match="positive"):
            BatchPlan(**{"count": 3, "sequences_per_step": 2, **wrong})


def row_values(batch: MicroBatch, row: int) -> tuple:
    parts = (batch.input_ids, batch.labels, batch.classes)
    return (int(batch.sequence_ids[row]), *(tuple(part[row].tolist()) for part in parts))


@pytest.mark.parametrize(("replicas", "size", "accumulation"), LAYOUTS)
def test_layouts_read_the_same_sequences(replicas: int, size: int, accumulation: int) -> None:
    packed = sequences(19)
    batches = StepBatches(packed, BatchPlan(19, 8, epochs=2, seed=3))
    for step in range(1, 7):
        read = Counter()
        for replica in range(replicas):
            micro_batches = batches.micro_batches(step, replica, replicas, size, accumulation)
            assert len(micro_batches) == accumulation
            for number, batch in enumerate(micro_batches):
                first = (number * replicas + replica) * size
                assert batch.sequence_ids.tolist() == batches.plan.indices(step)[first : first + size].tolist()
                read.update(row_values(batch, row) for row in range(size))
        alone = batches.micro_batches(step, 0, 1, 8, 1)[0]
        assert read == Counter(row_values(alone, row) for row in range(8))


def test_micro_batches_are_shifted() -> None:
    """Against a reference that goes position by position."""
    packed = sequences(6)
    batch = micro_batch(packed, np.array([5, FILLER, 0]))
    for row, index in ((0, 5), (2, 0)):
        ids, classes, trained = (part[0].tolist() for part in packed.rows([index]))
        length = int(packed.tokens[index])
        for t in range(LENGTH):
            assert batch.input_ids[row, t] == ids[t]
            predicts = t + 1 < length
            assert batch.classes[row, t] == (classes[t + 1] if predicts else NO_CLASS)
            with_loss = predicts and trained[t + 1] and classes[t + 1] != 0
            assert batch.labels[row, t] == (ids[t + 1] if with_loss else IGNORED_LABEL)
    assert (batch.labels[1] == IGNORED_LABEL).all()
    assert (batch.classes[1] == NO_CLASS).all()
    assert (batch.input_ids[1] == 0).all()
    assert batch.sequence_ids.tolist() == [5, FILLER, 0]
    assert [part.dtype for part in (batch.input_ids, batch.labels, batch.classes, batch.sequence_ids)] == [
        torch.int64, torch.int64, torch.int8, torch.int64,
    ]  # fmt: skip


def totals_by_hand(batches: list[MicroBatch], packed: PackedSequences) -> StepTotals:
    """Counted in the tensors themselves."""
    counts = Counter()
    for batch in batches:
        with_loss = batch.labels != IGNORED_LABEL
        for class_ in (1, -1):
            counts[class_] += int((with_loss & (batch.classes == class_)).sum())
        counts[0] += int((batch.classes == 0).sum())
        counts["tokens"] += sum(int(packed.tokens[index]) for index in batch.sequence_ids if index != FILLER)
    return StepTotals(counts[1], counts[-1], counts[0], counts["tokens"])


def test_totals_are_those_of_the_tensors() -> None:
    packed = sequences(19)
    batches = StepBatches(packed, BatchPlan(19, 8, seed=3))
    for step in (1, 2, 3):
        by_hand = totals_by_hand(batches.micro_batches(step, 0, 1, 2, 4), packed)
        assert batches.totals(step) == by_hand
        assert by_hand.trained == by_hand.positive + by_hand.negative > 0
    assert sum(batches.totals(step).neutral for step in (1, 2, 3)) == packed.trained[2] > 0


@pytest.mark.parametrize(("replicas", "size", "accumulation"), LAYOUTS)
@pytest.mark.parametrize("count", [1, 8, 19])
def test_an_evaluation_reads_every_sequence_once(count: int, replicas: int, size: int, accumulation: int) -> None:
    packed = sequences(count)
    parts = [evaluation_batches(packed, replica, replicas, size, accumulation) for replica in range(replicas)]
    assert {len(part) for part in parts} == {-(-count // 8)}
    read = [batch.sequence_ids for part in parts for step in part for batch in step]
    indices = torch.cat(read)
    assert sorted(indices[indices != FILLER].tolist()) == list(range(count))
    assert len(indices) == 8 * len(parts[0])
    for number in range(len(parts[0])):
        assert parts[0].totals(number) == totals_by_hand([batch for part in parts for batch in part[number]], packed)
    with pytest.raises(IndexError):
        parts[0][len(parts[0])]


def test_a_layout_that_does_not_fit() -> None:
    batches = StepBatches(sequences(19), BatchPlan(19, 8))
    with pytest.raises(ValueError, match="2 replicas × 3 micro-batches of 1 do not hold 8 sequences"):
        batches.micro_batches(1, 0, 2, 1, 3)
    with pytest.raises(ValueError, match="no replica 2 of 2"):
        batches.micro_batches(1, 2, 2, 4, 1)


def test_rows_out_of_range() -> None:
    for index in (-1, 6):
        with pytest.raises(IndexError, match="0 to 5"):
            sequences(6).rows([0, index])


# ---- isolated documents -------------------------------------------------------------------------------------------


def isolated(prefix: tuple[int, ...]) -> tuple[PackedSequences, list[int]]:
    """Documents of 3, 4 and 9 tokens of classes +1, 0 and −1 in sequences of 8; where each begins in the stream."""
    lengths = np.array([3, 4, 9])
    tokens = np.arange(10, 26, dtype=np.int32)
    stops = np.cumsum(lengths)
    pieces = Pieces(stops - lengths, stops, np.array([1, 0, -1], np.int8), np.zeros(3, np.int16), np.zeros(3, bool))
    layout = Layout(8, prefix, 0, isolated=True)
    placement = in_a_row(pieces, layout, np.zeros(3, bool))
    blocks = list(pack(placement, reader(tokens, np.ones(16, bool)), layout))
    return PackedSequences(blocks, 8), [0, 3, 7]


def test_isolated_documents_by_hand() -> None:
    packed, _ = isolated((1,))
    assert packed.tokens.tolist() == [8, 8, 3]
    batch = micro_batch(packed, np.array([0, 1, 2, FILLER]))
    assert batch.input_ids[:3].tolist() == [
        [1, 10, 11, 12, 13, 14, 15, 16], [1, 17, 18, 19, 20, 21, 22, 23], [1, 24, 25, 0, 0, 0, 0, 0]
    ]  # fmt: skip
    # The first document of a sequence has the prefix before it; padding is a document of its own.
    assert batch.positions.tolist() == [
        [0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7]
    ]  # fmt: skip
    none, nothing = -100, NO_CLASS
    # What predicts the first token of the second document would have to see the first.
    assert batch.classes[:3].tolist() == [
        [1, 1, 1, nothing, 0, 0, 0, nothing], [-1] * 7 + [nothing], [-1, -1] + [nothing] * 6
    ]  # fmt: skip
    assert batch.labels[:3].tolist() == [
        [10, 11, 12] + [none] * 5, [17, 18, 19, 20, 21, 22, 23, none], [24, 25] + [none] * 6
    ]  # fmt: skip
    assert packed.counts.tolist() == [[3, 0, 3], [0, 7, 0], [0, 2, 0]]


def test_without_a_prefix_no_first_token_of_a_document_is_trained() -> None:
    packed, _ = isolated(())
    batch = micro_batch(packed, np.array([0, 1]))
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 5, 6, 7]]
    assert batch.labels.tolist() == [
        [11, 12, -100, -100, -100, -100, -100, -100],
        [18 + k for k in range(1, 8)] + [-100],
    ]
    assert packed.counts.tolist() == [[2, 0, 3], [0, 7, 0]]
    assert packed.rows([0])[2].tolist() == [[True] * 3 + [False] + [True] * 3 + [False]]


def test_packed_documents_have_one_count_of_positions() -> None:
    batch = micro_batch(sequences(5), np.array([0, 4, FILLER]))
    assert batch.positions.tolist() == [list(range(LENGTH))] * 3
