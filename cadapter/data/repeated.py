"""Where texts stand that occur in more than one class: what the cache knows by keys alone, found in the files again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np

from cadapter.data.records import documents_of
from cadapter.data.sources import read_records
from cadapter.data.splitting import document_key
from cadapter.data.store import Dataset
from cadapter.data.tokenising import Tokenizer
from cadapter.errors import UsageError
from cadapter.terminal import progress

SHOWN = 5
_PLACES = 4
_CHARACTERS = 60


def places_of(
    keys: np.ndarray, datasets: Sequence[Dataset], tokenizer: Tokenizer, seed: int
) -> list[tuple[str, list[str]]]:
    """Return the first texts with these keys, shortened, each with its first places: "FILE, line 3 (+1)".

    Files are read from the beginning until of five texts places of two classes are known.

    Args:
        keys: of texts that occur in more than one class, sorted.
        seed: of the run, which the keys depend on.
    """
    found: dict[int, tuple[str, list[tuple[str, int]]]] = {}
    with progress("Looking for texts in several classes", unit="documents") as advance:
        for text, class_, where in _documents(datasets, tokenizer):
            advance()
            key = document_key(seed, text)
            if key not in found:
                at = int(np.searchsorted(keys, np.uint64(key)))
                if len(found) == SHOWN or at == len(keys) or int(keys[at]) != key:
                    continue
                found[key] = text, []
            found[key][1].append((where, class_))
            enough = len(found) == min(SHOWN, len(keys))
            if enough and all(len({class_ for _, class_ in places}) > 1 for _, places in found.values()):
                break
    return [(_shortened(text), _in_words(places)) for text, places in found.values()]


def _documents(datasets: Sequence[Dataset], tokenizer: Tokenizer) -> Iterator[tuple[str, int, str]]:
    """Text, class and place of every document; records that cannot be used are passed over."""
    for dataset in datasets:
        fields = dataset.fields
        for record in read_records(dataset.files, fields.needed, fields.optional, lambda error: None):
            with contextlib.suppress(UsageError):
                for document in documents_of(record, fields, dataset.control_class, tokenizer.render_chat):
                    yield document.text, document.control_class, document.where


def _shortened(text: str) -> str:
    words = " ".join(text.split())
    return repr(words if len(words) <= _CHARACTERS else f"{words[:_CHARACTERS]} …")


def _in_words(places: Sequence[tuple[str, int]]) -> list[str]:
    """The first places, of each class the first one among them."""
    first_of_each = {place[1]: place for place in reversed(places)}.values()
    chosen = list(dict.fromkeys([*sorted(first_of_each, key=places.index), *places]))[:_PLACES]
    more = [f"and {len(places) - len(chosen)} more"] if len(places) > len(chosen) else []
    return [*(f"{where} ({class_:+d})" if class_ else f"{where} (0)" for where, class_ in chosen), *more]
