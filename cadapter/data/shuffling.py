"""Reproducible random orders."""

from __future__ import annotations

import hashlib

import numpy as np


def shuffled(count: int, *key: object) -> np.ndarray:
    """Return a permutation [count] int64 that is a function of ``key`` (numbers and strings) alone.

    It sorts the raw output of a Philox generator, which numpy keeps the same in all versions, while those of
    ``Generator.permutation`` may differ from one version to the next.
    """
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    bits = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    return np.argsort(bits.random_raw(count), kind="stable").astype(np.int64)
