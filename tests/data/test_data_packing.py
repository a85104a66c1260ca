"""Packing against a reference that goes token by token."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields

import numpy as np
import pytest

from cadapter.classes import NO_CLASS
from cadapter.data.packing import DOCUMENT_START, TRAINED, Layout, Pieces, Read, SequenceBlock, in_a_row, pack

EOS = 2


@dataclass
class Case:
    """Documents as lists of ids, with what the packing of them depends on."""

    documents: list[list[int]]
    classes: list[int]
    drop_tails: list[bool]
    layout: Layout
    drop_last: bool
    masked: tuple[int, ...] = ()


def random_case(seed: int) -> Case:
    rng = random.Random(seed)
    prefix = rng.choice([(), (1,), (1, 3)])
    count = rng.randrange(1, 12)
    documents = []
    for _ in range(count):
        ids = [rng.randrange(2, 9) for _ in range(rng.choice([1, 2, 5, 9, 10, 30, 61]))]
        documents.append([*prefix, *ids] if rng.random() < 0.4 else ids)
    pad = rng.choice([0, EOS])  # pad = EOS must hide no EOS
    masked = rng.choice([(), (3,), (2, 5)])
    drop_tails = [rng.random() < 0.5] * count if rng.random() < 0.7 else [rng.random() < 0.5 for _ in range(count)]
    layout = Layout(rng.choice([8, 11]), prefix, pad)
    classes = [rng.choice([1, -1, 0]) for _ in range(count)]
    return Case(documents, classes, drop_tails, layout, rng.random() < 0.5, masked)


def reader(tokens: np.ndarray, trained: np.ndarray) -> Read:
    """Reads from arrays in memory."""

    def read(starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        parts = [slice(start, stop) for start, stop in zip(starts, stops, strict=True)]
        return tuple(np.concatenate([array[:0], *(array[part] for part in parts)]) for array in (tokens, trained))

    return read


def packed(case: Case) -> SequenceBlock:
    """The sequences that the package makes of ``case``, in one block; before them the store has other tokens."""
    lengths = np.array([len(document) for document in case.documents])
    tokens = np.array([7, 7, 7, *(id_ for document in case.documents for id_ in document)], np.int32)
    stops = 3 + np.cumsum(lengths)
    prefix = list(case.layout.prefix)
    repeats = np.array([bool(prefix) and document[: len(prefix)] == prefix for document in case.documents])
    classes = np.array(case.classes, np.int8)
    pieces = Pieces(stops - lengths, stops, classes, np.zeros(len(lengths), np.int16), repeats)
    placement = in_a_row(pieces, case.layout, np.array(case.drop_tails))
    read = reader(tokens, ~np.isin(tokens, case.masked))
    return joined(list(pack(placement, read, case.layout, case.drop_last)), case.layout.sequence_len)


def joined(blocks: list[SequenceBlock], length: int) -> SequenceBlock:
    if not blocks:
        shapes = [(0, length)] * 3 + [(0, 3), (0,)]
        return SequenceBlock(*(np.zeros(shape) for shape in shapes))
    return SequenceBlock(
        *(np.concatenate([getattr(block, field.name) for block in blocks]) for field in fields(blocks[0]))
    )


Token = tuple[int, int, bool, bool]  # id, class, trained, first of its document


def naive_pack(case: Case) -> list[list[Token]]:
    """The sequences of ``case`` without padding, filled one token at a time."""
    length, prefix = case.layout.sequence_len, case.layout.prefix
    opening = [(id_, NO_CLASS, False, False) for id_ in prefix]
    sequences: list[list[Token]] = []
    current = list(opening)
    for document, class_, drop in zip(case.documents, case.classes, case.drop_tails, strict=True):
        rest = list(document)
        if current == opening and prefix and tuple(rest[: len(prefix)]) == prefix:
            rest = rest[len(prefix) :]
        first, was_cut = True, False
        while rest:
            if drop and was_cut and current == opening and len(rest) < length - len(prefix):
                break
            id_ = rest.pop(0)
            current.append((id_, class_, id_ not in case.masked, first))
            first = False
            if len(current) == length:
                sequences.append(current)
                current = list(opening)
                was_cut = True
    if current != opening and not case.drop_last:
        sequences.append(current)
    return sequences


@pytest.mark.parametrize("seed", range(150))
def test_against_the_naive_reference(seed: int) -> None:
    case = random_case(seed)
    block, expected = packed(case), naive_pack(case)
    length = case.layout.sequence_len
    assert len(block) == len(expected)
    for row, sequence in enumerate(expected):
        padded = sequence + [(case.layout.pad_id, NO_CLASS, False, False)] * (length - len(sequence))
        assert block.ids[row].tolist() == [token[0] for token in padded]
        assert block.classes[row].tolist() == [token[1] for token in padded]
        assert ((block.flags[row] & TRAINED) != 0).tolist() == [token[2] for token in padded]
        assert ((block.flags[row] & DOCUMENT_START) != 0).tolist() == [token[3] for token in padded]
        assert block.tokens[row] == len(sequence)
        counts = {1: 0, -1: 0, 0: 0}
        for _, class_, trained, _ in padded[1:]:  # position t counts for what token t + 1 is
            if class_ != NO_CLASS and (trained or class_ == 0):
                counts[class_] += 1
        assert block.counts[row].tolist() == list(counts.values())


def test_the_reference_cases_cover_what_they_should() -> None:
    cases = [random_case(seed) for seed in range(150)]
    results = [packed(case) for case in cases]
    assert any(len(block) == 0 for block in results)
    assert sum(len(block) for block in results) > 500
    padded = [(block.tokens < case.layout.sequence_len).any() for case, block in zip(cases, results, strict=True)]
    assert any(case.layout.pad_id == EOS and has_padding for case, has_padding in zip(cases, padded, strict=True))


def test_types_and_shapes() -> None:
    block = packed(random_case(1))
    assert [getattr(block, field.name).dtype for field in fields(block)] == [
        np.int32,
        np.int8,
        np.uint8,
        np.int32,
        np.int32,
    ]
    assert block.ids.shape == block.classes.shape == block.flags.shape


def test_pad_equal_to_eos_hides_no_eos() -> None:
    case = Case([[5, 6, EOS], [5, EOS]], [1, -1], [False, False], Layout(8, (), EOS), False)
    block = packed(case)
    assert block.ids.tolist() == [[5, 6, EOS, 5, EOS, EOS, EOS, EOS]]
    assert (block.flags & TRAINED).tolist() == [[1, 1, 1, 1, 1, 0, 0, 0]]
    assert block.classes.tolist() == [[1, 1, 1, -1, -1, NO_CLASS, NO_CLASS, NO_CLASS]]
    assert block.counts.tolist() == [[2, 2, 0]]  # the first token of all is never predicted


def test_drop_tails_by_hand() -> None:
    """Sequences of four: a document of 3 + one of 10 → [a a a b] [b b b b] [b b b b], one b left out, then c."""
    case = Case([[3] * 3, [4] * 10, [5] * 4, [6] * 2], [1] * 4, [True] * 4, Layout(4, (), 0), True)
    assert packed(case).ids.tolist() == [[3, 3, 3, 4], [4] * 4, [4] * 4, [5] * 4]
    case.drop_tails, case.drop_last = [False] * 4, False
    assert packed(case).ids.tolist() == [[3, 3, 3, 4], [4] * 4, [4] * 4, [4, 5, 5, 5], [5, 6, 6, 0]]


def test_every_sequence_starts_or_continues_a_document_with_drop_tails() -> None:
    rng = random.Random(0)
    # Each document has an id of its own, so that a sequence that began with a tail would show.
    documents = [[10 + number] * rng.randrange(1, 40) for number in range(200)]
    block = packed(Case(documents, [1] * 200, [True] * 200, Layout(16, (1,), 0), True))
    for previous, row in zip(block.ids[:-1], range(1, len(block)), strict=True):
        if not block.flags[row, 1] & DOCUMENT_START:
            assert (block.ids[row, 1:] == previous[-1]).all()


def test_blocks_do_not_change_the_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(5)
    whole = packed(case)
    monkeypatch.setattr("cadapter.data.packing._TOKENS_PER_BLOCK", 3 * case.layout.sequence_len)
    for field in fields(whole):
        assert np.array_equal(getattr(packed(case), field.name), getattr(whole, field.name))
    assert len(whole) > 3
