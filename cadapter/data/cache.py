"""The cache on disk: one directory per packed stream, Arrow IPC files, memory-mapped, keyed by content.

```
<cache>/<key>-<random>/
  train.arrow  evaluation.arrow   packed sequences, FixedSizeList columns: ids, classes, flags, counts; and tokens
  documents.arrow                 held-out documents one by one
  manifest.json                   what it was made from, what it holds, and each file's size
```
The key is the SHA-256 of everything the contents depend on: the bytes of the datasets and of the tokenizer's files,
and the options. Paths are not part of it. An entry is built beside its place and renamed into it under a name of
its own, so that two builders at once end up with two equal entries and a reader never sees half of one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cadapter.data.packing import SequenceBlock
from cadapter.data.sequences import HeldOutDocument, PackedSequences
from cadapter.errors import CadapterError
from cadapter.files import new_directory, write_json

FORMAT = 1
"""Part of the key: raise it whenever the files or what is computed into them change."""
FOLDER = ".cadapter-cache"
MANIFEST = "manifest.json"
TRAIN, EVALUATION, DOCUMENTS = "train.arrow", "evaluation.arrow", "documents.arrow"

_DOCUMENT_SCHEMA = pa.schema(
    [
        ("dataset", pa.int16()),
        ("control_class", pa.int8()),
        ("ids", pa.list_(pa.int32())),
        ("trained", pa.list_(pa.int8())),
    ]
)
_DOCUMENTS_PER_BATCH = 256


@dataclass(frozen=True)
class Recipe:
    """What an entry is made from.

    Attributes:
        sources: the datasets' paths as absolute paths or globs; they find an older entry to compare with.
        files: SHA-256 of every file, by absolute path, in reading order, one mapping for each dataset.
        tokenizer: fingerprint of the tokenizer.
        options: every option that the contents depend on.
    """

    sources: list[str]
    files: list[dict[str, str]]
    tokenizer: str
    options: dict[str, Any]

    @property
    def key(self) -> str:
        """SHA-256 (hex) over all but the paths."""
        contents = [FORMAT, [list(files.values()) for files in self.files], self.tokenizer, self.options]
        return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()

    def as_json(self) -> dict[str, Any]:
        """Return the part of a manifest that tells what changed."""
        return {"sources": self.sources, "files": self.files, "tokenizer": self.tokenizer, "options": self.options}


@dataclass(frozen=True)
class Entry:
    """A complete entry, opened: ``statistics`` is what its builder counted."""

    directory: Path
    train: PackedSequences
    evaluation: PackedSequences
    documents: list[HeldOutDocument]
    statistics: dict[str, Any]


def file_hash(path: Path) -> str:
    """Return the SHA-256 (hex) of a file, read in pieces."""
    digest = hashlib.sha256()
    buffer = bytearray(1 << 20)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def user_cache() -> Path:
    """Return the user's own cache directory of this program."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "cadapter"


