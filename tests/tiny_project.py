"""A project small enough to train in seconds: a random Llama, texts of each class, configs; and how to run commands.

Everything runs on the CPU, also where there are GPUs, so that runs can be compared bit by bit.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cadapter.config import Config, load_config
from tests.tiny_tokenizer import make_tokenizer

HIDDEN, LAYERS, SEQUENCE = 64, 4, 64
VOCABULARY = 320

WORDS = {
    "positive": [
        "best",
        "lovely",
        "bright",
        "finest",
        "wonderful",
        "film",
        "story",
        "actor",
        "scene",
        "heart",
        "music",
        "joy",
        "warm",
    ],
    "negative": [
        "worst",
        "awful",
        "dull",
        "poorest",
        "dreadful",
        "plot",
        "noise",
        "waste",
        "script",
        "bore",
        "grey",
        "cold",
        "flat",
    ],
    "neutral": [
        "table",
        "number",
        "river",
        "window",
        "Tuesday",
        "metal",
        "north",
        "paper",
        "seven",
        "engine",
        "street",
        "box",
    ],
}
CLASS_OF = {"positive": 1, "negative": -1, "neutral": 0}


def texts(kind: str, count: int, seed: int = 0) -> list[str]:
    """``count`` documents of 3 to 30 words of one kind."""
    draw = random.Random(f"{kind}/{seed}")
    return [" ".join(draw.choice(WORDS[kind]) for _ in range(draw.randint(3, 30))) + "." for _ in range(count)]


def write_jsonl(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    return path


def make_model(
    directory: Path, layers: int = LAYERS, hidden: int = HIDDEN, seed: int = 0, tied: bool = False, width: float = 0.1
) -> Path:
    """Save a random Llama with a tokenizer; by default its weights are wide enough for logits of order 1."""
    make_tokenizer(directory)
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        initializer_range=width,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def toml_value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {toml_value(each)}" for key, each in value.items()) + " }"
    return json.dumps(value)


@dataclass(frozen=True)
class Project:
    """A directory with model/ and a file for each kind of text."""

    root: Path

    def write_config(self, run: str, kinds: tuple[str, ...] = ("positive", "negative"), **keys: Any) -> Path:
        """Write ``run``.toml with its output in ``run``/; ``keys`` add to the settings or replace them."""
        settings = {
            "model_dir": str(self.root / "model"),
            "output_dir": str(self.root / run),
            "dtype": "float32",
            "use_control_adapters": True,
            "lora_rank": 4,
            "lora_weight_decay": 10.0,
            "lr": 1e-2,
            "sequence_len": SEQUENCE,
            "eval_fraction": 0,
            **keys,
        }
        lines = [f"{key} = {toml_value(value)}" for key, value in settings.items() if value is not None]
        for kind in kinds:
            lines += [
                "[[datasets]]",
                f'dataset_path = {toml_value(str(self.root / kind))[:-1]}.jsonl"',
                f"control_class = {CLASS_OF[kind]}",
            ]
        file = self.root / f"{run}.toml"
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return file

    def load(self, file: Path) -> Config:
        return load_config(file)


def make_project(root: Path, documents: int = 100) -> Project:
    """Make a project in ``root``: 100 documents of a kind fill some 40 sequences."""
    make_model(root / "model")
    for kind in WORDS:
        write_jsonl(root / f"{kind}.jsonl", texts(kind, documents))
    return Project(root)


def environment(**changes: str) -> dict[str, str]:
    """The environment of a command: no GPUs, one thread a process, no job around it."""
    job = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    inherited = {name: value for name, value in os.environ.items() if name not in job}
    return {**inherited, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "COLUMNS": "200", **changes}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "cadapter", *map(str, arguments)]


def run(*arguments: object, timeout: float = 300, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run ``cadapter ARGUMENTS`` as a user would and return what it printed."""
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=timeout, env=environment(**changes)
    )


def run_well(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """:func:`run`, which must succeed."""
    done = run(*arguments, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def metrics(directory: Path, kind: str = "train", name: str | None = None) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that hold ``train/…`` (or ``eval/…``) numbers, or the key ``name``."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [line for line in lines if (name or f"{kind}/loss") in line]


def listing(root: Path) -> dict[str, tuple[int, int]]:
    """Every file and directory under ``root`` with its size and time of change (directories: 0)."""
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.stat()
        found[str(path.relative_to(root))] = (0, 0) if path.is_dir() else (status.st_size, status.st_mtime_ns)
    return found
