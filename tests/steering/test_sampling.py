"""What is measured on sampled texts, against plain counting."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from cadapter.steering.sampling import repetition, sampled
from cadapter.training.continuations import Continuations, Prompt
from cadapter.training.writing import Drawing, Text
from tests.tiny_tokenizer import make_tokenizer

EOS = 2


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([1, 2, 3, 4, 5, 6], 0.0),
        ([7] * 8, 4 / 5),  # one of five 4-grams is new
        ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5),
        ([1, 2, 3, 4], 0.0),
        ([1, 2, 3], math.nan),
        ([], math.nan),
    ],
)
def test_repetition(ids: list[int], expected: float) -> None:
    assert repetition(ids) == pytest.approx(expected, nan_ok=True)


def test_texts_are_counted_without_the_token_that_ended_them(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    words = tokenizer("over and over", add_special_tokens=False)["input_ids"]
    prompts = [
        Prompt("a", 1, np.array([1, *words], np.int32), words * 3),
        Prompt("b", -1, np.array([1, *words], np.int32), words[:2]),
    ]
    written = {
        0.0: [Text(0, 0, [1], frozenset({EOS}), [*words, EOS], True), Text(1, 0, [1], frozenset({EOS}), words * 2)],
        1.0: [Text(0, 1, [1], frozenset({EOS}), [EOS], True), Text(1, 1, [1], frozenset({EOS}), words[:3])],
    }
    found = sampled(Continuations(prompts, written, Drawing(2 * len(words), 0.7, 0)), tokenizer)
    assert found.prompts == [("over and over", "a", 1), ("over and over", "b", -1)]
    assert (found.new_tokens, found.temperature) == (2 * len(words), 0.7)
    base, turned = found.samples[0.0], found.samples[1.0]
    assert [(each.text, each.tokens, each.ended) for each in base] == [
        ("over and over", len(words), True),
        (tokenizer.decode(words * 2), 2 * len(words), False),
    ]
    assert (turned[0].text, turned[0].tokens, turned[0].ended) == ("", 0, True)
    assert [found.eos_rate(t) for t in (0.0, 1.0)] == [0.5, 0.5]
    assert found.repetition(0.0)[0] == pytest.approx((repetition(words) + repetition(words * 2)) / 2)
    assert math.isnan(found.repetition(1.0)[0])
    # of the documents as many tokens as are written at most; the second has fewer than four
    assert found.documents_repetition == pytest.approx(repetition(words * 2))
