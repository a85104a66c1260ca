"""Lengths and repeated texts, against plain counting."""

from __future__ import annotations

import random
from collections import Counter, defaultdict

import numpy as np
import pytest

from cadapter.data.statistics import count_repeats, histogram


def test_histogram() -> None:
    lengths = [1, 1, 2, 3, 4, 7, 8, 1023, 1024, 4096]
    counts = histogram(np.array(lengths))
    assert counts == [0, 2, 2, 2, 1, 0, 0, 0, 0, 0, 1, 1, 0, 1]
    expected = Counter(length.bit_length() for length in lengths)
    assert counts == [expected[k] for k in range(14)]
    assert histogram(np.zeros(0, np.int64)) == []


@pytest.mark.parametrize("seed", range(20))
def test_repeats(seed: int) -> None:
    rng = random.Random(seed)
    documents = [(rng.randrange(30), rng.choice([1, -1]), rng.random() < 0.2) for _ in range(rng.randrange(1, 60))]
    cut = rng.randrange(len(documents) + 1)
    parts = [
        tuple(np.array(column, type_) for column, type_ in zip(zip(*part, strict=True), types, strict=True))
        for part in (documents[:cut], documents[cut:])
        if part
        for types in [(np.uint64, np.int8, bool)]
    ]
    found = count_repeats(parts)
    by_text = defaultdict(list)
    for text, class_, held in documents:
        by_text[text].append((class_, held))
    repeated = [each for each in by_text.values() if len(each) > 1]
    assert found.texts == len(repeated)
    assert found.documents == len(documents) - len(by_text)
    assert found.across_classes == sum(len({class_ for class_, _ in each}) > 1 for each in repeated)
    assert found.across_halves == sum(len({held for _, held in each}) > 1 for each in repeated)