class Cache:
    """The entries in ``directory``, or, where that cannot be written, in the user's cache directory.

    ``note`` is told when the second happens.
    """

    def __init__(self, directory: Path, note: Callable[[str], None]) -> None:
        self.directory = directory
        self._note = note

    def find(self, recipe: Recipe) -> tuple[Path | None, str]:
        """Return (directory of a complete entry of ``recipe``, "") or (None, why there is none)."""
        damage = ""
        for root in (self.directory, user_cache()):
            for entry in sorted(_children(root, f"{recipe.key[:32]}-*")):
                damage = _damage(entry, recipe.key)
                if not damage:
                    return entry, ""
        return None, f"damaged: {damage}" if damage else self._what_changed(recipe)

    def _what_changed(self, recipe: Recipe) -> str:
        """Compare ``recipe`` with the newest entry made from the same paths."""
        manifests = [
            manifest
            for root in (self.directory, user_cache())
            for entry in _children(root, "*-*")
            if (manifest := _read_manifest(entry)) and manifest.get("sources") == recipe.sources
        ]
        if not manifests:
            return "new"
        return describe_change(max(manifests, key=lambda manifest: manifest["created"]), recipe.as_json())

    def build(self, recipe: Recipe, fill: Callable[[Path], dict[str, Any]], replace: bool = False) -> Path:
        """Make a new entry of ``recipe``; ``fill`` writes its Arrow files and returns its statistics.

        When it is complete, damaged entries of the same recipe are removed, and with ``replace`` all that stood
        there at the start: never one that another process has just finished and is about to open.

        Raises:
            CadapterError: neither directory can be written, or the disk is full.
        """
        root, created = self._writable()
        same = _children(root, f"{recipe.key[:32]}-*")
        older = [entry for entry in same if replace or _damage(entry, recipe.key)]
        target = root / f"{recipe.key[:32]}-{uuid.uuid4().hex[:8]}"
        try:
            with new_directory(target) as temporary:
                statistics = fill(temporary)
                sizes = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
                described = {"format": FORMAT, "key": recipe.key, "created": time.time(), **recipe.as_json()}
                write_json(temporary / MANIFEST, {**described, "sizes": sizes, "statistics": statistics})
        except OSError as error:
            raise CadapterError(f"The cache in {root} cannot be written: {error.strerror or error}.") from error
        except BaseException:
            if created:
                _remove_if_empty(root)
            raise
        for entry in older:
            shutil.rmtree(entry, ignore_errors=True)
        return target

    def discard(self, entries: Iterable[Path]) -> None:
        """Remove entries that were made in vain, and a directory that then holds nothing."""
        for entry in entries:
            shutil.rmtree(entry, ignore_errors=True)
            _remove_if_empty(entry.parent)

    def _writable(self) -> tuple[Path, bool]:
        """Return the directory to write to, and whether it was made here."""
        reasons = []
        for root in (self.directory, user_cache()):
            created = not root.exists()
            try:
                root.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=root):
                    pass
            except OSError as error:
                reasons.append(f"{root}: {error.strerror}")
                continue
            if reasons:
                self._note(f"The cache goes to {root}, since {reasons[0]}.")
            return root, created
        raise CadapterError("No place for the cache can be written:\n" + "\n".join(reasons) + "\nSet cache_dir.")


