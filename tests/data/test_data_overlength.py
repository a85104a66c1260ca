"""Records longer than a sequence: split, truncated, dropped or refused, and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cadapter.data import PreparedData, prepare_data
from cadapter.data.packing import DOCUMENT_START
from cadapter.errors import UsageError
from tests.chat_templates import CHATML, make_chat_tokenizer
from tests.data.conftest import MakeConfig, write_jsonl
from tests.tiny_tokenizer import BOS

ROOM = 63
"""Tokens of a sequence of 64 besides BOS."""


def prepare(tmp_path: Path, make_config: MakeConfig, texts: list[str], **keys: Any) -> PreparedData:
    file = write_jsonl(tmp_path / "a.jsonl", texts)
    return prepare_data(make_config([{"dataset_path": str(file)}], **{"eval_fraction": 0, **keys}))


def letters(count: int) -> str:
    """A text of so many tokens less one, which is EOS's."""
    return "x" * (count - 1)


def test_plain_text_is_split(tmp_path: Path, make_config: MakeConfig) -> None:
    data = prepare(tmp_path, make_config, [letters(100), letters(30)])
    (report,) = data.reports
    assert (report.tokens, report.documents, report.split_documents) == (130, 2, 2)
    assert (report.overlength_documents, report.truncated_documents, report.dropped_tokens) == (0, 0, 0)
    assert report.sequences == -(-130 // ROOM)


def test_drop(tmp_path: Path, make_config: MakeConfig) -> None:
    data = prepare(tmp_path, make_config, [letters(ROOM + 1), letters(ROOM), letters(30)], overlength="drop")
    (report,) = data.reports
    assert (report.documents, report.overlength_documents, report.split_documents) == (2, 1, 0)
    assert data.train.tokens.tolist() == [64, 31]
    assert report.padding == 33


def test_truncate(tmp_path: Path, make_config: MakeConfig) -> None:
    data = prepare(tmp_path, make_config, [letters(100), letters(30)], overlength="truncate")
    (report,) = data.reports
    assert (report.documents, report.truncated_documents, report.truncated_tokens) == (2, 1, 100 - ROOM)
    assert data.train.tokens.tolist() == [64, 31]
    ids = data.train.rows([0, 1])[0]
    assert 2 not in ids[0]  # a document that was cut has no end
    assert ids[1, 30] == 2


def test_error(tmp_path: Path, make_config: MakeConfig) -> None:
    with pytest.raises(UsageError, match=r"a\.jsonl, line 2: the document has 64 tokens, which do not fit .* \(63\)"):
        prepare(tmp_path, make_config, [letters(ROOM), letters(ROOM + 1)], overlength="error")


def test_a_document_with_its_own_bos_has_room_for_it(tmp_path: Path, make_config: MakeConfig) -> None:
    """The sequence's takes its place."""
    texts = [BOS + letters(ROOM), BOS + letters(ROOM + 1)]
    data = prepare(tmp_path, make_config, texts, overlength="drop")
    assert (data.reports[0].documents, data.reports[0].overlength_documents) == (1, 1)
    assert data.train.tokens.tolist() == [64]


def test_all_too_long(tmp_path: Path, make_config: MakeConfig) -> None:
    with pytest.raises(UsageError, match=r"has no documents \(only 2 longer than a sequence\)"):
        prepare(tmp_path, make_config, [letters(100)] * 2, overlength="drop")


PROMPT, LONG = "Hi " * 5, "Hi " * 90


@pytest.mark.parametrize(
    ("question", "as_chat", "keys", "others"),
    [
        (PROMPT, False, {}, ["truncate", "split"]),
        (PROMPT, True, {"overlength": "drop"}, ["truncate", "split"]),
        (LONG, True, {"overlength": "truncate"}, ["split"]),  # nothing of the answers is left
    ],
)
def test_what_is_said_of_pairs_that_are_all_too_long_helps(
    tmp_path: Path, make_config: MakeConfig, question: str, as_chat: bool, keys: dict[str, Any], others: list[str]
) -> None:
    make_chat_tokenizer(tmp_path / "chat-model", CHATML)

    def side(word: str) -> Any:
        answer = f"{word} " * 60
        turns = [("user", question), ("assistant", answer)]
        return [{"role": role, "content": content} for role, content in turns] if as_chat else question + answer

    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"chosen": side("Hello"), "rejected": side("Bye")}) + "\n")
    table = {"dataset_path": str(file), "chosen_field": "chosen", "rejected_field": "rejected"}

    def documents(**changes: Any) -> int:
        settings = {"model_dir": str(tmp_path / "chat-model"), "eval_fraction": 0, **keys, **changes}
        return prepare_data(make_config([table], **settings)).reports[0].documents

    with pytest.raises(UsageError) as caught:
        documents()
    assert str(caught.value).splitlines() == [
        f"The dataset {file} has no documents (only 2 longer than a sequence).",
        f"Raise sequence_len, or set overlength to {' or '.join(map(json.dumps, others))}.",
    ]
    assert documents(sequence_len=512) == 2
    assert [documents(overlength=each) for each in others] == [2] * len(others)


