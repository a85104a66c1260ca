"""Work in portions of bounded size: long texts in parts that tokenise like the whole, and lists in groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

LONG = 1 << 17
"""Characters of a part, about; texts up to twice as long are left whole."""
_WINDOW = 512
_TRIES = 32

Item = TypeVar("Item")


def parts_of(text: str, encode: Callable[[str], list[int]]) -> list[str]:
    """Return ``text`` cut into parts whose tokens, one after the other, are those of the whole.

    It is cut before a space between two words, where the neighbourhood tokenised in one piece and in two gives the
    same tokens. A tokenizer for which that holds nowhere gets the whole text.
    """
    if len(text) <= 2 * LONG:
        return [text]
    parts, begin = [], 0
    while len(text) - begin > 2 * LONG:
        cut = _cut(text, begin + LONG, encode)
        if cut is None:
            break
        parts.append(text[begin:cut])
        begin = cut
    return [*parts, text[begin:]]


def _cut(text: str, at: int, encode: Callable[[str], list[int]]) -> int | None:
    """Return a place at or after ``at`` where ``text`` can be cut."""
    for _ in range(_TRIES):
        at = text.find(" ", at)
        if at < 0 or at + 1 == len(text):
            return None
        if text[at - 1].isalnum() and text[at + 1].isalnum():
            before, after = text[max(0, at - _WINDOW) : at], text[at : at + _WINDOW]
            if encode(before) + encode(after) == encode(before + after):
                return at
        at += 1
    return None


def grouped(items: Iterable[Item], size: Callable[[Item], int], limit: int, most: int = 4096) -> Iterator[list[Item]]:
    """Yield ``items`` in groups, each as soon as its sizes add up to ``limit`` or there are ``most`` items."""
    group: list[Item] = []
    total = 0
    for item in items:
        group.append(item)
        total += size(item)
        if total >= limit or len(group) == most:
            yield group
            group, total = [], 0
    if group:
        yield group
