"""Documents to sequences of one length, without a Python loop over tokens.

Every sequence is ``sequence_prefix`` + C = ``sequence_len`` − P tokens of a stream, and documents are placed in that
stream: one right after the other, so that a document runs over into the next sequence (:func:`in_a_row`), or each
within one sequence (:mod:`cadapter.data.fitting`). What is left of a sequence is padding, known by its position
(behind the sequence's ``tokens``) and never by its id: where pad = EOS, EOS is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import numpy as np

from cadapter.classes import NEGATIVE, NEUTRAL, NO_CLASS, POSITIVE

TRAINED = 1
"""Bit of ``flags``: the token is one to be predicted (cross-entropy, but for class 0)."""
DOCUMENT_START = 2
"""Bit of ``flags``: the first token of a document."""
BOUNDARY = 4
"""Bit of ``flags``, where documents are isolated: no token from here on sees one before, and none predicts this one."""

COUNTED_CLASSES = (POSITIVE, NEGATIVE, NEUTRAL)
"""The columns of ``counts``."""

_TOKENS_PER_BLOCK = 1 << 20
_DOCUMENTS_AT_ONCE = 1 << 16

Read = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""``read(starts, stops)``: ids int32 and, bool, which are to be predicted, of those tokens, one after the other."""


@dataclass(frozen=True)
class SequenceBlock:
    """N packed sequences of length S.

    Attributes:
        ids: [N, S] int32 token ids.
        classes: [N, S] int8, the class of each token's own document; ``NO_CLASS`` for prefix and padding.
        flags: [N, S] uint8 of :data:`TRAINED`, :data:`DOCUMENT_START` and :data:`BOUNDARY`.
        counts: [N, 3] int32 for the positions t ≤ S − 2, by what token t + 1 is: trained of class +1, trained of
            class −1, any of class 0.
        tokens: [N] int32, how many tokens stand before the padding.
    """

    ids: np.ndarray
    classes: np.ndarray
    flags: np.ndarray
    counts: np.ndarray
    tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, rows: np.ndarray) -> SequenceBlock:
        """Return the sequences ``rows`` (indices or a mask)."""
        return SequenceBlock(*(getattr(self, field.name)[rows] for field in fields(self)))


@dataclass(frozen=True)
class Pieces:
    """What is to be packed, in order: tokens ``starts`` to ``stops`` of the token store, each of one document.

    All [n]: ``starts`` and ``stops`` int64, ``classes`` int8, ``datasets`` int16, the number of each one's dataset, and
    ``repeats`` bool, whether it begins with the sequence prefix, of one token or more.
    """

    starts: np.ndarray
    stops: np.ndarray
    classes: np.ndarray
    datasets: np.ndarray
    repeats: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def tokens(self) -> int:
        """How many tokens there are."""
        return int((self.stops - self.starts).sum())

    def select(self, order: np.ndarray) -> Pieces:
        """Return the pieces ``order`` (indices or a mask)."""
        return Pieces(*(getattr(self, field.name)[order] for field in fields(self)))


@dataclass(frozen=True)
class Layout:
    """How sequences look: length, what stands first in each, what fills the rest, whether documents are isolated."""

    sequence_len: int
    prefix: tuple[int, ...]
    pad_id: int
    isolated: bool = False

    @property
    def capacity(self) -> int:
        """C: tokens of the stream per sequence."""
        return self.sequence_len - len(self.prefix)


@dataclass(frozen=True)
class Placement:
    """``pieces`` with their places in the stream: each is ``at`` [n] to before ``ends`` [n], int64, increasing."""

    pieces: Pieces
    at: np.ndarray
    ends: np.ndarray

    def sequences(self, layout: Layout, drop_last: bool = False) -> int:
        """Return how many sequences there are, with or without a last one that needs padding."""
        length = int(self.ends[-1]) if len(self.at) else 0
        return length // layout.capacity if drop_last else -(-length // layout.capacity)

    def split(self, layout: Layout) -> int:
        """Return how many pieces lie in more than one sequence."""
        borders = np.arange(1, self.sequences(layout)) * layout.capacity
        around = np.searchsorted(self.ends, borders, side="right")
        return len(np.unique(around[self.at[around] < borders]))


def in_a_row(pieces: Pieces, layout: Layout, drop_tails: np.ndarray) -> Placement:
    """Place ``pieces`` one right after the other, without what is not to be packed.

    - A document that begins with the sequence prefix loses it where a sequence begins with the document: the
      sequence's own takes its place, so that no BOS is doubled.
    - Where ``drop_tails`` [n] is true for a document that a full sequence cuts, what remains of it after its last
      full sequence is left out; the next sequence begins with the next document.
    """
    if pieces.repeats.any() or drop_tails.any():
        pieces = _trimmed(pieces, layout, drop_tails)
    lengths = pieces.stops - pieces.starts
    ends = np.cumsum(lengths)
    return Placement(pieces, ends - lengths, ends)


