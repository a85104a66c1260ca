"""Packed sequences made visible: what the model will see, of which class, and what of it is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cadapter.classes import NEGATIVE, NEUTRAL, NO_CLASS, POSITIVE
from cadapter.terminal import console

if TYPE_CHECKING:
    from rich.text import Text

    from cadapter.data.preparing import PreparedData

_LABELS = {POSITIVE: "[+1]", NEGATIVE: "[−1]", NEUTRAL: "[0]"}
_COLOURS = {POSITIVE: "green", NEGATIVE: "red", NEUTRAL: "blue", NO_CLASS: ""}
_CONTROL_CHARACTERS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}

_LEGEND = (
    "[+1] [−1] [0]: class, at the start of every document (…: goes on from the sequence before). "
    "‹ ›: tokens that are not trained."
)


def show_sequences(data: PreparedData, count: int) -> None:
    """Print ``count`` training sequences, spread evenly over all of them."""
    from rich.text import Text

    screen = console()
    screen.print(Text(_LEGEND, "dim"), soft_wrap=True)
    for index in np.unique(np.linspace(0, len(data.train) - 1, min(count, len(data.train))).astype(int)):
        tokens, length = int(data.train.tokens[index]), data.train.sequence_len
        positive, negative, neutral = data.train.counts[index].tolist()
        title = f"\nSequence {index + 1:,} of {len(data.train):,}: {tokens:,} tokens, {positive + negative:,} trained"
        title += f", {neutral:,} neutral" if neutral else ""
        title += f", {length - tokens:,} of padding" if tokens < length else ""
        screen.print(Text(title, "bold"), soft_wrap=True)
        screen.print(render(data, int(index)), soft_wrap=True)


def render(data: PreparedData, index: int) -> Text:
    """Return training sequence ``index`` as text: a line for each document, untrained tokens within ‹ ›."""
    from rich.text import Text

    tokens = int(data.train.tokens[index])
    ids, classes, trained = (part[0, :tokens] for part in data.train.rows([index]))
    starts = data.train.document_starts([index])[0, :tokens]
    trained = trained | (classes == NEUTRAL)
    trained[0] = False  # the first token of a sequence is never predicted
    special = np.isin(ids, data.tokenizer.special_ids)

    kind = np.stack([classes, trained, special], axis=1)
    begins = np.flatnonzero(np.r_[True, (kind[1:] != kind[:-1]).any(axis=1) | starts[1:]])
    text = Text()
    current: int | None = None
    for begin, end in zip(begins, [*begins[1:], tokens], strict=True):
        class_ = int(classes[begin])
        if class_ != NO_CLASS and (starts[begin] or class_ != current):
            mark = _LABELS[class_] + (" " if starts[begin] else "… ")
            text.append(f"\n{mark}" if text else mark, f"bold {_COLOURS[class_]}")
            current = class_
        shown = data.tokenizer.decode(ids[begin:end]).translate(_CONTROL_CHARACTERS)
        style = _COLOURS[class_] if trained[begin] else "dim"
        text.append(shown if trained[begin] else f"‹{shown}›", f"bold {style}" if special[begin] else style)
    return text
