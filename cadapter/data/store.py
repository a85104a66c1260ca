"""The token store: every document of some datasets, tokenised, in one file; short-lived, while a cache is built."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cadapter.data.sources import Document, read_documents
from cadapter.data.splitting import document_key
from cadapter.data.tokenising import Framing, Tokenizer
from cadapter.errors import UsageError

_CHARACTERS_PER_BATCH = 1 << 22
_DOCUMENTS_PER_BATCH = 4096


@dataclass(frozen=True)
class Dataset:
    """One dataset of the config, its files found and its defaults filled in."""

    name: str
    path: str
    files: tuple[Path, ...]
    text_field: str
    control_class: int
    max_tokens: int | None
    max_sequences: int | None
    drop_tails: bool


@dataclass(frozen=True)
class TokenStore:
    """Tokenised documents of several datasets, one after the other.

    Attributes:
        tokens: [T] int32, memory-mapped; document d has ``tokens[offsets[d]:offsets[d + 1]]``.
        offsets: [D + 1] int64.
        keys: [D] uint64, see :func:`~cadapter.data.splitting.document_key`.
        datasets: [D] int16, which dataset each is from.
        classes: [D] int8.
        empty: documents without text, for each dataset; they are not among the D.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    keys: np.ndarray
    datasets: np.ndarray
    classes: np.ndarray
    empty: list[int]


def write_store(
    file: Path,
    datasets: list[Dataset],
    tokenizer: Tokenizer,
    framing: Framing,
    seed: int,
    advance: Callable[[int], None],
) -> TokenStore:
    """Read and tokenise ``datasets`` into ``file`` and return the store.

    ``advance`` is told the number of documents as they are done.

    Raises:
        UsageError: a file that cannot be used, or a dataset without a document.
    """
    lengths: list[int] = []
    keys: list[int] = []
    numbers: list[int] = []
    classes: list[int] = []
    empty = [0] * len(datasets)
    with open(file, "wb") as sink:
        for number, dataset in enumerate(datasets):
            before = len(lengths)
            for batch in _batches(read_documents(dataset.files, dataset.text_field, dataset.control_class)):
                encoded = tokenizer.encode([document.text for document in batch])
                for document, ids in zip(batch, encoded, strict=True):
                    if not document.text.strip() or not len(ids):
                        empty[number] += 1
                        continue
                    framed = framing.document(ids)
                    sink.write(framed.data)
                    lengths.append(len(framed))
                    keys.append(document_key(seed, document.text))
                    classes.append(document.control_class)
                advance(len(batch))
            numbers += [number] * (len(lengths) - before)
            if len(lengths) == before:
                raise UsageError(_no_documents(dataset, empty[number]))
    return TokenStore(
        tokens=np.memmap(file, dtype=np.int32, mode="r"),
        offsets=np.cumsum([0, *lengths], dtype=np.int64),
        keys=np.array(keys, np.uint64),
        datasets=np.array(numbers, np.int16),
        classes=np.array(classes, np.int8),
        empty=empty,
    )


def _no_documents(dataset: Dataset, empty: int) -> str:
    files = f" in its {len(dataset.files)} files" if len(dataset.files) > 1 else ""
    found = f"only {empty} with empty text" if empty else "none"
    return f"The dataset {dataset.path} has no documents ({found}{files})."


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Group documents so that tokenizers' threads have work and memory stays bounded."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _CHARACTERS_PER_BATCH or len(batch) == _DOCUMENTS_PER_BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
