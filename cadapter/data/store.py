"""The token store: every document of some datasets, tokenised, in files; short-lived, while a cache is built.

Reading, tokenising and writing overlap: this thread reads records and writes tokens, workers tokenise, which runs on
all of tokenizers' own threads. No more than a few batches are in memory, and of each document some 30 bytes.
"""

from __future__ import annotations

import os
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from cadapter.classes import NEUTRAL
from cadapter.config.toml import toml_text
from cadapter.data.bad_records import BadRecords
from cadapter.data.chat import NoChatTemplate, Span
from cadapter.data.parts import grouped
from cadapter.data.records import Document, Fields, documents_of
from cadapter.data.sources import NoField, OnBad, Record, read_records
from cadapter.data.splitting import document_key
from cadapter.data.tokenising import CHARACTERS_AT_ONCE, Framing, Tokenizer, starts_with
from cadapter.errors import UsageError

_WORKERS = 2
"""One tokenises while what the other has tokenised becomes arrays."""


@dataclass(frozen=True)
class Dataset:
    """One dataset of the config, its files found and its defaults filled in.

    ``overlength``: "split", or what becomes of a record longer than a sequence: "truncate", "drop" or "error".
    """

    name: str
    path: str
    files: tuple[Path, ...]
    fields: Fields
    control_class: int
    overlength: str
    max_tokens: int | None
    max_sequences: int | None
    drop_tails: bool

    @property
    def whole(self) -> bool:
        """Whether a document stays in one sequence."""
        return self.overlength != "split"