def describe_change(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Say in which way two manifests differ: files first, then the tokenizer, then the options."""
    if old["format"] != FORMAT:
        return "made by another version"
    before, after = _merged(old["files"]), _merged(new["files"])
    for path in sorted(before.keys() | after.keys()):
        if before.get(path) != after.get(path):
            verb = "changed" if path in before and path in after else "added" if path in after else "removed"
            return f"file {verb}: {Path(path).name}"
    if old["tokenizer"] != new["tokenizer"]:
        return "tokenizer changed"
    before, after = _flat(old["options"]), _flat(new["options"])
    changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    return f"option changed: {', '.join(dict.fromkeys(key.rpartition('.')[2] for key in changed))}"


def _merged(files: Iterable[Mapping[str, str]]) -> dict[str, str]:
    return {path: digest for dataset in files for path, digest in dataset.items()}


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``options`` with each dataset's as ``0.key``, ``1.key``, …"""
    flat = {key: value for key, value in options.items() if key != "datasets"}
    for number, dataset in enumerate(options["datasets"]):
        flat |= {f"{number}.{key}": value for key, value in dataset.items()}
    return flat


def _children(root: Path, pattern: str) -> Iterable[Path]:
    return root.glob(pattern) if root.is_dir() else ()


def _remove_if_empty(root: Path) -> None:
    try:
        root.rmdir()
    except OSError:
        return  # not empty: it holds entries


def _read_manifest(entry: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((entry / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    complete = isinstance(manifest, dict) and manifest.keys() >= {"format", "key", "created", "sizes", "statistics"}
    return manifest if complete else None


def _damage(entry: Path, key: str) -> str:
    """Return why ``entry`` cannot be used; an empty string when it is complete."""
    manifest = _read_manifest(entry)
    if manifest is None or manifest["key"] != key:
        return f"no usable {MANIFEST}"
    for name in (TRAIN, EVALUATION, DOCUMENTS):
        file, size = entry / name, manifest["sizes"].get(name)
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        try:
            _batches(file)
        except (OSError, pa.ArrowException):
            return f"{name} is no Arrow file"
    return ""


def open_entry(entry: Path, sequence_len: int, names: list[str]) -> Entry:
    """Open a complete entry without reading its contents; ``names`` are the datasets' names in their order."""
    statistics = json.loads((entry / MANIFEST).read_text(encoding="utf-8"))["statistics"]
    documents = [document for batch in _batches(entry / DOCUMENTS) for document in _documents(batch, names)]
    return Entry(
        directory=entry,
        train=PackedSequences([_block(batch) for batch in _batches(entry / TRAIN)], sequence_len),
        evaluation=PackedSequences([_block(batch) for batch in _batches(entry / EVALUATION)], sequence_len),
        documents=documents,
        statistics=statistics,
    )


def _batches(file: Path) -> list[pa.RecordBatch]:
    """Return the record batches of an Arrow IPC file as views on its mapping; they keep the mapping alive."""
    reader = pa.ipc.open_file(pa.memory_map(str(file)))
    return [reader.get_batch(number) for number in range(reader.num_record_batches)]


def _matrix(column: pa.FixedSizeListArray) -> np.ndarray:
    return column.flatten().to_numpy(zero_copy_only=True).reshape(len(column), -1)


def _block(batch: pa.RecordBatch) -> SequenceBlock:
    ids, classes, flags, counts = (_matrix(batch.column(name)) for name in ("ids", "classes", "flags", "counts"))
    return SequenceBlock(ids, classes, flags, counts, batch.column("tokens").to_numpy(zero_copy_only=True))


def _documents(batch: pa.RecordBatch, names: list[str]) -> Iterable[HeldOutDocument]:
    ids, trained = (batch.column(name).values.to_numpy(zero_copy_only=True) for name in ("ids", "trained"))
    offsets = batch.column("ids").offsets.to_numpy()
    datasets, classes = batch.column("dataset").to_pylist(), batch.column("control_class").to_pylist()
    for number, (dataset, control_class) in enumerate(zip(datasets, classes, strict=True)):
        part = slice(offsets[number], offsets[number + 1])
        yield HeldOutDocument(names[dataset], control_class, ids[part], trained[part].view(np.bool_))


def write_sequences(file: Path, blocks: Iterable[SequenceBlock], sequence_len: int) -> None:
    """Write packed sequences of length ``sequence_len``, one record batch a block."""
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


def write_documents(file: Path, documents: Iterable[tuple[int, int, np.ndarray, np.ndarray]]) -> None:
    """Write held-out documents, each (number of its dataset, class, ids [n] int32, trained [n] bool)."""
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, _DOCUMENT_SCHEMA) as writer:
        batch: list[tuple[int, int, np.ndarray, np.ndarray]] = []
        for document in documents:
            batch.append(document)
            if len(batch) == _DOCUMENTS_PER_BATCH:
                writer.write_batch(_document_batch(batch))
                batch = []
        if batch:
            writer.write_batch(_document_batch(batch))


def _document_batch(documents: list[tuple[int, int, np.ndarray, np.ndarray]]) -> pa.RecordBatch:
    datasets, classes, ids, trained = zip(*documents, strict=True)
    offsets = pa.array(np.cumsum([0, *map(len, ids)]), pa.int32())
    columns = [
        pa.array(datasets, pa.int16()),
        pa.array(classes, pa.int8()),
        pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(ids))),
        pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(trained).view(np.int8))),
    ]
    return pa.record_batch(columns, schema=_DOCUMENT_SCHEMA)
