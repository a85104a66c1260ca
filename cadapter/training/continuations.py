"""Beginnings of scored documents, continued at each strength by the pipeline that scored them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np

from cadapter.data import HeldOutDocument
from cadapter.models.generation import end_tokens_of
from cadapter.training.subjects import Subject
from cadapter.training.writing import Drawing, Text, Writer

PROMPT_TOKENS = 24
"""How much of a document is given, its prefix included."""


@dataclass(frozen=True)
class Prompt:
    """The beginning of a document: ``ids`` [P]; ``following`` is what the document goes on with."""

    dataset: str
    control_class: int
    ids: np.ndarray
    following: list[int]


@dataclass(frozen=True)
class Continuations:
    """What was written.

    Attributes:
        prompts: after which.
        written: by strength, a text for each prompt.
        drawing: how.
    """

    prompts: list[Prompt]
    written: dict[float, list[Text]]
    drawing: Drawing


def prompts_of(documents: Sequence[HeldOutDocument], count: int) -> list[Prompt]:
    """Return the beginnings of ``count`` documents, from all datasets in turn; all have the same number of tokens."""
    length = PROMPT_TOKENS
    if not any(len(document.ids) > length for document in documents):
        length = max(1, max(len(document.ids) for document in documents) // 2)
    groups: dict[tuple[str, int], list[HeldOutDocument]] = {}
    for document in documents:
        if len(document.ids) > length:
            groups.setdefault((document.dataset, document.control_class), []).append(document)
    in_turn = [document for turn in zip_longest(*groups.values()) for document in turn if document is not None]
    return [
        Prompt(each.dataset, each.control_class, each.ids[:length], each.ids[length:].tolist())
        for each in in_turn[:count]
    ]


def continuations(
    prompts: list[Prompt],
    subject: Subject,
    tokenizer: Any,
    writer: Writer,
    drawing: Drawing,
    advance: Callable[[int], None],
) -> Continuations:
    """Let ``subject``, whose pipeline ``writer`` writes through, go on from ``prompts`` at each of its strengths.

    Every strength draws from the same random numbers. Every process calls this, and has the texts afterwards.
    """
    texts = {}
    for code, strength in enumerate(subject.strengths):
        model = subject.model_at(code)
        ends = frozenset(end_tokens_of(model.checkpoint.directory, model.config, tokenizer))
        texts[strength] = [Text(number, code, prompt.ids.tolist(), ends) for number, prompt in enumerate(prompts)]
    writer.write([text for each in texts.values() for text in each], drawing, advance)
    return Continuations(prompts, dict(sorted(texts.items())), drawing)
