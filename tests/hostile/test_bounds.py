"""What is small on disk and enormous in memory: refused in plain words, and before it takes that memory."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cadapter.data import sources
from cadapter.errors import UsageError
from cadapter.files import LARGEST_JSON, read_json
from tests.tiny_project import environment

MIB = 1 << 20


def zstd(data: bytes) -> bytes:
    return pa.compress(data, "zstd", asbytes=True)


def most_memory(read: Callable[[], object]) -> int:
    """The most that Python has while ``read`` runs, in MiB."""
    tracemalloc.start()
    try:
        read()
        return tracemalloc.get_traced_memory()[1] // MIB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("ending", "compress"), [("gz", gzip.compress), ("zst", zstd)])
@pytest.mark.parametrize(
    ("name", "filling", "said"),
    [
        ("x.txt", b"a", "more than 4 MiB in it, decompressed"),
        ("x.json", b" ", "more than 4 MiB in it, decompressed"),
        ("x.jsonl", b"a", "line 1: the line is longer than 1 MiB"),
    ],
)
def test_what_a_compressed_file_grows_to_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, filling: bytes, said: str, ending: str,
    compress: Callable[[bytes], bytes],
) -> None:  # fmt: skip
    monkeypatch.setattr(sources, "LARGEST_WHOLE", 4 * MIB)
    monkeypatch.setattr(sources, "LONGEST_LINE", MIB)
    monkeypatch.setattr(sources, "_WHOLE_PIECE", MIB)
    file = tmp_path / f"{name}.{ending}"
    file.write_bytes(compress(filling * 16 * MIB) * 16)  # 256 MiB
    assert file.stat().st_size < MIB

    def read() -> None:
        with pytest.raises(UsageError, match=said):
            list(sources.read_records([file], ("text",)))

    assert most_memory(read) < 64


def test_a_file_of_many_lines_is_no_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LARGEST_WHOLE", MIB)
    line = json.dumps({"text": "a" * 1000}).encode() + b"\n"
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(line * 4000))
    assert sum(1 for _ in sources.read_records([tmp_path / "x.jsonl.gz"], ("text",))) == 4000


PARQUET = """
import resource, sys
from pathlib import Path
from cadapter.data.sources import read_records

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
count = sum(1 for _ in read_records([Path(sys.argv[1])], ("text",)))
print(count, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.processes
def test_a_value_that_all_rows_of_parquet_repeat(tmp_path: Path) -> None:
    """4 MiB that stand in a file once, compressed, and 200 times in its rows: 800 MiB if they were read at once."""
    file, zeros = tmp_path / "x.parquet", pa.array([0] * 200, pa.int32())
    table = pa.table({"text": pa.DictionaryArray.from_arrays(zeros, pa.array(["x" * (4 * MIB)]))})
    pq.write_table(table, file, compression="zstd", dictionary_pagesize_limit=1 << 30, store_schema=False)
    assert pq.read_schema(file).field("text").type == pa.string()
    assert file.stat().st_size < 16 * 1024
    command = [sys.executable, "-c", PARQUET, str(file)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    count, memory = map(int, done.stdout.split())
    assert count == 200
    assert memory < 200  # eight rows, decoded and once more on their way


def test_texts_that_are_too_long_for_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LONGEST_LINE", 1000)
    pq.write_table(pa.table({"text": ["short", "a" * 1001]}), tmp_path / "x.parquet")
    with pytest.raises(UsageError, match="row 2: the text is longer than"):
        list(sources.read_records([tmp_path / "x.parquet"], ("text",)))


def test_a_config_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "x.json", "wb") as file:
        file.truncate(LARGEST_JSON + 1)  # a hole, which takes no room

    def read() -> None:
        with pytest.raises(UsageError, match="is larger than 256 MiB"):
            read_json(tmp_path / "x.json")

    assert most_memory(read) < 16


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a": 1,\n"b": }', "line 2: broken JSON"),
        (b"[" * 100_000, "JSON that cannot be read"),
        (b"\xff{}", "it is not UTF-8"),
        (b"", "line 1: broken JSON"),
    ],
)
def test_json_that_is_none_is_told_in_plain_words(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UsageError, match=said):
        read_json(tmp_path / "x.json")
    (tmp_path / "x.json").unlink()
    (tmp_path / "x.json").symlink_to("x.json")
    with pytest.raises(UsageError, match="cannot be read: Too many levels of symbolic links"):
        read_json(tmp_path / "x.json")
