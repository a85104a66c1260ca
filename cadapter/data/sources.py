"""Files of text, read as a stream of documents.

| ending | documents |
|---|---|
| ``.txt`` | the whole file is one |
| ``.json`` | a list of objects, one document each |
| ``.jsonl`` | one object a line; blank lines are skipped |
| ``.parquet`` | one row each |

All but Parquet (which compresses by itself) may end in ``.gz`` or ``.zst`` too. Text is UTF-8. Every error names
the file and the place in it: a line of JSON Lines, a record or row counted from 1.
"""

from __future__ import annotations

import glob
import io
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cadapter.errors import UsageError

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
FORMATS = (".txt", ".json", ".jsonl", ".parquet")
_PARQUET_ROWS = 1024
_JSON_TYPES = {
    dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number", bool: "a boolean",
    type(None): "null",
}  # fmt: skip


@dataclass(frozen=True)
class Document:
    """One document as it was read: ``index`` is its line, record or row in ``source``, counted from 1."""

    text: str
    control_class: int
    source: Path
    index: int


def format_of(path: Path) -> str:
    """Return the ending in :data:`FORMATS` that says how ``path`` is read.

    Raises:
        UsageError: there is none, or the format is not compressed from outside.
    """
    compressed = path.suffix.lower() in COMPRESSIONS
    ending = (path.with_suffix("") if compressed else path).suffix.lower()
    if ending not in FORMATS or (compressed and ending == ".parquet"):
        raise UsageError(
            f"{path}: what kind of file this is cannot be told from its name.\n"
            "Supported: .txt, .json and .jsonl, each also with .gz or .zst after it, and .parquet."
        )
    return ending


def resolve_files(dataset_path: str) -> list[Path]:
    """Return the files that ``dataset_path``, a file or a glob (``**`` too), stands for, sorted by path.

    Raises:
        UsageError: there is none, it is a directory, or one of them has an unknown ending.
    """
    path = Path(os.path.expanduser(dataset_path))
    if path.is_dir():
        raise UsageError(
            f"{dataset_path} is a directory.\nGive a file or a glob, for example '{dataset_path}/*.jsonl'."
        )
    if path.exists():
        files = [path]
    elif glob.has_magic(dataset_path):
        files = sorted(found for found in map(Path, glob.glob(str(path), recursive=True)) if found.is_file())
        if not files:
            raise UsageError(f"The glob {dataset_path} matches no file.\nIt was looked up from {Path.cwd()}.")
    else:
        raise UsageError(f"{dataset_path} does not exist.\nIt was looked up from {Path.cwd()}.")
    for file in files:
        format_of(file)
    return files


def read_documents(files: Iterable[Path], text_field: str = "text", control_class: int = 1) -> Iterator[Document]:
    """Yield the documents of ``files`` in order; no more than one file's record batch is held at a time.

    Documents with empty text are yielded too, for the caller to count.

    Raises:
        UsageError: a file cannot be read, is empty (but for ``.txt``), or holds something that is no document.
    """
    for file in files:
        for index, text in _READERS[format_of(file)](file, text_field):
            yield Document(text, control_class, file, index)


@contextmanager
def _open(file: Path) -> Iterator[io.BufferedReader]:
    """Open ``file`` for reading, decompressed; whatever goes wrong in reading becomes a :class:`UsageError`."""
    try:
        with pa.input_stream(str(file), compression=COMPRESSIONS.get(file.suffix.lower())) as stream:
            yield io.BufferedReader(stream)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> UsageError:
    reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
    return UsageError(f"{file} cannot be read: {reason}.")


def _read_whole(file: Path) -> str:
    with _open(file) as stream:
        data = stream.read()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _not_utf8(f"{file}, line {line}") from error


def _not_utf8(where: str) -> UsageError:
    return UsageError(f"{where}: the text is not valid UTF-8.\nConvert the file to UTF-8.")


def _read_txt(file: Path, _: str) -> Iterator[tuple[int, str]]:
    yield 1, _read_whole(file)


def _read_json(file: Path, text_field: str) -> Iterator[tuple[int, str]]:
    text = _read_whole(file)
    if not text.strip():
        raise UsageError(f"{file} is empty.")
    records = _parse(text, file, 0)
    if not isinstance(records, list):
        raise UsageError(
            f"{file} must hold a list of objects, but holds {_JSON_TYPES[type(records)]}.\n"
            "If it has one object a line, name it .jsonl."
        )
    for index, record in enumerate(records, 1):
        yield index, _text_of(record, text_field, f"{file}, record {index}")


def _read_jsonl(file: Path, text_field: str) -> Iterator[tuple[int, str]]:
    number = 0
    with _open(file) as stream:
        for number, line in enumerate(stream, 1):
            where = f"{file}, line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(where) from error
            if text.strip():
                yield number, _text_of(_parse(text.rstrip(), file, number - 1), text_field, where)
    if number == 0:
        raise UsageError(f"{file} is empty.")


def _parse(text: str, file: Path, lines_before: int) -> Any:
    """Return the JSON value of ``text``, which begins ``lines_before`` lines into ``file``."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{file}, line {lines_before + error.lineno}"
        raise UsageError(f"{where}: broken JSON: {error.msg} (column {error.colno}).") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or nested too deeply
        raise UsageError(f"{file}, from line {lines_before + 1}: JSON that cannot be read: {error}.") from error


def _read_parquet(file: Path, text_field: str) -> Iterator[tuple[int, str]]:
    if file.stat().st_size == 0:
        raise UsageError(f"{file} is empty.")
    try:
        with pq.ParquetFile(file, memory_map=True) as table:
            names = table.schema_arrow.names
            if text_field not in names:
                raise _no_field(str(file), text_field, names, "columns")
            row = 0
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=[text_field]):
                for value in batch.column(0):
                    row += 1
                    yield row, _text_of({text_field: _as_python(value, file, row)}, text_field, f"{file}, row {row}")
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(file, error) from error


def _as_python(value: Any, file: Path, row: int) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        raise _not_utf8(f"{file}, row {row}") from error


def _text_of(record: Any, text_field: str, where: str) -> str:
    if not isinstance(record, dict):
        raise UsageError(f"{where}: expected an object with {text_field!r}, found {_type_name(record)}.")
    if text_field not in record:
        raise _no_field(where, text_field, record, "fields")
    text = record[text_field]
    if not isinstance(text, str):
        raise UsageError(f"{where}: {text_field!r} must be a string, but is {_type_name(text)}.")
    try:
        text.encode("utf-8")  # a lone surrogate, which JSON's \\ud800 escapes can spell, is no text
    except UnicodeEncodeError as error:
        raise UsageError(f"{where}: {text_field!r} holds half of a surrogate pair, which is no valid text.") from error
    return text


def _type_name(value: Any) -> str:
    return _JSON_TYPES.get(type(value), f"of type {type(value).__name__}")


def _no_field(where: str, text_field: str, names: Iterable[str], kind: str) -> UsageError:
    there = ", ".join(map(str, names)) or "none"
    return UsageError(f"{where}: there is no {text_field!r} ({kind}: {there}).\nSet text_field to where the text is.")


_READERS = {".txt": _read_txt, ".json": _read_json, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
