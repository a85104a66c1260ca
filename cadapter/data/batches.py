"""Which sequences make up step n, and the tensors of one micro-batch.

Everything is a function of (seed, epoch, step, sequences per step); the layout (replicas, micro-batch size,
accumulation) only decides who reads which, so that resuming is arithmetic and every layout sees the same steps.
Steps and epochs count from 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import overload

import numpy as np
import torch
from torch import Tensor

from cadapter.classes import IGNORED_LABEL, NEUTRAL, NO_CLASS
from cadapter.data.packing import BOUNDARY, predicted
from cadapter.data.sequences import PackedSequences
from cadapter.data.shuffling import shuffled

FILLER = -1
"""Index of a sequence that only fills a batch: no labels, no class, counted nowhere."""


@lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order [count] in which the sequences come in ``epoch``: a permutation, read-only."""
    order = shuffled(count, "epoch", seed, epoch)
    order.flags.writeable = False
    return order


def filled(order: np.ndarray, sequences_per_step: int, start: int) -> np.ndarray:
    """Return the group [sequences_per_step] of ``order`` that begins at ``start``, filled up with fillers."""
    group = np.full(sequences_per_step, FILLER, np.int64)
    part = order[start : start + sequences_per_step]
    group[: len(part)] = part
    return group


@dataclass(frozen=True)
class BatchPlan:
    """The steps of a run over ``count`` sequences; an epoch's last step is filled with fillers.

    A run that goes on has taken ``after_step`` steps already, which have read ``after_sequences`` sequences (``count``
    for each whole epoch), perhaps other numbers of them a step.

    Raises:
        ValueError: a number that must be positive is not.
    """

    count: int
    sequences_per_step: int
    epochs: int = 1
    max_steps: int | None = None
    seed: int = 0
    after_step: int = 0
    after_sequences: int = 0

    def __post_init__(self) -> None:
        if min(self.count, self.sequences_per_step, self.epochs, 1 if self.max_steps is None else self.max_steps) < 1:
            raise ValueError(f"a batch plan needs positive numbers, not {self}")

    @property
    def steps_per_epoch(self) -> int:
        """ceil(count / sequences_per_step): steps of a whole epoch."""
        return -(-self.count // self.sequences_per_step)

    @property
    def _begun(self) -> tuple[int, int]:
        """The epoch (from 0) in which this plan starts, and how many of its steps are left."""
        epoch, read = divmod(self.after_sequences, self.count)
        return epoch, -(-(self.count - read) // self.sequences_per_step)

    @property
    def total_steps(self) -> int:
        """Steps of the run with those before: of all epochs, at most ``max_steps``."""
        epoch, left = self._begun
        steps = self.after_step
        if epoch < self.epochs:
            steps += left + (self.epochs - epoch - 1) * self.steps_per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def _place(self, step: int) -> tuple[int, int]:
        """The epoch (from 0) of ``step``, which is after ``after_step``, and the place in it where it begins."""
        epoch, left = self._begun
        later = step - self.after_step - 1
        if later < left:
            return epoch, self.after_sequences % self.count + later * self.sequences_per_step
        more, within = divmod(later - left, self.steps_per_epoch)
        return epoch + 1 + more, within * self.sequences_per_step

    def epoch_of(self, step: int) -> int:
        """Return the epoch (from 1) that ``step`` (from 1) belongs to; of the steps before, that of the last."""
        if step <= self.after_step:
            return max(0, self.after_sequences - 1) // self.count + 1
        return self._place(step)[0] + 1

    def read_by(self, step: int) -> int:
        """Return how many sequences the run has read after ``step``, ``count`` for each whole epoch."""
        if step <= self.after_step:
            return self.after_sequences
        epoch, start = self._place(step)
        return epoch * self.count + min(start + self.sequences_per_step, self.count)

    def ends_epoch(self, step: int) -> bool:
        """Whether ``step`` reads the last sequences of its epoch."""
        return self.read_by(step) % self.count == 0

    def indices(self, step: int) -> np.ndarray:
        """Return the sequences [sequences_per_step] int64 of ``step`` (from 1); −1 where there is none left.

        Raises:
            IndexError: no such step, or it is one of those before.
        """
        if not self.after_step < step <= self.total_steps:
            raise IndexError(f"step {step} is not among the steps {self.after_step + 1} to {self.total_steps}")
        epoch, start = self._place(step)
        return filled(epoch_order(self.count, self.seed, epoch + 1), self.sequences_per_step, start)


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """B sequences of length S, shifted: position t carries what it predicts, token t + 1.

    Attributes:
        input_ids: [B, S] int64.
        labels: [B, S] int64; −100 where there is no cross-entropy: padding, masked tokens, class 0, the last position.
        classes: [B, S] int8, the class of the token predicted; ``NO_CLASS`` where nothing is predicted.
        positions: [B, S] int64, the place of each token in what it sees, from 0; they begin again where documents are
            isolated.
        sequence_ids: [B] int64, each sequence's global index; −1 for a filler.
    """

    input_ids: Tensor
    labels: Tensor
    classes: Tensor
    positions: Tensor
    sequence_ids: Tensor


@dataclass(frozen=True)
class StepTotals:
    """Counts over the global batch of a step, from the packed data and without a collective.

    ``positive`` and ``negative``: positions with cross-entropy; ``neutral``: positions that predict a token of class
    0; ``tokens``: tokens that are not padding.
    """

    positive: int
    negative: int
    neutral: int
    tokens: int

    @property
    def trained(self) -> int:
        """Positions with cross-entropy, of both classes."""
        return self.positive + self.negative


def totals_of(packed: PackedSequences, indices: np.ndarray) -> StepTotals:
    """Return the counts over the sequences ``indices``, fillers left out."""
    real = indices[indices != FILLER]
    positive, negative, neutral = packed.counts[real].sum(axis=0, dtype=np.int64).tolist()
    return StepTotals(positive, negative, neutral, int(packed.tokens[real].sum(dtype=np.int64)))


def micro_batch(packed: PackedSequences, indices: np.ndarray) -> MicroBatch:
    """Return the sequences ``indices`` [B] as tensors; fillers hold token 0, no label and no class."""
    shape = (len(indices), packed.sequence_len)
    input_ids = np.zeros(shape, np.int64)
    labels = np.full(shape, IGNORED_LABEL, np.int64)
    classes = np.full(shape, NO_CLASS, np.int8)
    boundaries = np.zeros(shape, bool)
    real = indices != FILLER
    ids, own_classes, flags = packed.gather(indices[real])
    of_class, trained = predicted(own_classes, flags)
    input_ids[real] = ids
    classes[real, :-1] = of_class
    labels[real, :-1] = np.where(trained & (of_class != NEUTRAL), ids[:, 1:], IGNORED_LABEL)
    boundaries[real] = (flags & BOUNDARY) != 0
    return MicroBatch(
        torch.from_numpy(input_ids),
        torch.from_numpy(labels),
        torch.from_numpy(classes),
        torch.from_numpy(restarting(boundaries)),
        torch.from_numpy(indices.astype(np.int64)),
    )


def restarting(boundaries: np.ndarray) -> np.ndarray:
    """Return positions [B, S] int64 that count from 0 and begin again where ``boundaries`` [B, S] is true."""
    count = np.broadcast_to(np.arange(boundaries.shape[1]), boundaries.shape)
    return count - np.maximum.accumulate(np.where(boundaries, count, 0), axis=1)


def share(indices: np.ndarray, replica: int, replicas: int, micro_batch_size: int, accumulation: int) -> np.ndarray:
    """Return [accumulation, micro_batch_size]: the sequences of a step that ``replica`` (from 0) reads.

    Of the step's sequences, micro-batch m of replica r takes positions (m·R + r)·B to (m·R + r + 1)·B − 1.

    Raises:
        ValueError: the layout does not hold exactly the step's sequences, or there is no such replica.
    """
    if replicas * micro_batch_size * accumulation != len(indices):
        raise ValueError(
            f"{replicas} replicas × {accumulation} micro-batches of {micro_batch_size} do not hold "
            f"{len(indices)} sequences"
        )
    if not 0 <= replica < replicas:
        raise ValueError(f"there is no replica {replica} of {replicas}")
    return indices.reshape(accumulation, replicas, micro_batch_size)[:, replica]


@dataclass(frozen=True, eq=False)
class StepBatches:
    """The micro-batches of each training step."""

    packed: PackedSequences
    plan: BatchPlan

    def micro_batches(
        self, step: int, replica: int, replicas: int, micro_batch_size: int, accumulation: int
    ) -> list[MicroBatch]:
        """Return what ``replica`` reads in ``step`` (from 1): ``accumulation`` micro-batches, see :func:`share`."""
        shares = share(self.plan.indices(step), replica, replicas, micro_batch_size, accumulation)
        return [micro_batch(self.packed, indices) for indices in shares]

    def totals(self, step: int) -> StepTotals:
        """Return the counts over the whole ``step``."""
        return totals_of(self.packed, self.plan.indices(step))


class EvaluationBatches(Sequence[list[MicroBatch]]):
    """An evaluation as a list of steps, each the micro-batches of one replica, made when it is asked for.

    Every sequence comes once, in order; the last step is filled with fillers.
    """

    def __init__(
        self, packed: PackedSequences, replica: int, replicas: int, micro_batch_size: int, accumulation: int
    ) -> None:
        self._packed = packed
        self._layout = (replica, replicas, micro_batch_size, accumulation)
        self._per_step = replicas * micro_batch_size * accumulation

    def __len__(self) -> int:
        return -(-len(self._packed) // self._per_step)

    @overload
    def __getitem__(self, step: int) -> list[MicroBatch]: ...

    @overload
    def __getitem__(self, step: slice) -> list[list[MicroBatch]]: ...

    def __getitem__(self, step: int | slice) -> list[MicroBatch] | list[list[MicroBatch]]:
        if isinstance(step, slice):
            return [self[number] for number in range(*step.indices(len(self)))]
        shares = share(self._indices(step), *self._layout)
        return [micro_batch(self._packed, indices) for indices in shares]

    def totals(self, step: int) -> StepTotals:
        """Return the counts over the whole ``step`` (from 0), all replicas together."""
        return totals_of(self._packed, self._indices(step))

    def _indices(self, step: int) -> np.ndarray:
        if not -len(self) <= step < len(self):
            raise IndexError(f"step {step} is not among the {len(self)} steps of the evaluation")
        return filled(np.arange(len(self._packed)), self._per_step, step % len(self) * self._per_step)


def evaluation_batches(
    packed: PackedSequences, replica: int, replicas: int, micro_batch_size: int, accumulation: int
) -> EvaluationBatches:
    """Return the steps of an evaluation as ``replica`` (from 0) of ``replicas`` reads them."""
    return EvaluationBatches(packed, replica, replicas, micro_batch_size, accumulation)
