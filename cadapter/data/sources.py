"""Files, read as a stream of records.

| ending | records |
|---|---|
| ``.txt`` | the whole file is the text of one |
| ``.json`` | a list of objects, one record each |
| ``.jsonl`` | one object a line; blank lines are skipped |
| ``.parquet`` | one row each |

All but Parquet (which compresses by itself) may end in ``.gz`` or ``.zst`` too. Text is UTF-8. JSON Lines and Parquet
are streamed; a ``.txt`` or ``.json`` file is held in memory whole, and how much that may be is bounded, whatever a
compressed file grows to. Every error names the file and the place in it: a
line of JSON Lines, a record or row counted from 1.
"""

from __future__ import annotations

import glob
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cadapter.errors import UsageError

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
FORMATS = (".txt", ".json", ".jsonl", ".parquet")
LONGEST_LINE = 1 << 27
"""Bytes; a longer line of JSON Lines is refused, since a line is held in memory."""
LARGEST_WHOLE = 1 << 30
"""Bytes, decompressed; a larger .txt or .json file is refused, since it is held in memory whole."""
_WHOLE_PIECE = 1 << 24
_PARQUET_ROWS = 8
"""Read at once. A file may hold a long value once and have every row repeat it; in memory each has its own."""
_PARQUET_BUFFER = 1 << 20
_LOOKED_UP = "It was looked up from {}: correct the path, or start there."
_JSON_TYPES = {
    dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number", bool: "a boolean",
    type(None): "null",
}  # fmt: skip

OnBad = Callable[[UsageError], None]
"""What is done about a record that cannot be used: raise the error, or take note of it and go on."""


def refuse(error: UsageError) -> None:
    """Raise ``error``: no record may be bad."""
    raise error


@dataclass(frozen=True)
class Record:
    """One record as it was read; ``where`` is its place in words, for messages."""

    fields: dict[str, Any]
    where: str


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
            "Give .txt, .json or .jsonl, each also with .gz or .zst after it, or .parquet."
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
            f"{dataset_path} is a directory.\n"
            f"Give a file or a glob, for example '{dataset_path.rstrip('/')}/*{_commonest_ending(path)}'."
        )
    if path.exists():
        files = [path]
    elif glob.has_magic(dataset_path):
        files = sorted(found for found in map(Path, glob.glob(str(path), recursive=True)) if found.is_file())
        if not files:
            raise UsageError(f"The glob {dataset_path} matches no file.\n{_LOOKED_UP.format(Path.cwd())}")
    else:
        raise UsageError(f"{dataset_path} does not exist.\n{_LOOKED_UP.format(Path.cwd())}")
    for file in files:
        format_of(file)
    return files


def _commonest_ending(directory: Path) -> str:
    """How most of the files in a directory end that are of a known kind."""
    names = [name.lower() for name in os.listdir(directory)]
    counts = {
        ending: sum(name.endswith(ending) for name in names) for ending in (".jsonl", ".txt", ".json", ".parquet")
    }
    return max(counts, key=lambda ending: counts[ending])


def read_records(
    files: Iterable[Path], needed: tuple[str, ...], optional: tuple[str, ...] = (), on_bad: OnBad = refuse
) -> Iterator[Record]:
    """Yield the records of ``files`` in order.

    Args:
        needed: the fields that are used; the first takes the text of a ``.txt`` file, and Parquet files must have all.
        optional: fields that are read where they are there.
        on_bad: told of every record that is none.

    Raises:
        UsageError: a file cannot be read or is empty (but for ``.txt``), and what ``on_bad`` raises.
    """
    for file in files:
        yield from _READERS[format_of(file)](file, needed, optional, on_bad)


@contextmanager
def _open(file: Path) -> Iterator[io.BufferedReader]:
    """Open ``file`` for reading, decompressed; whatever goes wrong in reading becomes a :class:`UsageError`."""
    try:
        with pa.input_stream(str(file), compression=COMPRESSIONS.get(file.suffix.lower())) as stream:
            yield io.BufferedReader(stream, buffer_size=1 << 20)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> UsageError:
    reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
    return UsageError(f"{file} cannot be read: {reason}.")


def _read_whole(file: Path) -> str:
    data = bytearray()
    with _open(file) as stream:
        while piece := stream.read(_WHOLE_PIECE):
            data += piece
            if len(data) > LARGEST_WHOLE:
                raise UsageError(
                    f"{file}: there is more than {LARGEST_WHOLE >> 20} MiB in it, decompressed, and such a file is "
                    "held in memory whole.\nSplit it, or write it as .jsonl, which is read line by line."
                )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _not_utf8(f"{file}, line {line}") from error


def _not_utf8(where: str) -> UsageError:
    return UsageError(f"{where}: the text is not valid UTF-8.\nConvert the file to UTF-8.")


def _read_txt(file: Path, needed: tuple[str, ...], _: tuple[str, ...], __: OnBad) -> Iterator[Record]:
    yield Record({needed[0]: _read_whole(file)}, str(file))


