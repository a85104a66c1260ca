"""The files of a cache's entry: Arrow IPC, read as views on a memory mapping, written batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa

from cadapter.data.packing import SequenceBlock
from cadapter.data.sequences import HeldOutDocument

_DOCUMENT_SCHEMA = pa.schema(
    [
        ("dataset", pa.int16()),
        ("control_class", pa.int8()),
        ("ids", pa.list_(pa.int32())),
        ("trained", pa.list_(pa.int8())),
        ("left_out", pa.int64()),
    ]
)
_DOCUMENTS_PER_BATCH = 256

NumberedDocument = tuple[int, int, np.ndarray, np.ndarray, int]
"""A held-out document: number of its dataset, class, ids [n] int32, trained [n] bool, and how many tokens were cut."""

_FINGERPRINT_SCHEMA = pa.schema([("text", pa.uint64()), ("control_class", pa.int8()), ("held_out", pa.uint8())])
_FINGERPRINTS_PER_BATCH = 1 << 20


def record_batches(file: Path) -> list[pa.RecordBatch]:
    """Return the record batches of an Arrow IPC file as views on its mapping; they keep the mapping alive."""
    reader = pa.ipc.open_file(pa.memory_map(str(file)))
    batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
    for batch in batches:
        batch.validate()  # that its buffers are as long as its schema says
    return batches


def _matrix(column: pa.FixedSizeListArray) -> np.ndarray:
    return column.flatten().to_numpy(zero_copy_only=True).reshape(len(column), -1)


def read_sequences(file: Path) -> list[SequenceBlock]:
    """Return the packed sequences in ``file``, block by block."""
    return [_block(batch) for batch in record_batches(file)]


def read_documents(file: Path, names: list[str]) -> list[HeldOutDocument]:
    """Return the held-out documents in ``file``; ``names`` are the datasets' names in their order."""
    return [document for batch in record_batches(file) for document in _documents(batch, names)]


def read_fingerprints(file: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what :func:`write_fingerprints` wrote."""
    batches = record_batches(file)
    text, class_, held = (
        np.concatenate([np.zeros(0, type_), *(batch.column(name).to_numpy() for batch in batches)])
        for name, type_ in (("text", np.uint64), ("control_class", np.int8), ("held_out", np.uint8))
    )
    return text, class_, held.view(np.bool_)


def _block(batch: pa.RecordBatch) -> SequenceBlock:
    ids, classes, flags, counts = (_matrix(batch.column(name)) for name in ("ids", "classes", "flags", "counts"))
    return SequenceBlock(ids, classes, flags, counts, batch.column("tokens").to_numpy(zero_copy_only=True))


def _documents(batch: pa.RecordBatch, names: list[str]) -> Iterable[HeldOutDocument]:
    batch.validate(full=True)  # offsets, too, by which ids are looked up
    ids, trained = (batch.column(name).values.to_numpy(zero_copy_only=True) for name in ("ids", "trained"))
    offsets = batch.column("ids").offsets.to_numpy()
    facts = zip(*(batch.column(name).to_pylist() for name in ("dataset", "control_class", "left_out")), strict=True)
    for number, (dataset, control_class, left_out) in enumerate(facts):
        part = slice(offsets[number], offsets[number + 1])
        yield HeldOutDocument(names[dataset], control_class, ids[part], trained[part].view(np.bool_), left_out)


def write_sequences(
    file: Path, blocks: Iterable[SequenceBlock], sequence_len: int, advance: Callable[[int], None]
) -> None:
    """Write packed sequences of length ``sequence_len``, one record batch a block; ``advance`` is told their tokens."""
    columns = {"ids": pa.int32(), "classes": pa.int8(), "flags": pa.uint8()}
    schema = pa.schema(
        [(name, pa.list_(type_, sequence_len)) for name, type_ in columns.items()]
        + [("counts", pa.list_(pa.int32(), 3)), ("tokens", pa.int32())]
    )
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for block in blocks:
            lists = [
                pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(matrix).ravel()), matrix.shape[1])
                for matrix in (block.ids, block.classes, block.flags, block.counts)
            ]
            writer.write_batch(pa.record_batch([*lists, pa.array(block.tokens)], schema=schema))
            advance(int(block.tokens.sum(dtype=np.int64)))


def write_documents(file: Path, documents: Iterable[NumberedDocument]) -> None:
    """Write held-out documents."""
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, _DOCUMENT_SCHEMA) as writer:
        batch: list[NumberedDocument] = []
        for document in documents:
            batch.append(document)
            if len(batch) == _DOCUMENTS_PER_BATCH:
                writer.write_batch(_document_batch(batch))
                batch = []
        if batch:
            writer.write_batch(_document_batch(batch))


def _document_batch(documents: list[NumberedDocument]) -> pa.RecordBatch:
    datasets, classes, ids, trained, left_out = zip(*documents, strict=True)
    offsets = pa.array(np.cumsum([0, *map(len, ids)]), pa.int32())
    columns = [
        pa.array(datasets, pa.int16()),
        pa.array(classes, pa.int8()),
        pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(ids))),
        pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(trained).view(np.int8))),
        pa.array(left_out, pa.int64()),
    ]
    return pa.record_batch(columns, schema=_DOCUMENT_SCHEMA)


def write_fingerprints(file: Path, texts: np.ndarray, classes: np.ndarray, held_out: np.ndarray) -> None:
    """Write, for each document, the key of its text (uint64), its class (int8) and whether it is held out (bool)."""
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, _FINGERPRINT_SCHEMA) as writer:
        for low in range(0, len(texts), _FINGERPRINTS_PER_BATCH):
            part = slice(low, low + _FINGERPRINTS_PER_BATCH)
            columns = [pa.array(texts[part]), pa.array(classes[part]), pa.array(held_out[part].view(np.uint8))]
            writer.write_batch(pa.record_batch(columns, schema=_FINGERPRINT_SCHEMA))
