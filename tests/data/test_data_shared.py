"""Real texts with a real tokenizer, where they lie beside the project: every token of every text comes out again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from cadapter.classes import NO_CLASS
from cadapter.data import prepare_data
from tests.data.conftest import MakeConfig

SHARED = Path(__file__).resolve().parents[3] / "shared"
MODEL = SHARED / "models" / "tiny-english-14m"
CLASSES = {"reviews_pos": 1, "reviews_neg": -1, "shakespeare": 0}
BOS, EOS, USER, ASSISTANT = 1, 2, 3, 4

pytestmark = pytest.mark.skipif(
    not (MODEL.is_dir() and (SHARED / "data").is_dir()), reason=f"no texts and tokenizer in {SHARED}"
)


def texts_of(name: str) -> list[str]:
    lines = (SHARED / "data" / f"{name}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def reference(texts: list[str]) -> list[list[int]]:
    """What transformers makes of the texts, with EOS at the end."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    return [[*ids, EOS] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def make(make_config: MakeConfig, tmp_path: Path, **keys: Any):
    tables = [
        {"dataset_path": str(SHARED / "data" / f"{name}.jsonl"), "control_class": class_}
        for name, class_ in CLASSES.items()
    ]
    keys = {"model_dir": str(MODEL), "cache_dir": str(tmp_path / "cache"), "sequence_len": 1024, **keys}
    return prepare_data(make_config(tables, **keys))


@pytest.mark.parametrize("keys", [{}, {"mix_datasets": True}, {"overlength": "drop", "sequence_len": 2048}])
def test_every_token_comes_out_again(make_config: MakeConfig, tmp_path: Path, keys: dict[str, Any]) -> None:
    data = make(make_config, tmp_path, eval_fraction=0.05, **keys)
    assert [report.documents + report.eval_documents + report.overlength_documents for report in data.reports] == [
        900, 900, 176
    ]  # fmt: skip
    counts = np.zeros((3, 4096), np.int64)
    for part in (data.train, data.evaluation):
        ids, classes, _ = part.rows(range(len(part)))
        for row, class_ in enumerate(CLASSES.values()):
            counts[row] += np.bincount(ids[classes == class_], minlength=4096)
        assert (ids[:, 0] == BOS).all()
        assert (classes[:, 0] == NO_CLASS).all()
    room = 2047 if keys.get("overlength") else 10**9
    for row, (name, report) in enumerate(zip(CLASSES, data.reports, strict=True)):
        expected = [ids for ids in reference(texts_of(name)) if len(ids) <= room]
        assert report.overlength_documents == len(texts_of(name)) - len(expected)
        assert counts[row].tolist() == np.bincount(np.concatenate(expected), minlength=4096).tolist()


def test_chats_of_real_texts(make_config: MakeConfig, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(MODEL, model, ignore=shutil.ignore_patterns("*.safetensors*"))
    (model / "chat_template.jinja").write_text(
        "{%- for message in messages %}"
        "{{- '<|' + message.role + '|>' + message.content }}"
        "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}"
        "{%- endfor %}{%- if add_generation_prompt %}{{- '<|assistant|>' }}{% endif %}"
    )
    file = tmp_path / "pairs.jsonl"
    question = {"role": "user", "content": "How was it?"}
    both = list(zip(texts_of("reviews_pos"), texts_of("reviews_neg"), strict=True))

    def chat(text: str) -> list[dict[str, str]]:
        return [question, {"role": "assistant", "content": text[:500]}]

    pairs = [{"good": chat(good), "bad": chat(bad)} for good, bad in both]
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    table = {"dataset_path": str(file), "chosen_field": "good", "rejected_field": "bad"}
    data = prepare_data(make_config([table], model_dir=str(model), sequence_len=512, eval_fraction=0))
    assert data.reports[0].documents == 1800
    # The answers by themselves: the template puts a special token on both sides, so that they tokenise alike.
    answers = [reference([text[:500] for text in side]) for side in zip(*both, strict=True)]
    assert data.train.trained == (*(sum(map(len, side)) for side in answers), 0)
    ids, _, trained = data.train.rows(range(len(data.train)))
    assert not trained[(ids == USER) | (ids == ASSISTANT)].any()
    assert (ids == EOS).sum() == trained[ids == EOS].sum() == 1800
