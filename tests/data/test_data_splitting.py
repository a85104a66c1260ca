"""What is held out: how many, which, and that it depends on the seed and the texts only."""

from __future__ import annotations

import numpy as np
import pytest

from cadapter.data.splitting import document_key, split_documents


def keys_of(texts: list[str], seed: int = 42) -> np.ndarray:
    return np.array([document_key(seed, text) for text in texts], np.uint64)


def split(count: int, fraction: float, seed: int = 42, max_tokens: int | None = None) -> tuple:
    lengths = np.array([10 + number % 7 for number in range(count)])
    return split_documents(lengths, keys_of([f"text {number}" for number in range(count)], seed), fraction, max_tokens)


@pytest.mark.parametrize(
    ("count", "fraction", "held"),
    [
        (2, 0.01, 1),
        (100, 0.01, 1),
        (149, 0.01, 1),
        (150, 0.01, 2),
        (10, 0.25, 3),
        (2, 0.99, 1),
        (50, 0.99, 49),
        (9, 0, 0),
    ],
)
def test_how_many(count: int, fraction: float, held: int) -> None:
    train, evaluation = split(count, fraction)
    assert len(evaluation.documents) == held
    assert sorted([*train.documents, *evaluation.documents]) == list(range(count))
    assert list(train.documents) == sorted(train.documents)


def test_a_single_document_is_split_by_tokens() -> None:
    train, evaluation = split_documents(np.array([1000]), keys_of(["x"]), 0.1)
    assert (train.starts.tolist(), train.stops.tolist()) == ([0], [900])
    assert (evaluation.starts.tolist(), evaluation.stops.tolist()) == ([900], [1000])
    train, evaluation = split_documents(np.array([1]), keys_of(["x"]), 0.1)
    assert (train.tokens, len(evaluation.documents)) == (1, 0)
    train, evaluation = split_documents(np.array([1000]), keys_of(["x"]), 0)
    assert (train.tokens, len(evaluation.documents)) == (1000, 0)


def test_which_depends_on_the_seed_and_the_text_alone() -> None:
    held = split(200, 0.1)[1].documents
    assert np.array_equal(held, split(200, 0.1)[1].documents)
    assert not np.array_equal(held, split(200, 0.1, seed=43)[1].documents)
    texts = [f"text {number}" for number in range(200)]
    backwards = split_documents(np.full(200, 10), keys_of(texts[::-1]), 0.1)[1].documents
    assert sorted(199 - backwards) == held.tolist()


def test_a_file_that_grows_keeps_its_split() -> None:
    before, after = (set(split(count, 0.1)[1].documents.tolist()) for count in (1000, 1010))
    assert len(before - after) <= 10


def test_the_split_is_even_over_the_file() -> None:
    held = split(10_000, 0.1)[1].documents
    # 1000 draws without replacement in each half of the range: the mean's standard error is some 87
    assert abs(held.mean() - 5000) < 400


@pytest.mark.parametrize("limit", [1, 10, 55, 500, 2598, 2599, 10_000])
def test_max_tokens(limit: int) -> None:
    train, evaluation = split(200, 0.1, max_tokens=limit)
    whole = split(200, 0)[0]
    assert train.tokens + evaluation.tokens == min(limit, whole.tokens)
    cut = [
        document
        for half in (train, evaluation)
        for document, start, stop in zip(half.documents, half.starts, half.stops, strict=True)
        if (start, stop) != (0, 10 + document % 7)
    ]
    assert len(set(cut)) <= 1  # at most one document is cut, or, where it is alone, split


@pytest.mark.parametrize("seed", range(30))
def test_documents_with_one_key_are_held_out_together(seed: int) -> None:
    rng = np.random.default_rng(seed)
    keys = rng.integers(0, 12, 40).astype(np.uint64)
    train, evaluation = split_documents(np.full(40, 10), keys, float(rng.choice([0.02, 0.3, 0.9])))
    assert not set(keys[train.documents].tolist()) & set(keys[evaluation.documents].tolist())
    assert len(train.documents) > 0
    assert len(evaluation.documents) > 0
    assert sorted([*train.documents, *evaluation.documents]) == list(range(40))


def test_one_key_cannot_be_split() -> None:
    train, evaluation = split_documents(np.full(2, 10), np.zeros(2, np.uint64), 0.5)
    assert (len(train.documents), len(evaluation.documents)) == (2, 0)


@pytest.mark.parametrize("limit", [1, 35, 100, 101, 399, 400, 1000])
def test_max_tokens_of_whole_documents(limit: int) -> None:
    """Pairs of 10 and 20 tokens: either both or neither."""
    lengths, keys = np.tile([10, 20], 20), np.repeat(keys_of([f"pair {number}" for number in range(20)]), 2)
    train, evaluation = split_documents(lengths, keys, 0.2, limit, whole=True)
    assert train.tokens + evaluation.tokens == min(limit, 600) // 30 * 30
    assert (train.starts == 0).all()
    assert train.stops.tolist() == lengths[train.documents].tolist()
    assert sorted(keys[train.documents].tolist())[::2] == sorted(keys[train.documents].tolist())[1::2]
