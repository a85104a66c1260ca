"""How fast `cadapter prepare` is, and how much memory it takes, beside the bare tokenizer on the same texts.

    python tests/benchmarks/prepare_speed.py                        # texts of 40 MB, three rounds
    python tests/benchmarks/prepare_speed.py --memory-megabytes 2000  # how much memory a file of 2 GB takes, too

Prints tokens per second of `tokenizers.encode_batch` and of the whole preparation, taken in turns, and their ratio;
of packing alone; how long it takes to open a cache of 100 million tokens; and the peak memory of a process that
prepares. Texts and tokenizer are those of ../shared where that is there, else made up.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cadapter.config import Config, load_config
from cadapter.data import Tokenizer, arrow, cache, prepare_data
from cadapter.data.fitting import each_in_one
from cadapter.data.packing import Layout, Pieces, in_a_row, pack
from cadapter.data.parts import grouped
from cadapter.data.shuffling import shuffled
from cadapter.data.store import TokenStore
from cadapter.terminal import set_quiet
from tests.tiny_tokenizer import SENTENCES, make_tokenizer

SHARED = Path(__file__).resolve().parents[3] / "shared"
SEQUENCE = 4096


def source_texts() -> list[str]:
    """Texts to make documents of."""
    files = sorted((SHARED / "data").glob("*.jsonl"))
    texts = [json.loads(line)["text"] for file in files for line in file.open(encoding="utf-8")]
    return texts or [" ".join(SENTENCES)]


def write_corpus(file: Path, megabytes: int, seed: int = 0) -> None:
    """Write documents of some 3,000 characters, no two alike."""
    draw, sentences = random.Random(seed), [part for text in source_texts() for part in text.split(". ")]
    left = megabytes * 1_000_000
    with file.open("w", encoding="utf-8") as sink:
        while left > 0:
            line = json.dumps({"text": ". ".join(draw.choices(sentences, k=3))}) + "\n"
            left -= sink.write(line)


def config_for(folder: Path, corpus: Path, **keys: Any) -> Config:
    """Return a config of one dataset, whose cache is in ``folder``."""
    model = SHARED / "models" / "tiny-english-14m"
    if not model.is_dir():
        model = folder / "model"
        make_tokenizer(model)
    settings = {
        "model_dir": str(model), "output_dir": str(folder / "run"), "use_control_adapters": True, "lr": 1e-3,
        "sequence_len": SEQUENCE, "cache_dir": str(folder / "cache"), **keys,
    }  # fmt: skip
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    file = folder / "config.toml"
    file.write_text("\n".join([*lines, "[[datasets]]", f'dataset_path = "{corpus}"']) + "\n", encoding="utf-8")
    return load_config(file)


def compare(folder: Path, megabytes: int, rounds: int) -> None:
    """Bare tokenizer and whole preparation in turns."""
    corpus = folder / "corpus.jsonl"
    write_corpus(corpus, megabytes)
    config = config_for(folder, corpus)
    texts = [json.loads(line)["text"] for line in corpus.open(encoding="utf-8")]
    bare = Tokenizer(Path(config.model_dir)).fast.backend_tokenizer
    rates: dict[str, list[float]] = {"bare": [], "whole": []}
    for _ in range(rounds):
        begin, tokens = time.perf_counter(), 0
        for group in grouped(texts, len, 1 << 21):
            tokens += sum(map(len, bare.encode_batch(group, add_special_tokens=False)))
        rates["bare"].append(tokens / (time.perf_counter() - begin))
        begin = time.perf_counter()
        prepare_data(config, force=True)
        rates["whole"].append(tokens / (time.perf_counter() - begin))
    for name, what in (("bare", "tokenizers.encode_batch"), ("whole", "reading to cache, all of it")):
        print(f"{what}: {statistics.median(rates[name]) / 1e6:.2f} M tokens/s (median of {rounds})")
    shares = [whole / alone for whole, alone in zip(rates["whole"], rates["bare"], strict=True)]
    print(
        f"share of the bare tokenizer: median {statistics.median(shares):.2f}, {min(shares):.2f} to {max(shares):.2f}"
    )


def time_packing(folder: Path, tokens: int, document: int) -> None:
    """Packing alone, from a token store's files."""
    lengths = np.random.default_rng(0).integers(document // 2, document * 3 // 2, tokens // document)
    stops = np.cumsum(lengths)
    ids = np.random.default_rng(1).integers(3, 4000, int(stops[-1])).astype(np.int32)
    files = folder / "tokens.bin", folder / "trained.bin"
    ids.tofile(files[0])
    np.ones(len(ids), bool).tofile(files[1])
    none = np.zeros(len(stops), bool)
    pieces = Pieces(stops - lengths, stops, np.ones(len(stops), np.int8), np.zeros(len(stops), np.int16), none)
    layout = Layout(SEQUENCE, (1,), 0)
    store = TokenStore((files[0].open("rb"), files[1].open("rb")), *[stops] * 6, [])
    rates = {}
    for how, place in (
        ("one after the other", lambda: in_a_row(pieces, layout, none)),
        ("in a shuffled mixture", lambda: in_a_row(pieces.select(shuffled(len(pieces), "mix")), layout, none)),
        ("each whole", lambda: each_in_one(pieces, layout)),
    ):
        begin = time.perf_counter()
        packed = sum(int(block.tokens.sum()) for block in pack(place(), store.read, layout))
        rates[how] = packed / (time.perf_counter() - begin) / 1e6
    store.close()
    said = ", ".join(f"{how} {rate:.0f}" for how, rate in rates.items())
    print(f"packing documents of {document} tokens, M tokens/s: {said}")


def time_opening(folder: Path, tokens: int) -> None:
    """Open a cache of so many tokens, in this process, without reading its contents."""
    corpus = folder / "small.jsonl"
    write_corpus(corpus, 1, seed=1)
    config = config_for(folder, corpus, cache_dir=str(folder / "opened"))
    entry = prepare_data(config).directories[0]
    blocks = arrow.read_sequences(entry / cache.TRAIN)
    count = sum(int(block.tokens.sum()) for block in blocks)

    def repeated() -> Iterator[Any]:
        for _ in range(-(-tokens // count)):
            yield from blocks

    larger = folder / "larger.arrow"
    arrow.write_sequences(larger, repeated(), SEQUENCE, lambda _: None)
    larger.replace(entry / cache.TRAIN)
    manifest = json.loads((entry / cache.MANIFEST).read_text())
    manifest["sizes"][cache.TRAIN] = (entry / cache.TRAIN).stat().st_size
    (entry / cache.MANIFEST).write_text(json.dumps(manifest))
    begin = time.perf_counter()
    data = prepare_data(config)
    seconds = time.perf_counter() - begin
    assert data.reports[0].cache_hit
    print(f"opening a cache of {int(data.train.tokens.sum()) / 1e6:.0f} M tokens: {seconds:.3f} s")


def measure_memory(folder: Path, megabytes: int) -> None:
    """Prepare a large file in a process of its own, and print the most memory that it held."""
    corpus = folder / "large.jsonl"
    write_corpus(folder / "part.jsonl", 50, seed=2)
    with corpus.open("wb") as sink:
        for number in range(max(1, megabytes // 50)):  # a number in each text keeps them different
            part = (folder / "part.jsonl").read_bytes()
            sink.write(part.replace(b'{"text": "', b'{"text": "%d ' % number))
    config_for(folder, corpus, cache_dir=str(folder / "large-cache"))
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "cadapter", "prepare", str(folder / "config.toml")], check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    seconds = time.perf_counter() - begin
    print(f"preparing a file of {corpus.stat().st_size / 1e9:.2f} GB: at most {peak:.2f} GB of memory, {seconds:.0f} s")
    shutil.rmtree(folder / "large-cache")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=40, help="of the texts that rates are taken on")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-megabytes", type=int, default=0, help="of the file whose memory is measured; 0: none")
    parser.add_argument("--folder", type=Path, default=None, help="where files are made (default: a temporary one)")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    set_quiet(True)
    with tempfile.TemporaryDirectory(dir=options.folder) as made:
        folder = Path(made)
        print(f"{os.cpu_count()} cores")
        if options.memory_megabytes:
            measure_memory(folder, options.memory_megabytes)
        if options.rounds:
            compare(folder, options.megabytes, options.rounds)
            for document in (100, 1000):
                time_packing(folder, 20_000_000, document)
            time_opening(folder, 100_000_000)


if __name__ == "__main__":
    main()
