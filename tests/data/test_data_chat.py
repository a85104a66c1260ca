"""Chats: which tokens are trained, token by token and by hand, for each kind of chat template; and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cadapter.classes import NO_CLASS
from cadapter.data import PreparedData, prepare_data
from cadapter.data.batches import micro_batch
from cadapter.errors import UsageError
from tests.chat_templates import (
    CHATML,
    CLOSED_BY_EOS,
    FORGETS_THOUGHTS,
    HEADERS,
    NO_SYSTEM,
    TOOLS,
    make_chat_tokenizer,
)
from tests.data.conftest import MakeConfig

Message = dict[str, Any]


def say(role: str, content: str | None, **more: Any) -> Message:
    return {"role": role, "content": content, **more}


SYSTEM = [say("system", "You are terse."), say("user", "Hi"), say("assistant", "Hello"), say("user", "Bye")]
TWO_ANSWERS = [*SYSTEM, say("assistant", "Bye.")]
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 6, "b": 7}}}]
WITH_TOOLS = [
    say("user", "How much is 6 * 7"),
    say("assistant", None, tool_calls=CALL),
    say("tool", "42"),
    say("assistant", "It is 42."),
    say("user", "Thanks"),
]
THOUGHTS = [say("user", "Hi"), say("assistant", "<think>\nhm\n</think>\n\nHello"), say("user", "Bye")]

# By hand. Each line is a list of tokens; those within « » are trained, which stand for no tokens themselves. A space
# that is a token is written ␣ and a line break ¶.
GOLDEN = {
    "system turns": (CHATML, {"messages": TWO_ANSWERS}, """
        <start> system ¶ You ␣ are ␣ terse . <end> ¶
        <start> user ¶ Hi <end> ¶
        <start> assistant ¶ « Hello <end> » ¶
        <start> user ¶ Bye <end> ¶
        <start> assistant ¶ « Bye . <end> » ¶"""),
    "a last turn of the user": (CHATML, {"messages": SYSTEM}, """
        <start> system ¶ You ␣ are ␣ terse . <end> ¶
        <start> user ¶ Hi <end> ¶
        <start> assistant ¶ « Hello <end> » ¶
        <start> user ¶ Bye <end> ¶"""),
    "BOS and headers": (HEADERS, {"messages": TWO_ANSWERS}, """
        <bos> <header> system </header> ¶ ¶ You ␣ are ␣ terse . <eos>
        <header> user </header> ¶ ¶ Hi <eos>
        <header> assistant </header> ¶ ¶ « Hello <eos> »
        <header> user </header> ¶ ¶ Bye <eos>
        <header> assistant </header> ¶ ¶ « Bye . <eos> »"""),
    "closed by EOS": (CLOSED_BY_EOS, {"messages": TWO_ANSWERS[1:]}, """
        <user> ¶ Hi <end> ¶
        <assistant> ¶ « Hello <end> » ¶
        <user> ¶ Bye <end> ¶
        <assistant> ¶ « Bye . <end> ¶ <eos> »"""),
    "tool turns": (TOOLS, {"messages": WITH_TOOLS, "tools": [{"name": "add"}]}, """
        <start> system ¶ add ␣ <end> ¶
        <start> user ¶ How ␣ much ␣ is ␣ 6 ␣ * ␣ 7 <end> ¶
        <start> assistant ¶ « <tool_call> add ␣ a ␣ 6 ␣ b ␣ 7 <end> » ¶
        <start> tool ¶ 42 <end> ¶
        <start> assistant ¶ « It ␣ is ␣ 42 . <end> » ¶
        <start> user ¶ Thanks <end> ¶"""),
    "thinking blocks": (CHATML, {"messages": THOUGHTS}, """
        <start> user ¶ Hi <end> ¶
        <start> assistant ¶ « <think> ¶ hm ¶ </think> ¶ ¶ Hello <end> » ¶
        <start> user ¶ Bye <end> ¶"""),
    "thoughts in the only answer": (FORGETS_THOUGHTS, {"messages": THOUGHTS[:2]}, """
        <start> user ¶ Hi <end> ¶
        <start> assistant ¶ « <think> ¶ hm ¶ </think> ¶ ¶ Hello <end> » ¶"""),
    "an empty answer": (CHATML, {"messages": [say("user", "Hi"), say("assistant", "")]}, """
        <start> user ¶ Hi <end> ¶
        <start> assistant ¶ « <end> » ¶"""),
}  # fmt: skip


def by_hand(golden: str) -> list[tuple[str, bool]]:
    """(token, trained) of a golden example."""
    tokens, trained = [], False
    for word in golden.split():
        if word in "«»":
            trained = word == "«"
        else:
            tokens.append(({"␣": " ", "¶": "\n"}.get(word, word), trained))
    return tokens


@pytest.fixture
def prepare(tmp_path: Path, make_config: MakeConfig):
    """``prepare(template, records, config keys …, dataset={…})`` → prepared data."""

    def run(
        template: str | None,
        records: list[Any],
        dataset: dict[str, Any] | None = None,
        skip_bad: int | None = None,
        **keys: Any,
    ):
        model = tmp_path / "chat-model"
        make_chat_tokenizer(model, template)
        file = tmp_path / "chats.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        table = {"dataset_path": str(file), **({"messages_field": "messages"} if dataset is None else dataset)}
        config = make_config([table], **{"model_dir": str(model), "eval_fraction": 0, **keys})
        return prepare_data(config, skip_bad=skip_bad)

    return run


def tokens_of(data: PreparedData, row: int = 0) -> list[tuple[str, bool]]:
    ids, _, trained = data.train.rows([row])
    count = int(data.train.tokens[row])
    words = data.tokenizer.fast.convert_ids_to_tokens(ids[0, :count].tolist())
    return list(zip(words, trained[0, :count].tolist(), strict=True))


@pytest.mark.parametrize("kind", GOLDEN)
def test_golden_examples(prepare, kind: str) -> None:
    template, record, golden = GOLDEN[kind]
    expected = by_hand(golden)
    data = prepare(template, [record])
    found = tokens_of(data)
    # BOS begins the sequence; a template that writes it itself does not get another one.
    assert found == ([] if expected[0][0] == "<bos>" else [("<bos>", False)]) + expected
    assert data.train.trained == (sum(trained for _, trained in expected), 0, 0)


def test_the_class_is_that_of_the_chat_also_where_nothing_is_trained(prepare) -> None:
    """The prompt is changed by the adapter as it is when text is generated; it only has no cross-entropy."""
    data = prepare(CHATML, [{"messages": TWO_ANSWERS}], {"messages_field": "messages", "control_class": -1})
    count = int(data.train.tokens[0])
    batch = micro_batch(data.train, np.array([0]))
    assert set(batch.classes[0, : count - 1].tolist()) == {-1}
    assert set(batch.classes[0, count - 1 :].tolist()) == {NO_CLASS}
    expected = by_hand(GOLDEN["system turns"][2])
    labels = [label for label in batch.labels[0].tolist() if label != -100]
    words = data.tokenizer.fast.convert_ids_to_tokens(labels)
    assert words == [word for word, trained in expected if trained]


def test_a_class_for_each_record(prepare) -> None:
    chat = TWO_ANSWERS[1:3]
    records = [{"messages": chat, "class": class_} for class_ in (1, -1, 0, -1.0)]
    data = prepare(CHATML, records, {"messages_field": "messages", "class_field": "class"})
    ids, classes, _ = data.train.rows(range(len(data.train)))
    ends = data.tokenizer.fast.convert_tokens_to_ids("<end>")
    assert sorted(classes[ids == ends].tolist()) == [-1, -1, -1, -1, 0, 0, 1, 1]
    assert data.reports[0].control_class is None
    assert data.train.trained == (2, 4, 12)  # a neutral chat counts in all its tokens


@pytest.mark.parametrize("value", [2, "1", True, None, 0.5])
def test_no_such_class(prepare, value: Any) -> None:
    with pytest.raises(UsageError, match="line 1: 'class' must be 1, -1 or 0"):
        prepare(CHATML, [{"messages": SYSTEM, "class": value}], {"messages_field": "messages", "class_field": "class"})


PAIR = {"chosen_field": "chosen", "rejected_field": "rejected"}


@pytest.mark.parametrize("as_chat", [True, False])
def test_pairs(prepare, as_chat: bool) -> None:
    """A pair gives two documents of opposite class, which are held out together."""

    def side(text: str) -> Any:
        return [say("user", "Hi"), say("assistant", text)] if as_chat else text

    records = [{"chosen": side(f"Hello {'Hi ' * n}"), "rejected": side(f"Bye {'Hi ' * n}")} for n in range(10)]
    data = prepare(CHATML, records, PAIR, eval_fraction=0.3)
    assert (data.reports[0].documents, data.reports[0].eval_documents) == (14, 6)
    held = [(document.control_class, data.tokenizer.fast.decode(document.ids)) for document in data.documents]
    chosen = sorted(text.replace("Hello", "") for class_, text in held if class_ == 1)
    rejected = sorted(text.replace("Bye", "") for class_, text in held if class_ == -1)
    assert len(chosen) == 3
    assert chosen == rejected
    positive, negative, neutral = data.train.trained
    assert positive == negative > 0
    assert neutral == 0


def test_a_pair_that_is_none(prepare) -> None:
    with pytest.raises(UsageError, match="line 1: 'chosen' and 'rejected' are the same"):
        prepare(CHATML, [{"chosen": "Hi", "rejected": "Hi"}], PAIR)


def test_a_pair_with_a_half_that_is_too_long(prepare) -> None:
    """Both halves are left out."""
    records = [{"chosen": "Hi " * 40, "rejected": "Bye"}, {"chosen": "Hi", "rejected": "Bye"}]
    data = prepare(CHATML, records, PAIR)
    assert (data.reports[0].documents, data.reports[0].overlength_documents) == (2, 2)


def test_prefixes_and_suffixes_of_chats(prepare) -> None:
    chat = {"messages": TWO_ANSWERS[1:3]}
    plain = by_hand("<start> user ¶ Hi <end> ¶ <start> assistant ¶ « Hello <end> » ¶")
    # The template ends the turn, so the default suffix, EOS, is not put there; one that is asked for is trained.
    assert tokens_of(prepare(CHATML, [chat])) == [("<bos>", False), *plain]
    given = tokens_of(prepare(CHATML, [chat], document_suffix="<eos>", document_prefix="Hi", sequence_prefix=""))
    assert given == [("Hi", False), *plain, ("<eos>", True)]
    unanswered = tokens_of(prepare(CHATML, [{"messages": SYSTEM}], document_suffix="<eos>"))
    assert unanswered[-1] == ("<eos>", False)
    # What the template has written already is not written again.
    headers = by_hand("<bos> <header> user </header> ¶ ¶ Hi <eos> <header> assistant </header> ¶ ¶ « Hello <eos> »")
    again = {"document_prefix": "<bos>", "document_suffix": "<eos>", "sequence_prefix": ""}
    assert tokens_of(prepare(HEADERS, [chat], **again)) == headers
    assert tokens_of(prepare(HEADERS, [chat], mask_tokens=True)) == [
        (word, trained and word != "<eos>") for word, trained in headers
    ]


def test_a_token_that_a_turn_shares_with_its_prompt(prepare) -> None:
    """It begins before the turn, so the model will have been given it: not trained."""
    template = CHATML.replace("assistant\\n'", "assistant\\nHel'")  # "Hello" begins in the prompt
    found = tokens_of(prepare(template, [{"messages": TWO_ANSWERS[1:3]}]))
    assert [word for word, trained in found if trained] == ["<end>"]


REFUSED: dict[str, tuple[str | None, Any, str]] = {
    "no template": (None, SYSTEM, "the tokenizer has no chat template"),
    "no answer": (CHATML, SYSTEM[:2], "line 1: no message is the assistant's, so that there is nothing to train"),
    "answer first": (CHATML, [say("assistant", "Hi")], "the first message is the assistant's"),
    "rewrites": (
        FORGETS_THOUGHTS, [*THOUGHTS, say("assistant", "Bye")], "renders the first 2 messages differently in the whole",
    ),
    "rewrites when it goes on": (
        FORGETS_THOUGHTS.replace("not loop.last", "(not loop.last or add_generation_prompt)"),
        [*THOUGHTS, say("assistant", "Bye")], "renders the first 2 messages differently in the whole",
    ),
    "another prompt": (
        CHATML.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}"), SYSTEM,
        "renders the first 2 messages with the prompt for an answer differently in the whole chat",
    ),
    "fails": (NO_SYSTEM, TWO_ANSWERS, "chat-model fails: there is no system role here"),
    "two BOS": (HEADERS.replace("'<bos>'", "'<bos><bos>'"), SYSTEM, "the chat begins with BOS twice"),
    "no list": (CHATML, "Hi", 'line 1: messages must be a list of objects with \'role\' and \'content\': "Hi"'),
    "empty list": (CHATML, [], "line 1: messages must be a list"),
    "a string in it": (CHATML, ["Hi"], 'line 1: message 1 must be an object with \'role\' and \'content\': "Hi"'),
    "other names": (CHATML, [{"from": "user", "value": "Hi"}], "message 1 must be an object with 'role'"),
    "no content": (CHATML, [say("user", None)], "message 1 has no content"),
    "a number": (CHATML, [say("user", 3)], "the content of message 1 must be a string"),  # type: ignore[arg-type]
    "half a pair": (CHATML, [say("user", "\ud800"), say("assistant", "")], "half of a surrogate pair"),
    "null": (CHATML, None, "line 1: messages must be a list of objects"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(prepare, case: str) -> None:
    template, messages, says = REFUSED[case]
    with pytest.raises(UsageError, match=re.escape(says)):
        prepare(template, [{"messages": messages}])


@pytest.mark.parametrize("skip_bad", [0, 1000])
def test_a_missing_chat_template_is_one_error_and_no_bad_record(prepare, skip_bad: int) -> None:
    with pytest.raises(UsageError) as refused:
        prepare(None, [{"messages": SYSTEM}] * 3, skip_bad=skip_bad)
    told = str(refused.value)
    assert re.fullmatch(
        r".*chat-model: the tokenizer has no chat template, which the chats of the data need\.\n"
        r"Use the model's instruction-tuned version, or put a chat_template\.jinja into .*chat-model\.",
        told,
    )


@pytest.mark.parametrize("case", ["no answer", "rewrites", "fails", "answer first"])
def test_the_record_is_shown(prepare, case: str) -> None:
    template, messages, _ = REFUSED[case]
    with pytest.raises(UsageError) as refused:
        prepare(template, [{"messages": messages}])
    assert f"The record: {json.dumps(messages)}" in str(refused.value)


def test_a_masked_answer_trains_nothing(prepare) -> None:
    with pytest.raises(UsageError, match="line 1: the chat trains no token"):
        prepare(CHATML, [{"messages": [say("user", "Hi"), say("assistant", "")]}], mask_tokens=True)


@pytest.mark.parametrize("mask_tokens", [True, None])
def test_a_chat_of_nothing_but_space_is_an_empty_document(prepare, mask_tokens: bool | None) -> None:
    plain = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    blank = {"messages": [say("user", " "), say("assistant", " \n ")]}
    spoken = {"messages": [say("user", "Hi "), say("assistant", "Hello")]}
    keys = {} if mask_tokens is None else {"mask_tokens": mask_tokens}
    (report,) = prepare(plain, [blank, spoken, blank], **keys).reports
    assert (report.documents, report.empty_documents) == (1, 2)


def test_the_template_is_sandboxed(prepare) -> None:
    template = "{{ messages.__class__.__mro__ }}"
    with pytest.raises(UsageError, match="fails"):
        prepare(template, [{"messages": TWO_ANSWERS}])
    with pytest.raises(UsageError, match="fails"):
        prepare("{{ messages.append(1) }}", [{"messages": TWO_ANSWERS}])


def test_parquet_has_chats_too(tmp_path: Path, make_config: MakeConfig) -> None:
    """A column of objects has every key in every row, null where a message has none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    make_chat_tokenizer(tmp_path / "chat-model", TOOLS)
    calls = json.loads(json.dumps(CALL))
    messages = [{**message, "tool_calls": calls} if message.get("tool_calls") else message for message in WITH_TOOLS]
    file = tmp_path / "chats.parquet"
    pq.write_table(pa.table({"messages": [messages], "tools": [[{"name": "add"}]]}), file)
    assert "tool_calls" in pq.read_table(file).to_pylist()[0]["messages"][0]
    table = {"dataset_path": str(file), "messages_field": "messages"}
    data = prepare_data(make_config([table], model_dir=str(tmp_path / "chat-model"), eval_fraction=0))
    assert tokens_of(data) == [("<bos>", False), *by_hand(GOLDEN["tool turns"][2])]
