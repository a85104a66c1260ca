"""Texts that no run was prepared with: read as the config's own datasets are, whatever kind of records they hold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cadapter.config import Config, DatasetConfig
from cadapter.data import HeldOutDocument, documents_from_file, load_tokenizer, prepare_data
from cadapter.errors import UsageError
from tests.chat_templates import CHATML

MakeConfig = Any


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def config_of(make_config: MakeConfig, *datasets: dict[str, Any], **keys: Any) -> Config:
    """A config with these datasets."""
    config = make_config({Path(datasets[0]["dataset_path"]): 1}, **keys)
    return config.model_copy(update={"datasets": [DatasetConfig(**each) for each in datasets]})


def texts(documents: list[HeldOutDocument], config: Config) -> list[str]:
    tokenizer = load_tokenizer(config)
    return [tokenizer.decode(document.ids) for document in documents]


def read(path: Path, control_class: int, config: Config) -> list[str]:
    documents = documents_from_file(str(path), control_class, config, load_tokenizer(config))
    assert {document.control_class for document in documents} == {control_class}
    return texts(documents, config)


def test_the_text_field_of_the_config(tmp_path: Path, make_config: MakeConfig) -> None:
    own = write(tmp_path / "own.jsonl", [{"body": "one"}, {"body": "two"}])
    other = write(tmp_path / "other.jsonl", [{"body": "three", "text": "not this"}])
    plain = write(tmp_path / "plain.jsonl", [{"text": "four"}])
    config = config_of(make_config, {"dataset_path": str(own), "text_field": "body"})
    assert [text for text in read(own, 1, config) if "one" in text]
    assert "three" in read(other, -1, config)[0]
    assert "four" in read(plain, -1, config)[0]  # which no dataset of the config describes
    wrong = write(tmp_path / "wrong.jsonl", [{"words": "five"}])
    with pytest.raises(UsageError, match="no record has 'body'"):
        read(wrong, 1, config)


def test_the_dataset_of_the_same_path_then_of_the_same_class_goes_first(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    record = {"a": "first", "b": "second", "c": "third"}
    files = [write(tmp_path / f"{name}.jsonl", [record, record]) for name in ("x", "y", "z", "new")]
    config = config_of(
        make_config,
        {"dataset_path": str(files[0]), "text_field": "a", "control_class": 1},
        {"dataset_path": str(files[1]), "text_field": "b", "control_class": -1},
        {"dataset_path": str(files[2]), "text_field": "c", "control_class": -1},
    )
    for file, class_, word in ((files[2], 1, "third"), (files[3], -1, "second"), (files[3], 0, "first")):
        assert all(word in text for text in read(file, class_, config))


def test_chats_are_scored_where_the_assistant_speaks(tmp_path: Path, make_config: MakeConfig, model_dir: Path) -> None:
    model = shutil.copytree(model_dir, tmp_path / "model")
    (model / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    chats = [
        {"talk": [{"role": "user", "content": "best?"}, {"role": "assistant", "content": word}]}
        for word in ("story", "music", "scene", "heart")
    ]
    file = write(tmp_path / "chats.jsonl", chats)
    config = config_of(
        make_config, {"dataset_path": str(file), "messages_field": "talk"}, model_dir=str(model), eval_fraction=0.5
    )
    held = prepare_data(config).documents
    again = documents_from_file(str(file), 1, config, load_tokenizer(config))
    assert len(again) == 4
    for document in held:  # the same ids are scored as of the run's own
        assert any(
            document.ids.tolist() == each.ids.tolist() and document.trained.tolist() == each.trained.tolist()
            for each in again
        )
    assert all(0 < document.trained.sum() < len(document.ids) for document in again)


def test_pairs_give_the_side_of_the_class(tmp_path: Path, make_config: MakeConfig) -> None:
    file = write(tmp_path / "pairs.jsonl", [{"yes": f"good {k}", "no": f"bad {k}"} for k in range(3)])
    config = config_of(make_config, {"dataset_path": str(file), "chosen_field": "yes", "rejected_field": "no"})
    assert all("good" in text for text in read(file, 1, config))
    assert all("bad" in text for text in read(file, -1, config))
    with pytest.raises(UsageError, match="pairs"):
        read(file, 0, config)


def test_plain_text_files(tmp_path: Path, make_config: MakeConfig) -> None:
    file = write(tmp_path / "chats.jsonl", [{"talk": []}])
    (tmp_path / "note.txt").write_text("a plain note", encoding="utf-8")
    config = config_of(make_config, {"dataset_path": str(file), "messages_field": "talk"})
    assert "a plain note" in read(tmp_path / "note.txt", 1, config)[0]