def _read_json(file: Path, needed: tuple[str, ...], _: tuple[str, ...], on_bad: OnBad) -> Iterator[Record]:
    text = _read_whole(file)
    if not text.strip():
        raise UsageError(f"{file} is empty.\nLeave it out, or put texts into it.")
    records = _parse(text, file, 0)
    if not isinstance(records, list):
        raise UsageError(
            f"{file} must hold a list of objects, but holds {type_name(records)}.\n"
            "If it has one object a line, name it .jsonl."
        )
    for index, fields in enumerate(records, 1):
        where = f"{file}, record {index}"
        if isinstance(fields, dict):
            yield Record(fields, where)
        else:
            on_bad(_no_object(fields, needed, where))


def _read_jsonl(file: Path, needed: tuple[str, ...], _: tuple[str, ...], on_bad: OnBad) -> Iterator[Record]:
    number = 0
    with _open(file) as stream:
        while line := stream.readline(LONGEST_LINE):
            number += 1
            try:
                record = _record_of_line(line, file, number, needed)
            except UsageError as error:
                on_bad(error)
                while line and not line.endswith(b"\n"):  # what is left of a line that is too long
                    line = stream.readline(LONGEST_LINE)
            else:
                if record is not None:
                    yield record
    if number == 0:
        raise UsageError(f"{file} is empty.\nLeave it out, or put texts into it.")


def _record_of_line(line: bytes, file: Path, number: int, needed: tuple[str, ...]) -> Record | None:
    """Return the record on a line, None for a blank line.

    Raises:
        UsageError: the line holds something else.
    """
    where = f"{file}, line {number}"
    if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
        raise UsageError(
            f"{where}: the line is longer than {LONGEST_LINE >> 20} MiB.\n"
            "Split this document, or name the file .json if it is one list of objects."
        )
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(where) from error
    if not text or text.isspace():
        return None
    fields = _parse(text.rstrip(), file, number - 1)
    if not isinstance(fields, dict):
        raise _no_object(fields, needed, where)
    return Record(fields, where)


def _no_object(value: Any, needed: tuple[str, ...], where: str) -> UsageError:
    wanted = " and ".join(map(repr, needed))
    return UsageError(f"{where}: expected an object with {wanted}, found {type_name(value)}.")


def _parse(text: str, file: Path, lines_before: int) -> Any:
    """Return the JSON value of ``text``, which begins ``lines_before`` lines into ``file``."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{file}, line {lines_before + error.lineno}"
        raise UsageError(f"{where}: broken JSON: {error.msg} (column {error.colno}).") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or nested too deeply
        raise UsageError(f"{file}, from line {lines_before + 1}: JSON that cannot be read: {error}.") from error


def _read_parquet(file: Path, needed: tuple[str, ...], optional: tuple[str, ...], on_bad: OnBad) -> Iterator[Record]:
    if file.stat().st_size == 0:
        raise UsageError(f"{file} is empty.\nLeave it out, or put texts into it.")
    try:
        # Without pre-buffering a column is read page by page, not a row group, which may be the whole file, at once.
        with pq.ParquetFile(file, buffer_size=_PARQUET_BUFFER, pre_buffer=False) as table:
            names = table.schema_arrow.names
            for name in needed:
                if name not in names:
                    raise NoField(str(file), name, names, "columns")
            columns = [*needed, *(name for name in optional if name in names)]
            row = 0
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
                for index in range(len(batch)):
                    row += 1
                    where = f"{file}, row {row}"
                    try:
                        fields = {name: _as_python(batch.column(name)[index], where) for name in columns}
                    except UsageError as error:
                        on_bad(error)
                    else:
                        yield Record(fields, where)
    except UnicodeDecodeError as error:
        raise _not_utf8(f"{file}, names of columns") from error
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(file, error) from error


def _as_python(value: Any, where: str) -> Any:
    if isinstance(value, pa.StringScalar | pa.LargeStringScalar) and value.is_valid:
        size = value.as_buffer().size
        if size > LONGEST_LINE:
            raise UsageError(f"{where}: the text is longer than {LONGEST_LINE >> 20} MiB.\nSplit this document.")
    try:
        return _without_nulls(value.as_py())
    except UnicodeDecodeError as error:
        raise _not_utf8(where) from error


def _without_nulls(value: Any) -> Any:
    """Leave out of nested objects what is null: a column's objects all have the keys that any of them has.

    A null ``content`` stays, which is what a message that only calls tools has.
    """
    if isinstance(value, list):
        return [_without_nulls(each) for each in value]
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None or key == "content"}
    return value


def type_name(value: Any) -> str:
    """Return what a JSON value is, in words: "a number"."""
    return _JSON_TYPES.get(type(value), f"of type {type(value).__name__}")


class NoField(UsageError):
    """A record at ``where`` lacks ``field``; what it has are ``names``."""

    def __init__(self, where: str, field: str, names: Iterable[str], kind: str = "fields") -> None:
        self.field = field
        self.there = ", ".join(map(str, names)) or "none"
        super().__init__(
            f"{where}: there is no {field!r} ({kind}: {self.there}).\n"
            "Set the dataset's text_field (messages_field, class_field, …) to what is there, or correct the file."
        )


_READERS = {".txt": _read_txt, ".json": _read_json, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