def test_a_dataset_has_its_own(tmp_path: Path, make_config: MakeConfig) -> None:
    file = str(write_jsonl(tmp_path / "a.jsonl", [letters(100), letters(30)]))
    tables = [{"dataset_path": file}, {"dataset_path": file, "overlength": "truncate"}]
    first, second = prepare_data(make_config(tables, eval_fraction=0, overlength="drop")).reports
    assert (first.overlength_documents, first.truncated_documents) == (1, 0)
    assert (second.overlength_documents, second.truncated_documents) == (0, 1)


def test_a_single_whole_document_is_not_split_for_evaluation(tmp_path: Path, make_config: MakeConfig) -> None:
    data = prepare(tmp_path, make_config, [letters(50)], overlength="drop", eval_fraction=0.5)
    assert data.evaluation is None
    assert data.train.tokens.tolist() == [51]


def test_max_tokens_cuts_no_whole_document(tmp_path: Path, make_config: MakeConfig) -> None:
    file = str(write_jsonl(tmp_path / "a.jsonl", [letters(20 + n) for n in range(10)]))
    table = {"dataset_path": file, "max_tokens": 100, "overlength": "drop"}
    (report,) = prepare_data(make_config([table], eval_fraction=0)).reports
    assert 70 < report.tokens <= 100
    assert report.over_limit == 10 - report.documents > 5
    assert report.dropped_tokens == 0


def test_a_mixture_keeps_whole_what_is_to_stay_whole(tmp_path: Path, make_config: MakeConfig) -> None:
    good = str(write_jsonl(tmp_path / "good.jsonl", ["g" * n for n in (5, 40, 22, 31, 12, 50)]))
    bad = str(write_jsonl(tmp_path / "bad.jsonl", ["b" * n for n in (100, 90, 33)]))
    other = str(write_jsonl(tmp_path / "other.jsonl", ["o" * n for n in (10, 20)]))
    tables = [
        {"dataset_path": good, "overlength": "drop"},
        {"dataset_path": bad, "control_class": -1},
        {"dataset_path": other, "control_class": 0, "overlength": "error"},
    ]
    data = prepare_data(make_config(tables, eval_fraction=0, mix_datasets=True))
    ids, classes, flags = data.train.gather(range(len(data.train)))
    starts = (flags & DOCUMENT_START) != 0
    whole = [row for row in range(len(ids)) if not (classes[row] == -1).any()]
    assert sorted(starts[whole].sum(axis=1).tolist(), reverse=True)[0] > 1
    assert starts[whole].sum() == 8  # of good and other, together
    assert len({*classes[whole].ravel().tolist()} - {2}) == 2  # both in the same sequences
    assert (classes == -1).sum() == 100 + 90 + 33 + 3


@pytest.mark.parametrize(("overlength", "kept"), [(None, 1), ("drop", 1), ("truncate", 2), ("split", 2)])
def test_chats(tmp_path: Path, make_config: MakeConfig, overlength: str | None, kept: int) -> None:
    """They stay whole unless "split" is asked for; one whose whole answer would be cut off is left out."""
    make_chat_tokenizer(tmp_path / "chat-model", CHATML)

    def chat(prompt: int, answer: int) -> dict[str, Any]:
        turns = [("user", "Hi " * prompt), ("assistant", "Hello " * answer)]
        return {"messages": [{"role": role, "content": content} for role, content in turns]}

    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in (chat(2, 5), chat(5, 40), chat(60, 1))))
    table = {"dataset_path": str(file), "messages_field": "messages"}
    keys = {} if overlength is None else {"overlength": overlength}
    data = prepare_data(make_config([table], model_dir=str(tmp_path / "chat-model"), eval_fraction=0, **keys))
    (report,) = data.reports
    if overlength == "split":
        assert (report.documents, report.whole) == (3, False)
        return
    assert (report.documents, report.overlength_documents) == (kept, 3 - kept)
    hello = data.tokenizer.fast.convert_tokens_to_ids("Hello")
    ids, _, trained = data.train.rows(range(len(data.train)))
    assert trained[ids == hello].all()
    assert np.count_nonzero(trained) == data.train.trained[0]
