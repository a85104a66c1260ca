"""A model directory with a tiny tokenizer, and configs made of a few lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cadapter.config import Config, load_config
from tests.tiny_tokenizer import make_tokenizer

MakeConfig = Callable[..., Config]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_tokenizer(directory)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 320}))
    return directory


@pytest.fixture(autouse=True)
def _own_user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture
def make_config(tmp_path: Path, model_dir: Path) -> MakeConfig:
    """``make_config({dataset_path: class, …} or a list of dataset tables, key=value, …)`` → a real Config."""

    def make(datasets: dict[Any, int] | list[dict[str, Any]], **keys: Any) -> Config:
        tables = datasets if isinstance(datasets, list) else [
            {"dataset_path": str(path), "control_class": class_} for path, class_ in datasets.items()
        ]  # fmt: skip
        settings = {
            "model_dir": str(model_dir), "output_dir": str(tmp_path / "run"), "use_control_adapters": True, "lr": 1e-3,
            "sequence_len": 64, **keys,
        }  # fmt: skip
        lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
        for table in tables:
            lines += ["[[datasets]]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
        file = tmp_path / "config.toml"
        file.write_text("\n".join(lines), encoding="utf-8")
        return load_config(file)

    return make
