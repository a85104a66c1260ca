"""Documents that stay whole: each within one sequence, none lost, none twice, and little padding."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest

from cadapter.classes import NO_CLASS
from cadapter.data.fitting import each_in_one
from cadapter.data.packing import DOCUMENT_START, Layout, Pieces, pack
from tests.data.test_data_packing import reader

BOS = 1


def packed_documents(documents: list[list[int]], layout: Layout) -> list[list[list[int]]]:
    """The documents of each sequence, read back from the packed block by its flags."""
    tokens = np.array([7, *(id_ for document in documents for id_ in document)], np.int32)
    stops = 1 + np.cumsum([len(document) for document in documents])
    starts = np.r_[1, stops[:-1]]
    classes = (np.arange(len(documents)) % 3 - 1).astype(np.int8)
    repeats = np.array([bool(layout.prefix) and document[0] == BOS for document in documents])
    pieces = Pieces(starts, stops, classes, np.zeros(len(documents), np.int16), repeats)
    placement = each_in_one(pieces, layout)
    assert placement.split(layout) == 0
    sequences = []
    for block in pack(placement, reader(tokens, np.ones(len(tokens), bool)), layout):
        for ids, flags, own, count in zip(block.ids, block.flags, block.classes, block.tokens, strict=True):
            assert tuple(ids[: len(layout.prefix)]) == layout.prefix
            assert (own[count:] == NO_CLASS).all()
            begins = [*np.flatnonzero(flags & DOCUMENT_START).tolist(), int(count)]
            assert begins[0] == len(layout.prefix)
            sequences.append([ids[a:b].tolist() for a, b in pairwise(begins)])
    assert len(sequences) == placement.sequences(layout)
    return sequences


@pytest.mark.parametrize("seed", range(60))
def test_every_document_is_in_one_sequence_once(seed: int) -> None:
    rng = random.Random(seed)
    layout = Layout(rng.choice([16, 33]), rng.choice([(), (BOS,)]), 0)
    documents = [[100 + number] * rng.randrange(1, layout.capacity + 1) for number in range(rng.randrange(1, 60))]
    sequences = packed_documents(documents, layout)
    assert sorted(document for sequence in sequences for document in sequence) == sorted(documents)
    fullest = [sum(map(len, sequence)) for sequence in sequences]
    assert max(fullest) <= layout.capacity
    least = -(-sum(map(len, documents)) // layout.capacity)
    # First-fit and best-fit decreasing need at most 11/9 of the fewest possible, and 6/9.
    largest_apart = sum(len(document) > layout.capacity / 2 for document in documents)
    assert len(sequences) <= 11 / 9 * max(least, largest_apart) + 6 / 9 + 1


def test_a_document_with_the_prefix_of_its_own() -> None:
    """It loses it where it begins a sequence, and only there, so that one longer by the prefix fits."""
    layout = Layout(8, (BOS,), 0)
    longest = [BOS, *range(10, 17)]
    assert packed_documents([longest], layout) == [[list(range(10, 17))]]
    assert packed_documents([[BOS, 20, 21, 22], [BOS, 30]], layout) == [[[20, 21, 22], [BOS, 30]]]


def test_nothing_to_place() -> None:
    nothing = np.zeros(0, np.int64)
    layout = Layout(8, (), 0)
    pieces = Pieces(nothing, nothing, nothing.astype(np.int8), nothing.astype(np.int16), nothing.astype(bool))
    placement = each_in_one(pieces, layout)
    assert placement.sequences(layout) == 0
    assert list(pack(placement, reader(nothing, nothing), layout)) == []


def test_short_documents_fill_what_long_ones_leave() -> None:
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(4, 1, 2000).astype(int) + 1, 512)
    sequences = packed_documents([[5] * length for length in lengths.tolist()], Layout(512, (), 0))
    assert lengths.sum() / (512 * len(sequences)) > 0.99
