"""Texts that a model wrote at each strength, after the beginnings of documents that it was not trained on.

What is measured on them:

* repetition of a text of n tokens: 1 − (different 4-grams) / (n − 3), the share of its 4-grams that it had before;
* EOS rate: the share of texts that the model ended by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cadapter.training.continuations import Continuations
from cadapter.training.scores import standard_error
from cadapter.training.writing import Text

GRAM = 4


@dataclass(frozen=True)
class Sample:
    """One text at one strength; ``tokens`` without the one that ended it. ``repetition`` is NaN for fewer than four."""

    text: str
    tokens: int
    ended: bool
    repetition: float


@dataclass(frozen=True)
class Sampled:
    """What was written.

    Attributes:
        prompts: the text of each prompt, with its dataset and class.
        samples: by strength, one for each prompt.
        new_tokens: how many tokens were written at most.
        temperature: at which they were drawn; 0: each is the most probable one.
        documents_repetition: repetition of as many tokens of the documents themselves, for comparison.
    """

    prompts: list[tuple[str, str, int]]
    samples: dict[float, list[Sample]]
    new_tokens: int
    temperature: float
    documents_repetition: float

    def repetition(self, strength: float) -> tuple[float, float]:
        """Mean over texts and its standard error."""
        values = np.array([sample.repetition for sample in self.samples[strength]])
        values = values[~np.isnan(values)]
        return (float(values.mean()) if len(values) else float("nan")), standard_error(values)

    def eos_rate(self, strength: float) -> float:
        """Share of texts that the model ended."""
        return float(np.mean([sample.ended for sample in self.samples[strength]]))


def repetition(ids: Sequence[int]) -> float:
    """Return the share of 4-grams of ``ids`` that occurred before in it; NaN where there is none."""
    grams = [tuple(ids[at : at + GRAM]) for at in range(len(ids) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else float("nan")


def sampled(continued: Continuations, tokenizer: Any) -> Sampled:
    """Measure what was written, and turn token ids into words with the fast ``tokenizer``."""
    most = continued.drawing.max_new_tokens
    own = np.array([repetition(prompt.following[:most]) for prompt in continued.prompts])
    return Sampled(
        prompts=[
            (tokenizer.decode(prompt.ids, skip_special_tokens=True), prompt.dataset, prompt.control_class)
            for prompt in continued.prompts
        ],
        samples={t: [_sample(tokenizer, text) for text in texts] for t, texts in continued.written.items()},
        new_tokens=most,
        temperature=continued.drawing.temperature,
        documents_repetition=float(own[~np.isnan(own)].mean()) if not np.isnan(own).all() else float("nan"),
    )


def _sample(tokenizer: Any, text: Text) -> Sample:
    own = text.written[:-1] if text.ended else text.written
    words = tokenizer.decode(text.written, skip_special_tokens=True)
    return Sample(words, len(own), text.ended, repetition(own))
