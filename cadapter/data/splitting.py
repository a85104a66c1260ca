"""Which documents of a dataset are trained on, and which are held out for evaluation.

Every document has a key, a hash of (seed, its text). In the order of the keys, which is as good as random and does
not depend on file names or on the other documents, the first ones are held out, so that a file that grows keeps most of
its split. How many these are is counted in each dataset by itself: a text near the limit that is in two datasets may be
held out in one and trained on in the other, which :mod:`cadapter.data.remarks` finds.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np


def document_key(seed: int, text: str) -> int:
    """Return the 64-bit key of a document: BLAKE2b of its text, keyed by the seed."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, key=f"document {seed}".encode())
    return int.from_bytes(digest.digest(), "little")


@dataclass(frozen=True)
class Portion:
    """Documents, or parts of them: ``documents`` [n] in the order of the files, each from ``starts`` to ``stops``."""

    documents: np.ndarray
    starts: np.ndarray
    stops: np.ndarray

    @property
    def tokens(self) -> int:
        """How many tokens there are."""
        return int((self.stops - self.starts).sum())


def split_documents(
    lengths: np.ndarray, keys: np.ndarray, eval_fraction: float, max_tokens: int | None = None, whole: bool = False
) -> tuple[Portion, Portion]:
    """Split the documents of one dataset into (training, evaluation).

    With ``max_tokens`` the dataset is first reduced to so many tokens: whole documents in the order of their keys,
    the last one cut to fit, or, where documents are to stay ``whole``, left out. Of n documents, ``eval_fraction·n``
    (rounded, at least one, never all) are held out; of a single document that may be cut, its last tokens in that
    proportion. Documents with the same key (the same text, or a pair) are held out together. ``eval_fraction`` 0 holds
    out nothing.

    Args:
        lengths: [n] int64, tokens of each document.
        keys: [n] uint64, :func:`document_key` of each.
    """
    order = np.argsort(keys, kind="stable")
    stops = lengths
    if max_tokens is not None:
        upto = np.cumsum(lengths[order])
        if whole:
            order = order[: _between_keys(keys, order, int(np.searchsorted(upto, max_tokens, side="right")))[0]]
        else:
            before = upto - lengths[order]
            stops = lengths.copy()
            stops[order] = np.clip(max_tokens - before, 0, stops[order])
            order = order[before < max_tokens]

    if len(order) == 1 and not whole:
        held = _held_out(eval_fraction, int(stops[order[0]]))
        cut = stops[order] - held
        return Portion(order, np.zeros_like(cut), cut), Portion(order[: min(held, 1)], cut[:held], stops[order[:held]])
    count = _held_out(eval_fraction, len(order))
    fewer, more = _between_keys(keys, order, count)
    count = more if more < len(order) else fewer
    train, evaluation = (np.sort(part) for part in (order[count:], order[:count]))
    return _whole(train, stops), _whole(evaluation, stops)


def _whole(documents: np.ndarray, stops: np.ndarray) -> Portion:
    return Portion(documents, np.zeros(len(documents), np.int64), stops[documents])


def _between_keys(keys: np.ndarray, order: np.ndarray, count: int) -> tuple[int, int]:
    """Return the numbers nearest to ``count``, at most and at least, that part no documents with the same key."""
    fewer = more = count
    if 0 < count < len(order) and keys[order[count]] == keys[order[count - 1]]:
        while more < len(order) and keys[order[more]] == keys[order[count]]:
            more += 1
        while fewer > 0 and keys[order[fewer - 1]] == keys[order[count]]:
            fewer -= 1
    return fewer, more


def _held_out(eval_fraction: float, count: int) -> int:
    """How many of ``count`` are held out: the rounded fraction, at least one, never all; none of fewer than two."""
    if eval_fraction == 0 or count < 2:
        return 0
    return min(max(math.floor(eval_fraction * count + 0.5), 1), count - 1)
