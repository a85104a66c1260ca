"""Every format and compression gives the same documents; every mistake is named with its file and place."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cadapter.data.records import Document, Fields, documents_of
from cadapter.data.sources import read_records, resolve_files
from cadapter.errors import UsageError

TEXTS = ["first", "zweitens: äöü 🦊", "third\nwith two lines", ""]


def read_documents(files: list[Path], text_field: str = "text", control_class: int = 1) -> Iterator[Document]:
    """The documents of files of plain text."""
    fields = Fields(text_field)
    for record in read_records(files, fields.needed):
        yield from documents_of(record, fields, control_class, no_chat)


def no_chat(*_: object) -> Any:
    raise AssertionError("no chat here")


def where(file: Path, *places: object) -> list[str]:
    return [f"{file}, {place}" for place in places]


def write(file: Path, texts: list[str]) -> Path:
    """Write ``texts`` to ``file`` in the format and compression of its name."""
    records = [{"id": number, "text": text} for number, text in enumerate(texts)]
    name = file.name.removesuffix(".gz").removesuffix(".zst")
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(records), file, row_group_size=2)
        return file
    if name.endswith(".json"):
        data = json.dumps(records, indent=1).encode()
    elif name.endswith(".jsonl"):
        data = "".join(json.dumps(record) + "\n" for record in records).encode()
    else:
        data = texts[0].encode()
    if file.suffix == ".gz":
        data = gzip.compress(data)
    if file.suffix == ".zst":
        with pa.output_stream(str(file), compression="zstd") as stream:
            stream.write(data)
        return file
    file.write_bytes(data)
    return file


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_records(tmp_path: Path, ending: str, compression: str) -> None:
    file = write(tmp_path / f"texts{ending}{compression}", TEXTS)
    documents = list(read_documents(resolve_files(str(file)), control_class=-1))
    assert [document.text for document in documents] == TEXTS
    kind = "line" if ending == ".jsonl" else "record"
    assert [document.where for document in documents] == where(file, *(f"{kind} {number}" for number in (1, 2, 3, 4)))
    assert {document.control_class for document in documents} == {-1}


def test_parquet(tmp_path: Path) -> None:
    file = write(tmp_path / "texts.parquet", TEXTS)
    documents = list(read_documents([file]))
    assert [document.text for document in documents] == TEXTS
    assert [document.where for document in documents] == where(file, *(f"row {number}" for number in (1, 2, 3, 4)))


@pytest.mark.parametrize("type_", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_string_types(tmp_path: Path, type_: pa.DataType) -> None:
    pq.write_table(pa.table({"text": pa.array(TEXTS).cast(type_)}), tmp_path / "texts.parquet")
    assert [document.text for document in read_documents([tmp_path / "texts.parquet"])] == TEXTS


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst", "A.TXT"])
def test_a_text_file_is_one_document(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / name, ["two\nlines ü"])
    assert [(document.text, document.where) for document in read_documents([file])] == [("two\nlines ü", str(file))]


def test_gzip_of_several_members(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in ("a", "b")]
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(map(gzip.compress, lines)))
    assert [document.text for document in read_documents([tmp_path / "a.jsonl.gz"])] == ["a", "b"]


def test_a_glob_is_sorted_and_goes_into_folders(tmp_path: Path) -> None:
    (tmp_path / "sub.txt").mkdir()
    for name in ("b.txt", "a.txt", "sub.txt/c.txt"):
        (tmp_path / name).write_text(name)
    assert [file.name for file in resolve_files(str(tmp_path / "*.txt"))] == ["a.txt", "b.txt"]
    assert [file.name for file in resolve_files(str(tmp_path / "**/*.txt"))] == ["a.txt", "b.txt", "c.txt"]


def test_a_file_whose_name_looks_like_a_glob(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("x")
    assert resolve_files(str(tmp_path / "a[1].txt")) == [tmp_path / "a[1].txt"]


def test_blank_lines_and_a_byte_order_mark_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}')
    documents = list(read_documents([tmp_path / "a.jsonl"]))
    assert [document.text for document in documents] == ["a", "b"]
    assert [document.where for document in documents] == where(tmp_path / "a.jsonl", "line 1", "line 4")


def test_text_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": 1, "body": "b"}')
    assert next(read_documents([tmp_path / "a.jsonl"], "body")).text == "b"


ERRORS = {
    "broken line": ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "a.jsonl, line 3: broken JSON"),
    "line is a list": ("a.jsonl", b'["a"]', "a.jsonl, line 1: expected an object with 'text', found a list"),
    "field missing": ("a.jsonl", b'{"text": "a"}\n{"body": "b"}', "a.jsonl, line 2: there is no 'text' (fields: body)"),
    "field is a number": ("a.jsonl", b'{"text": 3}', "a.jsonl, line 1: 'text' must be a string, but is a number"),
    "field is null": ("a.jsonl", b'{"text": null}', "a.jsonl, line 1: 'text' must be a string, but is null"),
    "line not UTF-8": ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "a.jsonl, line 2: the text is not valid UTF-8"),
    "half a pair": ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl, line 1: 'text' holds half of a surrogate pair"),
    "nested": ("a.jsonl", b"[" * 200_000, "a.jsonl, from line 1: JSON that cannot be read"),
    "digits": ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", "a.jsonl, from line 1: JSON that cannot be read"),
    "empty jsonl": ("a.jsonl", b"", "a.jsonl is empty"),
    "empty json": ("a.json", b" \n", "a.json is empty"),
    "empty parquet": ("a.parquet", b"", "a.parquet is empty"),
    "broken json": ("a.json", b'[{"text": "a"},\n{"text" "b"}]', "a.json, line 2: broken JSON: Expecting ':'"),
    "json object": ("a.json", b'{"text": "a"}', "a.json must hold a list of objects, but holds an object"),
    "json record": ("a.json", b'[{"text": "a"}, 5]', "a.json, record 2: expected an object with 'text'"),
    "json field": ("a.json", b'[{"body": "a"}]', "a.json, record 1: there is no 'text' (fields: body)"),
    "json not UTF-8": ("a.json", b'[\n"\xff"]', "a.json, line 2: the text is not valid UTF-8"),
    "txt not UTF-8": ("a.txt", b"one\ntwo\n\xfe", "a.txt, line 3: the text is not valid UTF-8"),
    "no gzip": ("a.jsonl.gz", b"{}", "a.jsonl.gz cannot be read"),
    "cut gzip": ("a.txt.gz", gzip.compress(b"text" * 1000)[:-12], "a.txt.gz cannot be read"),
    "no zstd": ("a.jsonl.zst", b"nothing of the kind", "a.jsonl.zst cannot be read"),
    "no parquet": ("a.parquet", b"nothing of the kind", "a.parquet cannot be read"),
    "unknown ending": ("a.csv", b"text", "a.csv: what kind of file this is cannot be told from its name"),
    "packed parquet": ("a.parquet.gz", b"text", "a.parquet.gz: what kind of file this is cannot be told"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors(tmp_path: Path, case: str) -> None:
    name, data, message = ERRORS[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=re.escape(message)):
        list(read_documents(resolve_files(str(tmp_path / name))))


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array(["a", None, "c"]), "row 2: 'text' must be a string, but is null"),
        (pa.array([1, 2]), "row 1: 'text' must be a string, but is a number"),
        (
            pa.StringArray.from_buffers(1, pa.array([0, 1], pa.int32()).buffers()[1], pa.py_buffer(b"\xff")),
            "row 1: the text",
        ),
    ],
)
def test_parquet_errors(tmp_path: Path, column: pa.Array, message: str) -> None:
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=re.escape(f"a.parquet, {message}")):
        list(read_documents([tmp_path / "a.parquet"]))


def test_parquet_without_the_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=r"a\.parquet: there is no 'text' \(columns: body, id\)"):
        list(read_documents([tmp_path / "a.parquet"]))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none.txt", "does not exist"),
        ("*.jsonl", "matches no file"),
        ("", "is a directory"),
        ("~nobody.txt", "does not exist"),
    ],
)
def test_no_files(tmp_path: Path, path: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve_files(str(tmp_path / path))


def test_a_directory_is_answered_with_what_is_in_it(tmp_path: Path) -> None:
    for name in ("a.txt", "b.TXT", "c.json"):
        (tmp_path / name).write_text("[]")
    with pytest.raises(UsageError, match=r"/\*\.txt'"):
        resolve_files(f"{tmp_path}/")


def test_documents_are_read_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\nbroken')
    documents = read_documents([tmp_path / "a.jsonl"])
    assert next(documents).text == "a"
    with pytest.raises(UsageError, match="line 2"):
        next(documents)


# ---- records that are left out ------------------------------------------------------------------------------------

BAD = {
    ".jsonl": (
        b'{"text": "a"}\n{"text": 3}\nnothing\n[1]\n{"text": "\xff"}\n{}\n{"text": "b"}\n{"text": "\\ud800"}\n',
        ["line 2", "line 3", "line 4", "line 5", "line 6", "line 8"],
    ),
    ".json": (
        b'[{"text": "a"}, {"text": null}, 5, {"body": "c"}, {"text": "b"}]',
        ["record 2", "record 3", "record 4"],
    ),
}


@pytest.mark.parametrize("ending", BAD)
def test_bad_records_are_told_of_and_the_others_read(tmp_path: Path, ending: str) -> None:
    data, places = BAD[ending]
    file = tmp_path / f"a{ending}"
    file.write_bytes(data)
    assert read_all(file) == (["a", "b"], where(file, *places))


def read_all(file: Path) -> tuple[list[str], list[str]]:
    """The texts of a file, and the places of its bad records."""
    told: list[str] = []
    texts = []
    fields = Fields()
    for record in read_records([file], fields.needed, on_bad=lambda error: told.append(str(error))):
        try:
            texts += [document.text for document in documents_of(record, fields, 1, no_chat)]
        except UsageError as error:
            told.append(str(error))
    return texts, [line.split(": ")[0] for line in told]


def test_bad_rows_of_parquet(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", None, "b"]}), file)
    assert read_all(file) == (["a", "b"], where(file, "row 2"))
    offsets = pa.array([0, 1, 2, 3], pa.int32()).buffers()[1]
    pq.write_table(pa.table({"text": pa.StringArray.from_buffers(3, offsets, pa.py_buffer(b"a\xffb"))}), file)
    assert read_all(file) == (["a", "b"], where(file, "row 2"))


def test_an_enormous_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cadapter.data.sources.LONGEST_LINE", 1 << 20)
    file = tmp_path / "a.jsonl"
    line = json.dumps({"text": "x" * (3 << 20)})
    file.write_text(f'{{"text": "a"}}\n{line}\n{{"text": "b"}}\n')
    with pytest.raises(UsageError, match=r"a\.jsonl, line 2: the line is longer than 1 MiB"):
        list(read_documents([file]))
    assert read_all(file) == (["a", "b"], where(file, "line 2"))
    file.write_text(line[: (1 << 20) - 3] + '"}')  # just as long as is allowed
    assert len(read_all(file)[0]) == 1
