"""Which documents of a dataset are trained on, and which are held out for evaluation.

Every document has a key, a hash of (seed, its text). In the order of the keys, which is as good as random and does
not depend on file names or on the other documents, the first ones are held out: the same text falls on the same
side in every dataset, and a file that grows keeps most of its split.
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
        lengths: [n] tokens of each document.
        keys: [n] uint64, :func:`document_key` of each.
    """
    order = np.argsort(keys, kind="stable")
    stops = lengths.astype(np.int64)
    if max_tokens is not None:
        upto = np.cumsum(stops[order])
        if whole:
            order = order[: _between_keys(keys[order], int(np.searchsorted(upto, max_tokens, side="right")))]
        else:
            before = upto - stops[order]
            stops[order] = np.clip(max_tokens - before, 0, stops[order])
            order = order[before < max_tokens]
    starts = np.zeros_like(stops)

    def portion(documents: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> Portion:
        documents = np.sort(documents)
        return Portion(documents, starts[documents], stops[documents])

    if len(order) == 1 and not whole:
        cut = stops - _held_out(eval_fraction, int(stops[order[0]]))
        held = order if cut[order[0]] < stops[order[0]] else order[:0]
        return portion(order, starts, cut), portion(held, cut, stops)
    count = _held_out(eval_fraction, len(order))
    own = keys[order]
    if 0 < count < len(own) and own[count] == own[count - 1]:
        after = int(np.searchsorted(own, own[count], side="right"))
        count = after if after < len(own) else _between_keys(own, count)
    return portion(order[count:], starts, stops), portion(order[:count], starts, stops)


def _between_keys(keys: np.ndarray, count: int) -> int:
    """Return ``count``, or, where a key stands on both sides of it, how many come before that key."""
    return int(np.searchsorted(keys, keys[count])) if 0 < count < len(keys) else count


def _held_out(eval_fraction: float, count: int) -> int:
    """How many of ``count`` are held out: the rounded fraction, at least one, never all; none of fewer than two."""
    if eval_fraction == 0 or count < 2:
        return 0
    return min(max(math.floor(eval_fraction * count + 0.5), 1), count - 1)