def _trimmed(pieces: Pieces, layout: Layout, drop_tails: np.ndarray) -> Pieces:
    starts, stops = pieces.starts.copy(), pieces.stops.copy()
    capacity, prefix, fill = layout.capacity, len(layout.prefix), 0
    for low in range(0, len(pieces), _DOCUMENTS_AT_ONCE):
        part = slice(low, low + _DOCUMENTS_AT_ONCE)
        columns = [column[part].tolist() for column in (starts, stops, pieces.repeats, drop_tails)]
        for index, (start, stop, repeated, drop) in enumerate(zip(*columns, strict=True), low):
            if repeated and fill == 0:
                starts[index] = start = start + prefix
            length, room = stop - start, capacity - fill
            if drop and length > room:
                length = room + (length - room) // capacity * capacity
                stops[index] = start + length
            fill = (fill + length) % capacity
    return replace(pieces, starts=starts, stops=stops)


def pack(placement: Placement, read: Read, layout: Layout, drop_last: bool = False) -> Iterator[SequenceBlock]:
    """Yield the sequences of the stream, in blocks of about a million tokens.

    ``drop_last`` leaves out the last sequence where it would need padding.

    Args:
        read: gives the tokens that pieces point to, see :meth:`~cadapter.data.store.TokenStore.read`.
    """
    rows = max(1, _TOKENS_PER_BLOCK // layout.sequence_len)
    total = placement.sequences(layout, drop_last)
    for row in range(0, total, rows):
        yield _block(placement, read, layout, row, min(row + rows, total))


def _block(placement: Placement, read: Read, layout: Layout, first: int, last: int) -> SequenceBlock:
    """Return the sequences ``first`` to before ``last``."""
    low, high = first * layout.capacity, last * layout.capacity
    part = slice(np.searchsorted(placement.ends, low, side="right"), np.searchsorted(placement.at, high))
    at = placement.at[part]
    begin, end = np.maximum(at, low) - low, np.minimum(placement.ends[part], high) - low
    lengths = end - begin
    source = placement.pieces.starts[part] + (begin + low - at)
    stream_ids, stream_trained = read(source, source + lengths)
    target = np.arange(len(stream_ids)) + np.repeat(begin - (np.cumsum(lengths) - lengths), lengths)

    def rows(filler: int, values: np.ndarray) -> np.ndarray:
        stream = np.full(high - low, filler, values.dtype)
        stream[target] = values
        whole = np.full((last - first, layout.sequence_len), filler, values.dtype)
        whole[:, len(layout.prefix) :] = stream.reshape(-1, layout.capacity)
        return whole

    ids = rows(layout.pad_id, stream_ids)
    ids[:, : len(layout.prefix)] = layout.prefix
    classes = rows(NO_CLASS, np.repeat(placement.pieces.classes[part].astype(np.int8), lengths))
    flags = rows(0, stream_trained.view(np.uint8))
    filled = (len(layout.prefix) + (classes != NO_CLASS).sum(axis=1)).astype(np.int32)
    row, column = np.divmod(begin[(at >= low) & (lengths > 0)], layout.capacity)
    flags[row, column + len(layout.prefix)] |= DOCUMENT_START
    if layout.isolated:
        later = column > 0  # a sequence's first document has the sequence's prefix before it
        flags[row[later], column[later] + len(layout.prefix)] |= BOUNDARY
        padded = np.flatnonzero(filled < layout.sequence_len)
        flags[padded, filled[padded]] |= BOUNDARY
    return SequenceBlock(ids, classes, flags, count_predicted(classes, flags), filled)


def predicted(classes: np.ndarray, flags: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what each position t predicts, token t + 1: (its class, whether it is trained), each [N, S − 1].

    The class is ``NO_CLASS`` where nothing is predicted: before padding, and before a :data:`BOUNDARY`.
    """
    following = flags[:, 1:]
    apart = (following & BOUNDARY) != 0
    return np.where(apart, np.int8(NO_CLASS), classes[:, 1:]), ((following & TRAINED) != 0) & ~apart


def count_predicted(classes: np.ndarray, flags: np.ndarray) -> np.ndarray:
    """Return ``counts`` [N, 3] of :class:`SequenceBlock`: the first token of a sequence is never predicted."""
    of_class, trained = predicted(classes, flags)
    masks = [(of_class == class_) & (trained | (class_ == NEUTRAL)) for class_ in COUNTED_CLASSES]
    return np.stack([np.count_nonzero(mask, axis=1) for mask in masks], axis=1).astype(np.int32)
