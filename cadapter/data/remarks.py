"""What in prepared data is hardly meant: texts on both sides of something, classes that are trained or scored alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cadapter.classes import NEGATIVE, POSITIVE
from cadapter.config import Config
from cadapter.data import arrow
from cadapter.data.cache import TEXTS
from cadapter.data.preparing import PreparedData, datasets_of
from cadapter.data.repeated import places_of
from cadapter.data.statistics import Repeats, count_repeats

Fingerprints = tuple[np.ndarray, np.ndarray, np.ndarray]


def repeats_of(data: PreparedData) -> Repeats:
    """Count texts that occur more than once among all documents of ``data``."""
    return count_repeats(_whole_documents(data))


def data_warnings(data: PreparedData, config: Config, repeats: Repeats, with_places: bool = False) -> list[str]:
    """What a user must hear before training on ``data``.

    Args:
        repeats: :func:`repeats_of` ``data``.
        with_places: say where texts of several classes stand, for which files are read again.
    """
    found = []
    if repeats.across_classes:
        found.append(_across_classes(data, config, repeats, with_places))
    positive, negative, _ = data.train.trained
    if negative and not positive:
        found.append(
            "No trained token is of class +1: no text says what class +1, the adapter as it is, should be.\n"
            "Give a dataset with control_class = 1, too."
        )
    return [*found, *held_out_warnings(data, repeats)]


def held_out_warnings(data: PreparedData, repeats: Repeats | None = None) -> list[str]:
    """What a user must hear before believing an evaluation on what ``data`` holds out."""
    found = []
    halves = (repeats or repeats_of(data)).across_halves
    if halves:
        found.append(f"{texts_occur(halves)} both in training and in evaluation, which will look better than it is.")
    if data.evaluation is None:
        return found
    classes, held = (np.concatenate(parts) for parts in zip(*(part[1:] for part in _documents(data)), strict=True))
    for one, other in ((POSITIVE, NEGATIVE), (NEGATIVE, POSITIVE)):
        own = classes == one
        if own.any() and not held[own].any():
            rest = f", and best/ rests on class {_signed(other)} alone" if held[classes == other].any() else ""
            found.append(
                f"No document of class {_signed(one)} is held out for evaluation: that class has no evaluation loss, "
                f"there is no contrast{rest}.\n"
                "Raise eval_fraction, or give each class a dataset of its own."
            )
    return found


def texts_occur(count: int) -> str:
    """How many texts there are of which something is said."""
    return f"{count:,} {'text occurs' if count == 1 else 'texts occur'}"


def _signed(class_: int) -> str:
    return "+1" if class_ == POSITIVE else "−1"


def _across_classes(data: PreparedData, config: Config, repeats: Repeats, with_places: bool) -> str:
    heading = f"{texts_occur(repeats.across_classes)} in more than one class, which cancel each other out."
    if not with_places:
        return f"{heading}\ncadapter prepare shows where."
    shown = places_of(repeats.keys_across_classes, datasets_of(config), data.tokenizer, config.seed)
    more = repeats.across_classes - len(shown)
    lines = [f"{text}: {'; '.join(places)}" for text, places in shown]
    return "\n".join([heading, *lines, *([f"and {more:,} more"] if more > 0 else [])])


def _documents(data: PreparedData) -> Iterator[Fingerprints]:
    """Of each stream: (key of its text, class, whether it is held out) of every document, those trained on first."""
    for directory in data.directories:
        yield arrow.read_fingerprints(directory / TEXTS)


def _whole_documents(data: PreparedData) -> Iterator[Fingerprints]:
    """:func:`_documents`, where the held-out end of a dataset's only document is no second document."""
    mixed = len(data.directories) < len(data.reports)
    streams = [data.reports] if mixed else [[report] for report in data.reports]
    for reports, (keys, classes, held) in zip(streams, _documents(data), strict=True):
        counts = [report.documents for report in reports] + [report.eval_documents for report in reports]
        first = np.cumsum([0, *counts])
        kept = np.ones(len(keys), bool)
        for number, report in enumerate(reports):
            if report.documents == report.eval_documents == 1:
                beginning, end = first[number], first[number + len(reports)]
                kept[end] = keys[beginning] != keys[end]
        yield keys[kept], classes[kept], held[kept]
