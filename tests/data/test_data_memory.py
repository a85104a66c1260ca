"""Memory that preparing takes, in processes of their own: bounded by what is read at once, and not by the files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.chat_templates import WORDS, make_chat_tokenizer

PROGRAM = """
import resource, sys
from pathlib import Path
from cadapter.config import load_config
from cadapter.data import prepare_data

data = prepare_data(load_config(Path(sys.argv[1])))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, len(data.train))
"""
WORD_LIST = [word for word in WORDS.split(" ") if word.isalpha()]
TEXT = " ".join((WORD_LIST * 40)[:500])
"""Some 2,300 characters."""


def write(file: Path, megabytes: int) -> None:
    count = megabytes * 1_000_000 // len(TEXT)
    if file.suffix == ".jsonl":
        with file.open("w") as sink:
            for number in range(count):
                sink.write(json.dumps({"text": f"{number} {TEXT}"}) + "\n")
    else:  # one row group, as many tools write it
        texts = pa.array([f"{number} {TEXT}" for number in range(count)])
        pq.write_table(pa.table({"text": texts}), file, row_group_size=count, compression="none", use_dictionary=False)


def peak(folder: Path, file: Path) -> int:
    """The most memory that preparing ``file`` takes, in MiB."""
    config = folder / "config.toml"
    lines = [
        f'model_dir = "{folder}/model"',
        f'output_dir = "{folder}/run"',
        f'cache_dir = "{folder}/{file.stem}-cache"',
    ]
    lines += ["lr = 1e-3", "sequence_len = 1024", "[[datasets]]", f'dataset_path = "{file}"']
    config.write_text("\n".join(lines))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(config)], capture_output=True, text=True, check=True, timeout=300
    )
    memory, sequences = map(int, done.stdout.split())
    assert sequences > 0
    return memory


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, ending: str) -> None:
    make_chat_tokenizer(tmp_path / "model", None)
    small, large = tmp_path / f"small{ending}", tmp_path / f"large{ending}"
    write(small, 20)
    write(large, 140)
    growth = peak(tmp_path, large) - peak(tmp_path, small)
    # Text, tokens (three for two words, five bytes each) and packed sequences (six) of 120 MB are some 700 MB.
    assert growth < 60, growth
