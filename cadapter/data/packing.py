"""Documents to sequences of one length, without a Python loop over tokens.

The documents follow one another in one stream; every sequence is ``sequence_prefix`` + the next
C = ``sequence_len`` − P tokens of it, so that a document runs over into the next sequence. What fills the last one is
padding, known by its position (behind the sequence's ``tokens``) and never by its id: where pad = EOS, EOS is trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np

from cadapter.classes import NEGATIVE, NEUTRAL, NO_CLASS, POSITIVE

TRAINED = 1
"""Bit of ``flags``: the token is one to be predicted (cross-entropy, but for class 0)."""
DOCUMENT_START = 2
"""Bit of ``flags``: the first token of a document."""

COUNTED_CLASSES = (POSITIVE, NEGATIVE, NEUTRAL)
"""The columns of ``counts``."""

_TOKENS_PER_BLOCK = 1 << 20


@dataclass(frozen=True)
class SequenceBlock:
    """N packed sequences of length S.

    Attributes:
        ids: [N, S] int32 token ids.
        classes: [N, S] int8, the class of each token's own document; ``NO_CLASS`` for prefix and padding.
        flags: [N, S] uint8 of :data:`TRAINED` and :data:`DOCUMENT_START`.
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

    All [n]: ``starts`` and ``stops`` int64, ``classes`` int8, and ``datasets`` int16, the number of each one's
    dataset.
    """

    starts: np.ndarray
    stops: np.ndarray
    classes: np.ndarray
    datasets: np.ndarray

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
    """How sequences look: their length, what stands first in each, what fills the last, what is not trained."""

    sequence_len: int
    prefix: tuple[int, ...]
    pad_id: int
    masked: tuple[int, ...] = ()

    @property
    def capacity(self) -> int:
        """C: tokens of the stream per sequence."""
        return self.sequence_len - len(self.prefix)

    def count(self, tokens: int, drop_last: bool) -> int:
        """Return how many sequences a stream of ``tokens`` gives, with or without a last one that needs padding."""
        return tokens // self.capacity if drop_last else -(-tokens // self.capacity)


def trim(pieces: Pieces, tokens: np.ndarray, layout: Layout, drop_tails: np.ndarray) -> Pieces:
    """Return ``pieces`` without what is not to be packed.

    - A document that begins with the sequence prefix loses it where a sequence begins with the document: the
      sequence's own takes its place, so that no BOS is doubled.
    - Where ``drop_tails`` [n] is true for a document that a full sequence cuts, what remains of it after its last
      full sequence is left out; the next sequence begins with the next document.
    """
    prefix = np.array(layout.prefix, np.int32)
    repeats = (pieces.stops - pieces.starts >= len(prefix)) & (len(prefix) > 0)
    for offset, id_ in enumerate(prefix):
        repeats[repeats] = tokens[pieces.starts[repeats] + offset] == id_
    starts, stops = pieces.starts.tolist(), pieces.stops.tolist()
    capacity, fill = layout.capacity, 0
    for index, (repeated, drop) in enumerate(zip(repeats.tolist(), drop_tails.tolist(), strict=True)):
        if repeated and fill == 0:
            starts[index] += len(prefix)
        length, room = stops[index] - starts[index], capacity - fill
        if drop and length > room:
            length = room + (length - room) // capacity * capacity
            stops[index] = starts[index] + length
        fill = (fill + length) % capacity
    return replace(pieces, starts=np.array(starts, np.int64), stops=np.array(stops, np.int64))


def pack(pieces: Pieces, tokens: np.ndarray, layout: Layout, drop_last: bool = False) -> Iterator[SequenceBlock]:
    """Yield the sequences of the stream of ``pieces``, in blocks of about a million tokens.

    ``drop_last`` leaves out the last sequence where it would need padding.

    Args:
        tokens: [T] int32, the token store that the pieces point into (may be memory-mapped).
    """
    ends = np.cumsum(pieces.stops - pieces.starts)
    total = min(pieces.tokens, layout.count(pieces.tokens, drop_last) * layout.capacity)
    rows = max(1, _TOKENS_PER_BLOCK // layout.sequence_len)
    for low in range(0, total, rows * layout.capacity):
        yield _block(pieces, ends, tokens, layout, low, min(low + rows * layout.capacity, total))


def _block(pieces: Pieces, ends: np.ndarray, tokens: np.ndarray, layout: Layout, low: int, high: int) -> SequenceBlock:
    """Return the sequences that hold the stream's positions ``low`` to ``high``."""
    position = np.arange(low, high)
    piece = np.searchsorted(ends, position, side="right")
    begins = ends - (pieces.stops - pieces.starts)
    offset = position - begins[piece]
    stream_ids = tokens[pieces.starts[piece] + offset]
    stream_flags = np.where(np.isin(stream_ids, layout.masked), 0, TRAINED) | np.where(offset == 0, DOCUMENT_START, 0)

    ids = _rows(stream_ids, layout, layout.pad_id)
    ids[:, : len(layout.prefix)] = layout.prefix
    classes = _rows(pieces.classes[piece].astype(np.int8), layout, NO_CLASS)
    flags = _rows(stream_flags.astype(np.uint8), layout, 0)
    filled = np.full(len(ids), layout.sequence_len, np.int32)
    filled[-1] = len(layout.prefix) + (high - low - 1) % layout.capacity + 1
    return SequenceBlock(ids, classes, flags, count_predicted(classes, flags), filled)


def _rows(stream: np.ndarray, layout: Layout, filler: int) -> np.ndarray:
    """Return ``stream`` [n] as rows [N, S]: ``filler`` where the prefix goes and behind its end."""
    body = np.full(-(-len(stream) // layout.capacity) * layout.capacity, filler, stream.dtype)
    body[: len(stream)] = stream
    rows = np.full((len(body) // layout.capacity, layout.sequence_len), filler, stream.dtype)
    rows[:, len(layout.prefix) :] = body.reshape(-1, layout.capacity)
    return rows


def count_predicted(classes: np.ndarray, flags: np.ndarray) -> np.ndarray:
    """Return ``counts`` [N, 3] of :class:`SequenceBlock`: the first token of a sequence is never predicted."""
    predicted, trained = classes[:, 1:], (flags[:, 1:] & TRAINED) != 0
    masks = [(predicted == class_) & (trained | (class_ == NEUTRAL)) for class_ in COUNTED_CLASSES]
    return np.stack([mask.sum(axis=1) for mask in masks], axis=1).astype(np.int32)