@dataclass
class Counts:
    """What reading a dataset left out or cut; of each bad record, the first line of what is wrong."""

    empty_documents: int = 0
    overlength_documents: int = 0
    truncated_documents: int = 0
    truncated_tokens: int = 0
    bad_records: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TokenStore:
    """Tokenised documents of several datasets, one after the other.

    Attributes:
        files: of the token ids, int32, and of whether each is one to be predicted, bool.
        offsets: [D + 1] int64; document d has the tokens ``offsets[d]`` to before ``offsets[d + 1]``.
        keys: [D] uint64, see :func:`~cadapter.data.splitting.document_key`; the two documents of a pair have the same.
        texts: [D] uint64, the key of each document's own text.
        repeats: [D] bool, which begin with the sequence prefix.
        datasets: [D] int16, which dataset each is from.
        classes: [D] int8.
        counts: one for each dataset.
    """

    files: tuple[BinaryIO, BinaryIO]
    offsets: np.ndarray
    keys: np.ndarray
    texts: np.ndarray
    repeats: np.ndarray
    datasets: np.ndarray
    classes: np.ndarray
    counts: list[Counts]

    def documents_of(self, dataset: int) -> tuple[int, int]:
        """Return the first document of a dataset, and the first behind its last."""
        low, high = np.searchsorted(self.datasets, [dataset, dataset + 1])
        return int(low), int(high)

    def read(self, starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids int32, trained bool) of the tokens from ``starts`` [n] to ``stops`` [n], one after the other.

        The files are read and not mapped: pages of a mapping count as this process's memory, and each that is looked at
        brings its neighbours along.
        """
        total = int((stops - starts).sum())
        ids, trained = np.empty(total, np.int32), np.empty(total, np.bool_)
        apart = np.ones(len(starts) + 1, bool)
        apart[1:-1] = starts[1:] != stops[:-1]  # what lies side by side is read at once
        at = 0
        for start, stop in zip(starts[apart[:-1]].tolist(), stops[apart[1:]].tolist(), strict=True):
            for file, into in zip(self.files, (ids, trained), strict=True):
                part = into[at : at + stop - start]
                if os.preadv(file.fileno(), [part.data], start * part.itemsize) != part.nbytes:
                    raise OSError(f"{file.name} is shorter than it was written")
            at += stop - start
        return ids, trained

    def close(self) -> None:
        """Close the files."""
        for file in self.files:
            file.close()


class _Encoded(NamedTuple):
    """A tokenised document."""

    ids: np.ndarray
    trained: np.ndarray | None
    control_class: int
    key: int
    text: int


def write_store(
    directory: Path,
    datasets: list[Dataset],
    tokenizer: Tokenizer,
    framing: Framing,
    seed: int,
    sequence_len: int,
    bad_records: BadRecords,
    advance: Callable[[int], None],
) -> TokenStore:
    """Read and tokenise ``datasets`` into files in ``directory`` and return the store.

    ``bad_records`` is told of records that cannot be used, ``advance`` the number of records as they are done.

    Raises:
        UsageError: a file that cannot be used, a dataset without a document, too many bad records, or a tokenizer that
            lacks what the data needs.
    """
    with _Writer(directory, framing, sequence_len) as writer:
        for number, dataset in enumerate(datasets):
            before = len(writer.lengths)
            counts = Counts()
            writer.counts.append(counts)

            encoder = _Encoder(dataset, tokenizer, framing, seed)

            def bad(error: UsageError, counts: Counts = counts, encoder: _Encoder = encoder) -> None:
                try:
                    bad_records(error)
                except UsageError:
                    encoder.refuse_without_field(error)
                    raise
                counts.bad_records.append(str(error).splitlines()[0])
                encoder.missed = error

            for batch in _in_parallel(encoder.encode, encoder.batches(bad)):
                for result in batch:
                    try:
                        if isinstance(result, UsageError):
                            raise result
                        writer.add(result.documents, dataset, number, result.where)
                    except UsageError as error:
                        bad(error)
                writer.flush()
                advance(len(batch))
            if len(writer.lengths) == before:
                encoder.refuse_without_field(encoder.missed)
                bad_records.settle()
                raise UsageError(_no_documents(dataset, counts))
        bad_records.settle()
    return writer.store()


def _no_documents(dataset: Dataset, counts: Counts) -> str:
    files = f" in its {len(dataset.files)} files" if len(dataset.files) > 1 else ""
    left_out = [
        f"{count:,} {what}"
        for count, what in (
            (counts.empty_documents, "with empty text"),
            (counts.overlength_documents, "longer than a sequence"),
            (len(counts.bad_records), "bad"),
        )
        if count
    ]
    found = f"only {', '.join(left_out)}" if left_out else "none"
    cut = '"split"' if dataset.overlength == "truncate" else '"truncate" or "split"'  # cut, no answer was left of them
    remedies = [
        remedy
        for count, remedy in (
            (counts.overlength_documents, f"Raise sequence_len, or set overlength to {cut}."),
            (counts.empty_documents, "Check that the dataset's fields are those that hold the texts."),
        )
        if count
    ]
    return "\n".join(
        [f"The dataset {dataset.path} has no documents ({found}{files}).", *(remedies or ["Correct the file."])]
    )


class _Read(NamedTuple):
    """A record's documents and its place."""

    documents: list[Document]
    where: str


class _Tokenised(NamedTuple):
    """A record's documents, tokenised, and its place."""

    documents: list[_Encoded]
    where: str


