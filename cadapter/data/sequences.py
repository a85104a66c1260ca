"""Packed sequences and held-out documents as the rest of the program sees them: views on memory-mapped files."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from cadapter.classes import NEGATIVE, POSITIVE
from cadapter.data.packing import BOUNDARY, TRAINED, SequenceBlock


class PackedSequences:
    """N sequences of ``sequence_len`` tokens, in blocks that usually lie in memory-mapped files.

    Attributes:
        counts: [N, 3] int32, trained positions of class +1, of class −1, and neutral positions of each sequence
            (see :class:`~cadapter.data.packing.SequenceBlock`).
        tokens: [N] int32, tokens of each sequence that are not padding.
    """

    def __init__(self, blocks: Sequence[SequenceBlock], sequence_len: int) -> None:
        self.sequence_len = sequence_len
        self._blocks = [block for block in blocks if len(block)]
        self._first = np.cumsum([0, *map(len, self._blocks)])
        self.counts = np.concatenate([np.zeros((0, 3), np.int32), *(block.counts for block in self._blocks)])
        self.tokens = np.concatenate([np.zeros(0, np.int32), *(block.tokens for block in self._blocks)])

    @classmethod
    def joined(cls, parts: Sequence[PackedSequences]) -> PackedSequences:
        """Return the sequences of ``parts`` (at least one, of equal length) one after the other, without a copy."""
        return cls([block for part in parts for block in part._blocks], parts[0].sequence_len)

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def padding(self) -> int:
        """Tokens of padding in all sequences."""
        return len(self) * self.sequence_len - int(self.tokens.sum(dtype=np.int64))

    @property
    def trained(self) -> tuple[int, int, int]:
        """The sums of ``counts`` over all sequences."""
        positive, negative, neutral = self.counts.sum(axis=0, dtype=np.int64).tolist()
        return positive, negative, neutral

    @property
    def largest_id(self) -> int:
        """The largest token id in all sequences, which are read for it; 0 where there are none."""
        return max((int(block.ids.max()) for block in self._blocks), default=0)

    def rows(self, indices: np.ndarray | Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (ids int32, classes int8, trained bool), each [n, S], of the sequences ``indices`` [n]."""
        ids, classes, flags = self.gather(indices)
        return ids, classes, (flags & (TRAINED | BOUNDARY)) == TRAINED

    def gather(self, indices: np.ndarray | Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (ids, classes, flags) of the sequences ``indices``, as a block has them."""
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(f"sequence indices must lie in 0 to {len(self) - 1}")
        shape = (len(indices), self.sequence_len)
        ids, classes, flags = np.empty(shape, np.int32), np.empty(shape, np.int8), np.empty(shape, np.uint8)
        block_of = np.searchsorted(self._first, indices, side="right") - 1
        for row, (index, number) in enumerate(zip(indices, block_of, strict=True)):
            block, within = self._blocks[number], index - self._first[number]
            ids[row], classes[row], flags[row] = block.ids[within], block.classes[within], block.flags[within]
        return ids, classes, flags


@dataclass(frozen=True, eq=False)
class HeldOutDocument:
    """One document to be scored alone: sequence prefix + document prefix + text + suffix, cut to ``sequence_len``.

    ``ids`` [n] int32; ``trained`` [n] bool is true for the tokens whose prediction is scored (not those of the
    sequence prefix, nor masked ones). A first token is never predicted, whatever ``trained`` says. ``left_out`` is how
    many tokens the cut took away. ``pair`` names the preference pair that it is one side of: its source and number.
    """

    dataset: str
    control_class: int
    ids: np.ndarray
    trained: np.ndarray
    left_out: int = 0
    pair: tuple[str, int] | None = None


def with_pairs(documents: Sequence[HeldOutDocument], sources: Collection[str]) -> list[HeldOutDocument]:
    """Return ``documents``, in the order of their records, with the pairs named that those of ``sources`` come from.

    A chosen side that its rejected one follows at once is a pair; ``max_tokens`` may have cut one apart.
    """
    found = list(documents)
    for place, (chosen, rejected) in enumerate(pairwise(documents)):
        same = chosen.dataset == rejected.dataset and chosen.dataset in sources
        if same and (chosen.control_class, rejected.control_class) == (POSITIVE, NEGATIVE):
            pair = chosen.dataset, place
            found[place : place + 2] = [replace(each, pair=pair) for each in (chosen, rejected)]
    return found
