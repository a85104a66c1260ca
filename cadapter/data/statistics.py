"""What can be said of the documents of all datasets together: their lengths, and texts that occur more than once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


def histogram(lengths: np.ndarray) -> list[int]:
    """Return how many of ``lengths`` [n] lie between 2^(k-1) and 2^k - 1, for k = 0, 1, … up to the longest."""
    if not len(lengths):
        return []
    return np.bincount(np.frexp(lengths.astype(np.float64))[1]).tolist()


@dataclass(frozen=True)
class Repeats:
    """Texts that occur more than once, exactly, and how many of them do so where they should not.

    Attributes:
        texts: different texts that occur more than once; ``documents``: documents that repeat an earlier one.
        across_classes: texts that occur in more than one class.
        across_halves: texts that are trained on and held out.
    """

    texts: int
    documents: int
    across_classes: int
    across_halves: int


def count_repeats(parts: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Repeats:
    """Count repeated texts among the documents of ``parts``, each (key of its text, class, whether it is held out).

    Documents with the same key (64 bits) are taken for equal: of a billion different texts, some 0.03 pairs would be.
    """
    keys, classes, held = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    order = np.argsort(keys, kind="stable")
    keys, classes, held = keys[order], classes[order], held[order]
    first = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]]) if len(keys) else np.zeros(0, np.int64)
    counts = np.diff(np.r_[first, len(keys)])
    repeated = first[counts > 1]
    ends = repeated + counts[counts > 1]

    def varies(values: np.ndarray) -> int:
        return sum(bool((values[low:high] != values[low]).any()) for low, high in zip(repeated, ends, strict=True))

    return Repeats(len(repeated), int((counts - 1).sum()), varies(classes), varies(held))