class _Encoder:
    """Records of a dataset to tokens."""

    def __init__(self, dataset: Dataset, tokenizer: Tokenizer, framing: Framing, seed: int) -> None:
        self._dataset = dataset
        self._tokenizer = tokenizer
        self._framing = framing
        self._seed = seed
        self._masked = np.zeros(max([*framing.masked, 0]) + 2, bool)  # the last stands for all ids above
        self._masked[list(framing.masked)] = True
        self._any_usable = False
        self.missed: UsageError | None = None

    def refuse_without_field(self, error: UsageError | None) -> None:
        """Where no record so far has what ``error`` misses, raise what is rather wrong with the config.

        Raises:
            UsageError: as said.
        """
        if isinstance(error, NoField) and not self._any_usable:
            key = self._dataset.fields.key_of(error.field)
            raise UsageError(
                f"{self._dataset.path}: no record has {error.field!r} ({key} = {toml_text(error.field)}); the last one "
                f"looked at has: {error.there}.\nSet {key} of this dataset to the field that is meant."
            ) from error

    def batches(self, bad: OnBad) -> Iterator[list[_Read]]:
        """Yield the records in groups, so that tokenizers' threads have work and memory stays bounded."""
        records = read_records(self._dataset.files, self._dataset.fields.needed, self._dataset.fields.optional, bad)
        return grouped(self._texts(records, bad), _characters, CHARACTERS_AT_ONCE)

    def _texts(self, records: Iterable[Record], bad: OnBad) -> Iterator[_Read]:
        fields, control_class = self._dataset.fields, self._dataset.control_class
        for record in records:
            try:
                documents = documents_of(record, fields, control_class, self._tokenizer.render_chat)
                self._any_usable = True
                yield _Read(documents, record.where)
            except NoChatTemplate:
                raise  # no record is to blame
            except UsageError as error:
                bad(error)

    def encode(self, batch: list[_Read]) -> list[_Tokenised | UsageError]:
        """Return the batch tokenised, or, for a record that cannot be used, the error that says why."""
        documents = [document for record in batch for document in record.documents]
        encoded = self._tokens(documents)
        results: list[_Tokenised | UsageError] = []
        for record in batch:
            try:
                results.append(self._finished(record, [next(encoded) for _ in record.documents]))
            except UsageError as error:
                results.append(error)
        return results

    def _tokens(self, documents: list[Document]) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Return, for each document, its ids and which of them are trained; None: all."""
        plain = iter(self._tokenizer.encode([each.text for each in documents if each.trained is None]))
        chats = [each for each in documents if each.trained is not None]
        spans: list[tuple[Span, ...]] = [each.trained or () for each in chats]
        masked = iter(self._tokenizer.encode_spans([each.text for each in chats], spans) if chats else [])
        return iter([(next(plain), None) if each.trained is None else next(masked) for each in documents])

    def _finished(self, record: _Read, encoded: list[tuple[np.ndarray, np.ndarray | None]]) -> _Tokenised:
        """Return a record with its documents framed and masked.

        Raises:
            UsageError: a chat that trains no token, or with two BOS.
        """
        texts = [document_key(self._seed, document.text) for document in record.documents]
        key = texts[0] if len(texts) == 1 else document_key(self._seed, " ".join(map(str, texts)))
        finished = []
        for document, (ids, trained), text in zip(record.documents, encoded, texts, strict=True):
            if not len(ids) or not document.text.strip():
                ids, trained = ids[:0], None if trained is None else trained[:0]
            elif trained is None:
                ids = self._framing.document(ids)
            else:
                ids, trained = self._framing.chat(ids, trained, document.answered, record.where)
            if self._framing.masked:
                kept = ~self._masked[np.minimum(ids, len(self._masked) - 1)]
                trained = kept if trained is None else trained & kept
            must_train = document.trained is not None and document.control_class != NEUTRAL
            if must_train and len(ids) and not np.any(trained):
                raise UsageError(f"{record.where}: the chat trains no token.\nThe record: {document.text[:600]}")
            finished.append(_Encoded(ids, trained, document.control_class, key, text))
        return _Tokenised(finished, record.where)


def _characters(record: _Read) -> int:
    return sum(len(document.text) for document in record.documents)


def _in_parallel(
    work: Callable[[list[_Read]], list[_Tokenised | UsageError]], batches: Iterator[list[_Read]]
) -> Iterator[list[_Tokenised | UsageError]]:
    """Yield ``work(batch)`` for each batch, in order, worked on while others are read and written."""
    with ThreadPoolExecutor(_WORKERS) as workers:
        pending: deque[Future[list[_Tokenised | UsageError]]] = deque()
        for batch in batches:
            pending.append(workers.submit(work, batch))
            if len(pending) > _WORKERS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


class _Writer:
    """Writes documents one after the other, and remembers what is known of each."""

    def __init__(self, directory: Path, framing: Framing, sequence_len: int) -> None:
        self._files = directory / "tokens.bin", directory / "trained.bin"
        self._stack = ExitStack()
        self._sinks: list[BinaryIO] = []
        self._prefix = framing.sequence_prefix
        self._room = sequence_len - len(self._prefix)
        self._ids: list[np.ndarray] = []
        self._trained: list[np.ndarray] = []
        self.lengths, self._keys, self._texts = array("q"), array("Q"), array("Q")
        self._datasets, self._classes, self._repeats = array("h"), array("b"), array("b")
        self.counts: list[Counts] = []

    def __enter__(self) -> _Writer:
        self._sinks = [self._stack.enter_context(file.open("wb")) for file in self._files]
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, documents: list[_Encoded], dataset: Dataset, number: int, where: str) -> None:
        """Take a record's documents, or count why not.

        Raises:
            UsageError: one is longer than a sequence, and the dataset's ``overlength`` is "error".
        """
        counts = self.counts[number]
        if not all(len(document.ids) for document in documents):  # a pair with half of it empty is none
            counts.empty_documents += len(documents)
            return
        if dataset.whole:
            documents = self._fitting(documents, dataset.overlength, counts, where)
        for document in documents:
            self._ids.append(document.ids)
            self._trained.append(np.ones(len(document.ids), bool) if document.trained is None else document.trained)
            self.lengths.append(len(document.ids))
            self._keys.append(document.key)
            self._texts.append(document.text)
            self._datasets.append(number)
            self._classes.append(document.control_class)
            self._repeats.append(bool(self._prefix) and starts_with(document.ids, self._prefix))

    def _fitting(self, documents: list[_Encoded], overlength: str, counts: Counts, where: str) -> list[_Encoded]:
        """Return the documents of a record, each within a sequence, or none of them."""
        fitting = []
        for document in documents:
            # The sequence's prefix takes the place of a document's own.
            room = self._room + (len(self._prefix) if starts_with(document.ids, self._prefix) else 0)
            length = len(document.ids)
            if length <= room:
                fitting.append(document)
                continue
            if overlength == "error":
                raise UsageError(
                    f"{where}: the document has {length:,} tokens, which do not fit a sequence ({room:,}).\n"
                    'Raise sequence_len, or set overlength to "truncate", "drop" or "split".'
                )
            cut = document._replace(
                ids=document.ids[:room], trained=None if document.trained is None else document.trained[:room]
            )
            has_answer = cut.trained is None or cut.control_class == NEUTRAL or bool(cut.trained[1:].any())
            if overlength == "drop" or not has_answer:
                counts.overlength_documents += len(documents)
                return []
            counts.truncated_documents += 1
            counts.truncated_tokens += length - room
            fitting.append(cut)
        return fitting

    def flush(self) -> None:
        """Write what was taken."""
        for sink, arrays in zip(self._sinks, (self._ids, self._trained), strict=True):
            if arrays:
                sink.write(np.concatenate(arrays).data)
            arrays.clear()

    def store(self) -> TokenStore:
        """Return what was written."""
        lengths = np.frombuffer(self.lengths, np.int64)
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return TokenStore(
            files=(self._files[0].open("rb"), self._files[1].open("rb")),
            offsets=offsets,
            keys=np.frombuffer(self._keys, np.uint64),
            texts=np.frombuffer(self._texts, np.uint64),
            repeats=np.frombuffer(self._repeats, np.bool_),
            datasets=np.frombuffer(self._datasets, np.int16),
            classes=np.frombuffer(self._classes, np.int8),
            counts=self.counts,
        )
