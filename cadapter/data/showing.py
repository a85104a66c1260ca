"""Packed sequences made visible: what the model will see, of which class, and what of it is trained.

On a terminal with colours, trained text has its class's colour and the rest is dim; elsewhere the rest stands within
‹ ›. Special tokens are spelled out, bold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cadapter.classes import NEGATIVE, NEUTRAL, NO_CLASS, POSITIVE
from cadapter.data.packing import BOUNDARY, DOCUMENT_START, TRAINED
from cadapter.terminal import console

if TYPE_CHECKING:
    from rich.text import Text

    from cadapter.data.preparing import PreparedData

LABELS = {POSITIVE: "+1", NEGATIVE: "−1", NEUTRAL: "0"}
COLOURS = {POSITIVE: "green", NEGATIVE: "red", NEUTRAL: "bright_blue", NO_CLASS: ""}
_CONTROL_CHARACTERS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}


def show_sequences(data: PreparedData, count: int) -> None:
    """Print ``count`` training sequences, spread evenly over all of them."""
    from rich.text import Text

    screen = console()
    marks = screen.color_system is None
    screen.print()
    screen.print(_legend(marks), soft_wrap=True)
    for index in np.unique(np.linspace(0, len(data.train) - 1, min(count, len(data.train))).astype(int)):
        tokens, length = int(data.train.tokens[index]), data.train.sequence_len
        positive, negative, neutral = data.train.counts[index].tolist()
        title = f"\nSequence {index + 1:,} of {len(data.train):,}: {tokens:,} tokens, {positive + negative:,} trained"
        title += f", {neutral:,} neutral" if neutral else ""
        title += f", {length - tokens:,} of padding" if tokens < length else ""
        screen.print(Text(title, "bold"), soft_wrap=True)
        screen.print(render(data, int(index), marks), soft_wrap=True)
    screen.print()


def _legend(marks: bool) -> Text:
    from rich.text import Text

    legend = Text()
    for class_, label in LABELS.items():
        legend.append(f"[{label}]", _label_style(class_))
        legend.append(" ")
    legend.append("class, at the start of every document (…: goes on from the sequence before).", "dim")
    legend.append(" ‹not trained›" if marks else " not trained", "dim")
    legend.append(" ")
    legend.append("special token", "bold")
    return legend


def _label_style(class_: int) -> str:
    return f"bold reverse {COLOURS[class_]}"


def render(data: PreparedData, index: int, marks: bool = True) -> Text:
    """Return training sequence ``index`` as text: a line for each document, untrained tokens dim.

    ``marks``: untrained tokens stand within ‹ › too.
    """
    from rich.text import Text

    tokens = int(data.train.tokens[index])
    ids, classes, flags = (part[0, :tokens] for part in data.train.gather([index]))
    starts, special = (flags & DOCUMENT_START) != 0, np.isin(ids, data.tokenizer.special_ids)
    trained = (((flags & TRAINED) != 0) | (classes == NEUTRAL)) & ((flags & BOUNDARY) == 0)
    trained[0] = False  # the first token of a sequence is never predicted

    kind = np.stack([classes, trained, special], axis=1)
    begins = np.flatnonzero(np.r_[True, (kind[1:] != kind[:-1]).any(axis=1) | starts[1:]])
    # A character may be spread over several tokens: what is shown is cut at whole ones only.
    pieces = data.tokenizer.decode_pieces(ids, begins)
    text = Text()
    current: int | None = None
    is_open = False  # within ‹ ›
    for begin, piece in zip(begins, pieces, strict=True):
        class_ = int(classes[begin])
        new = class_ != NO_CLASS and (starts[begin] or class_ != current)
        if is_open and (new or trained[begin]):
            text.append("›", "dim")
            is_open = False
        if new:
            text.append("\n" if text else "")
            text.append(f"[{LABELS[class_]}]", _label_style(class_))
            text.append(" " if starts[begin] else "… ")
            current = class_
        if marks and not trained[begin] and not is_open:
            text.append("‹", "dim")
            is_open = True
        style = COLOURS[class_] if trained[begin] else "dim"
        text.append(piece.translate(_CONTROL_CHARACTERS), f"bold {style}" if special[begin] else style)
    if is_open:
        text.append("›", "dim")
    return text
