"""What can be said of the documents of all datasets together: their lengths, and texts that occur more than once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

_AT_ONCE = 1 << 20


def histogram(lengths: np.ndarray) -> list[int]:
    """Return how many of ``lengths`` [n] lie between 2^(k-1) and 2^k - 1, for k = 0, 1, … up to the longest."""
    bounds = 1 << np.arange(64, dtype=np.uint64)  # of k = 0: below 1
    counts = np.zeros(65, np.int64)
    for low in range(0, len(lengths), _AT_ONCE):
        part = lengths[low : low + _AT_ONCE].astype(np.uint64)
        counts += np.bincount(np.searchsorted(bounds, part, side="right"), minlength=65)
    return counts[: int(np.max(np.flatnonzero(counts), initial=-1)) + 1].tolist()


@dataclass(frozen=True)
class Repeats:
    """Texts that occur more than once, exactly, and how many of them do so where they should not.

    Attributes:
        texts: different texts that occur more than once; ``documents``: documents that repeat an earlier one.
        across_classes: texts that occur in more than one class.
        across_halves: texts that are trained on and held out.
        keys_across_classes: the keys of those in more than one class, sorted.
    """

    texts: int
    documents: int
    across_classes: int
    across_halves: int
    keys_across_classes: np.ndarray


def count_repeats(parts: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Repeats:
    """Count repeated texts among the documents of ``parts``, each (key of its text, class, whether it is held out).

    Documents with the same key (64 bits) are taken for equal: of a billion different texts, some 0.03 pairs would be.
    """
    keys, classes, held = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    order = np.argsort(keys, kind="stable")
    keys, classes, held = keys[order], classes[order], held[order].view(np.uint8)
    first = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]][: len(keys)])
    counts = np.diff(np.r_[first, len(keys)])

    def varies(values: np.ndarray) -> np.ndarray:
        if not len(values):
            return np.zeros(0, bool)
        return np.minimum.reduceat(values, first) != np.maximum.reduceat(values, first)

    across = varies(classes)
    return Repeats(
        texts=int((counts > 1).sum()),
        documents=int((counts - 1).sum()),
        across_classes=int(across.sum()),
        across_halves=int(varies(held).sum()),
        keys_across_classes=keys[first][across],
    )
