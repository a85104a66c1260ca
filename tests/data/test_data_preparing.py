"""From files to packed sequences: what a config asks for is what comes out, and every mistake says what it is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from cadapter.classes import NO_CLASS
from cadapter.data import PackedSequences, PreparedData, documents_from_file, fingerprint_of, prepare_data
from cadapter.errors import UsageError
from tests.data.conftest import MakeConfig, write_jsonl
from tests.tiny_tokenizer import BOS, EOS, make_tokenizer

WORDS = ["fox", "dog", "film", "operator", "inverse", "stream", "block", "adds", "little", "turned", "best", "worst"]


def texts_of(count: int, label: str, words: int = 12) -> list[str]:
    rng = np.random.default_rng(len(label) + count)
    return [f"{label} {number} " + " ".join(rng.choice(WORDS, words)) for number in range(count)]


def own_tokens(sequences: PackedSequences) -> list[tuple[int, int]]:
    """(id, class) of every token of the documents, in order: no prefix, no padding."""
    ids, classes, _ = sequences.rows(range(len(sequences)))
    return [pair for pair in zip(ids.ravel().tolist(), classes.ravel().tolist(), strict=True) if pair[1] != NO_CLASS]


def decoded(data: PreparedData, sequences: PackedSequences) -> list[str]:
    """The documents that the sequences hold, as texts."""
    text = data.tokenizer.fast.decode([id_ for id_, _ in own_tokens(sequences)])
    return text.split(EOS)[:-1]


def test_the_whole_way(tmp_path: Path, make_config: MakeConfig) -> None:
    good, bad = texts_of(60, "good"), texts_of(45, "bad")
    files = {write_jsonl(tmp_path / "good.jsonl", [*good, "", "  \n"]): 1, write_jsonl(tmp_path / "bad.jsonl", bad): -1}
    data = prepare_data(make_config(files, eval_fraction=0.1))

    assert sorted(decoded(data, data.train) + decoded(data, data.evaluation)) == sorted(good + bad)
    held = decoded(data, data.evaluation)
    assert (sum(text in good for text in held), sum(text in bad for text in held)) == (6, 5)
    tokens = own_tokens(data.train)
    first_bad = [class_ for _, class_ in tokens].index(-1)
    assert {class_ for _, class_ in tokens[:first_bad]} == {1}
    assert {class_ for _, class_ in tokens[first_bad:]} == {-1}
    ids, _, trained = data.train.rows(range(len(data.train)))
    assert (ids[:, 0] == 1).all()
    assert not trained[:, 0].any()

    first, second = data.reports
    assert (first.name, first.documents, first.eval_documents, first.empty_documents) == ("good", 54, 6, 2)
    assert (second.name, second.documents, second.eval_documents, second.empty_documents) == ("bad", 40, 5, 0)
    assert first.trained == (first.tokens, 0, 0)
    assert second.trained == (0, second.tokens, 0)
    assert first.tokens + second.tokens == len(tokens) == sum(data.train.trained)
    assert first.sequences + second.sequences == len(data.train)
    assert data.train.padding == len(data.train) * 63 - len(tokens) == first.padding + second.padding
    assert all(report.dropped_tokens == 0 for report in data.reports)


def test_held_out_documents_stand_alone(tmp_path: Path, make_config: MakeConfig, model_dir: Path) -> None:
    texts = [*texts_of(18, "short"), *texts_of(2, "long", 100)]
    file = write_jsonl(tmp_path / "a.jsonl", texts)
    config = make_config({file: -1}, eval_fraction=0.5, mask_tokens=2, document_prefix="doc: ")
    data = prepare_data(config)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_dir)
    doc, *bodies = tokenizer(["doc: ", *texts], add_special_tokens=False)["input_ids"]
    expected = {(1, *doc, *body, 2)[:64] for body in bodies}
    assert len(data.documents) == 10
    for document in data.documents:
        assert tuple(document.ids.tolist()) in expected
        assert (document.dataset, document.control_class) == ("a", -1)
        assert document.trained.tolist() == [id_ not in (1, 2) for id_ in document.ids.tolist()]
    again = documents_from_file(str(file), 1, config, data.tokenizer)
    assert {tuple(document.ids.tolist()) for document in again} == expected
    assert {(document.dataset, document.control_class) for document in again} == {("a", 1)}
    lengths = {len(document.ids) for document in again}
    assert max(lengths) == 64 > min(lengths)
    whole = [1 + len(doc) + len(body) + 1 for body in bodies]
    assert sorted(document.left_out for document in again) == sorted(max(0, length - 64) for length in whole)
    for document in data.documents:  # the cache keeps what was cut
        assert document.left_out in {each.left_out for each in again if each.ids.tolist() == document.ids.tolist()}
    assert fingerprint_of(config) == data.fingerprint
    assert fingerprint_of(make_config({file: 1}, eval_fraction=0.5, mask_tokens=2)) != data.fingerprint


def test_a_text_with_its_own_bos(tmp_path: Path, make_config: MakeConfig) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [f"{BOS}one{EOS}", f"{BOS}two"])
    data = prepare_data(make_config({file: 1}, eval_fraction=0))
    text = data.tokenizer.fast.decode(data.train.rows([0])[0][0][: data.train.tokens[0]])
    assert text == f"{BOS}one{EOS}{BOS}two{EOS}"
    assert data.reports[0].dropped_tokens == 0  # its BOS took the place of the sequence's own
    documents = documents_from_file(str(file), 1, make_config({file: 1}), data.tokenizer)
    assert [data.tokenizer.fast.decode(document.ids) for document in documents] == [f"{BOS}one{EOS}", f"{BOS}two{EOS}"]


def test_a_single_document_gives_its_end(tmp_path: Path, make_config: MakeConfig) -> None:
    (tmp_path / "a.txt").write_text(texts_of(1, "only", 400)[0])
    whole = prepare_data(make_config({tmp_path / "a.txt": 1}, eval_fraction=0))
    split = prepare_data(make_config({tmp_path / "a.txt": 1}, eval_fraction=0.25))
    assert whole.evaluation is None
    assert whole.documents == []
    both = own_tokens(split.train) + own_tokens(split.evaluation)
    assert both == own_tokens(whole.train)
    assert len(own_tokens(split.evaluation)) == round(len(both) / 4)
    assert len(split.documents) == 1


def test_neutral_and_masked_tokens(tmp_path: Path, make_config: MakeConfig) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", texts_of(10, "neutral"))
    data = prepare_data(make_config({file: 0}, eval_fraction=0, mask_tokens=True))
    tokens = own_tokens(data.train)
    assert {class_ for _, class_ in tokens} == {0}
    assert data.train.trained == (0, 0, len(tokens))
    ids, _, trained = data.train.rows(range(len(data.train)))
    assert not trained[ids == 2].any()
    masked = prepare_data(make_config({file: 1}, eval_fraction=0, mask_tokens=True))
    assert masked.train.trained == (len(tokens) - 10, 0, 0)


def test_limits(tmp_path: Path, make_config: MakeConfig) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", texts_of(100, "a")))
    other = str(write_jsonl(tmp_path / "b.jsonl", texts_of(100, "b")))
    limited = [{"dataset_path": path, "max_tokens": 500}, {"dataset_path": other, "max_sequences": 4}]
    data = prepare_data(make_config(limited, max_sequences=7, eval_fraction=0))
    whole = prepare_data(make_config([{"dataset_path": path}, {"dataset_path": other}], eval_fraction=0))
    first, second = data.reports
    assert (first.tokens, first.sequences) == (500, 7)  # of eight, the seven that the config's limit leaves
    assert first.dropped_tokens in (500 - 7 * 63, 63)  # whether the padded one is among them
    assert second.sequences == 4
    all_rows = {row.tobytes() for row in whole.train.rows(range(len(whole.train)))[0]}
    chosen = [row.tobytes() for row in data.train.rows(range(7, 11))[0]]
    assert len(all_rows & set(chosen)) == 4


def test_drop_tails(tmp_path: Path, make_config: MakeConfig) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", texts_of(40, "a", 30)))
    data = prepare_data(make_config([{"dataset_path": path}], drop_tails=True, eval_fraction=0.5))
    assert data.train.padding == data.evaluation.padding == 0
    assert len(data.documents) == 20
    (report,) = data.reports
    kept = 63 * (report.sequences + report.eval_sequences)
    assert report.dropped_tokens == report.tokens + report.eval_tokens - kept > 0
    own = prepare_data(make_config([{"dataset_path": path, "drop_tails": False}], drop_tails=True, eval_fraction=0.5))
    assert own.reports[0].dropped_tokens == 0


def test_mixed_datasets(tmp_path: Path, make_config: MakeConfig) -> None:
    good, bad = texts_of(50, "good"), texts_of(50, "bad")
    files = {write_jsonl(tmp_path / "good.jsonl", good): 1, write_jsonl(tmp_path / "bad.jsonl", bad): -1}
    data = prepare_data(make_config(files, eval_fraction=0.1, mix_datasets=True))
    texts = decoded(data, data.train)
    assert sorted(texts + decoded(data, data.evaluation)) == sorted(good + bad)
    labels = "".join(text[0] for text in texts)
    assert labels.count("gb") + labels.count("bg") > 20  # shuffled: 45 changes are expected of 90 documents
    for id_class in (own_tokens(data.train), own_tokens(data.evaluation)):
        document: list[tuple[int, int]] = []
        for pair in id_class:
            document.append(pair)
            if pair[0] == 2:
                text = data.tokenizer.fast.decode([id_ for id_, _ in document])
                assert {class_ for _, class_ in document} == {1 if text.startswith("good") else -1}
                document = []
    assert {(document.dataset, document.control_class) for document in data.documents} == {("good", 1), ("bad", -1)}
    assert len(data.directories) == 1
    (sum_good, _, _), (_, sum_bad, _) = data.train.trained, data.train.trained
    assert (sum_good, sum_bad) == tuple(report.tokens for report in data.reports)


def test_limits_of_mixed_datasets(tmp_path: Path, make_config: MakeConfig) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", texts_of(100, "a")))
    other = str(write_jsonl(tmp_path / "b.jsonl", texts_of(100, "b")))
    tables = [{"dataset_path": path, "max_sequences": 3}, {"dataset_path": other, "max_tokens": 400}]
    data = prepare_data(make_config(tables, mix_datasets=True, eval_fraction=0))
    assert [report.tokens for report in data.reports] == [3 * 63, 400]


def test_names_of_datasets(tmp_path: Path, make_config: MakeConfig) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / "a.jsonl", texts_of(5, folder))
    file, other = (str(tmp_path / folder / "a.jsonl") for folder in ("x", "y"))
    lone = str(write_jsonl(tmp_path / "b.jsonl", texts_of(5, "b")))
    paths = [file, other, lone, lone, str(tmp_path / "*" / "a.jsonl")]
    data = prepare_data(make_config([{"dataset_path": path} for path in paths]))
    assert [report.name for report in data.reports] == [file, other, f"{lone} (3)", f"{lone} (4)", paths[4]]


def test_no_evaluation_is_said(tmp_path: Path, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", texts_of(40, "a"))
    data = prepare_data(make_config({file: 1}, drop_tails=True))
    assert data.evaluation is None
    assert len(data.documents) == 1
    assert "gives no sequence for evaluation: its held-out documents do not fill one" in capsys.readouterr().err


ERRORS = {
    "empty dataset": ({"a.jsonl": '{"text": ""}\n{"text": " "}'}, {}, "has no documents (only 2 with empty text)"),
    "nothing in it": ({"a.jsonl": "\n\n"}, {}, "a.jsonl has no documents (none)"),
    "empty text": ({"a.txt": ""}, {}, "a.txt has no documents (only 1 with empty text)"),
    "a broken line": ({"a.jsonl": '{"text": "a"}\n{'}, {}, "a.jsonl, line 2: broken JSON"),
    "not one sequence": ({"a.txt": "a fox"}, {"drop_tails": True}, "there is no training sequence"),
    "all masked": ({"a.txt": EOS}, {"mask_tokens": True, "eval_fraction": 0}, "there is no token to train on"),
    "unknown id": ({"a.txt": "a fox"}, {"sequence_prefix": 5000}, "sequence_prefix: 5000 is outside"),
    "missing": ({}, {}, "a.txt does not exist"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors_leave_nothing_behind(tmp_path: Path, make_config: MakeConfig, case: str) -> None:
    files, keys, message = ERRORS[case]
    (tmp_path / "data").mkdir()
    for name, text in files.items():
        (tmp_path / "data" / name).write_text(text)
    config = make_config({tmp_path / "data" / next(iter(files), "a.txt"): 1}, **keys)
    with pytest.raises(UsageError) as caught:
        prepare_data(config)
    assert message in str(caught.value)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == sorted(files)


def test_a_tokenizer_that_does_not_belong_to_the_model(tmp_path: Path, make_config: MakeConfig) -> None:
    make_tokenizer(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"vocab_size": 50}))
    file = write_jsonl(tmp_path / "a.jsonl", texts_of(5, "a"))
    with pytest.raises(UsageError, match="the model has 50"):
        prepare_data(make_config({file: 1}, model_dir=str(tmp_path / "model")))


@pytest.mark.parametrize("noted", [True, False], ids=["noted", "entry of an earlier version"])
def test_a_smaller_model_of_the_same_tokenizer_after_a_larger(
    tmp_path: Path, make_config: MakeConfig, noted: bool
) -> None:
    """The cache serves both: what it holds was checked against the larger model."""
    make_tokenizer(tmp_path / "model")
    size = tmp_path / "model" / "config.json"
    size.write_text(json.dumps({"vocab_size": 320}))
    config = make_config({write_jsonl(tmp_path / "a.jsonl", texts_of(5, "a")): 1}, model_dir=str(tmp_path / "model"))
    data = prepare_data(config)
    everything = [data.train.rows(range(len(data.train)))[0], *(document.ids for document in data.documents)]
    largest = max(int(ids.max()) for ids in everything)
    if not noted:
        manifest = data.directories[0] / "manifest.json"
        older = json.loads(manifest.read_text())
        del older["statistics"]["largest_id"]
        manifest.write_text(json.dumps(older))
    size.write_text(json.dumps({"vocab_size": largest + 1}))
    assert prepare_data(config).reports[0].cache_hit
    size.write_text(json.dumps({"vocab_size": largest}))
    with pytest.raises(UsageError, match=f"gives token id {largest}, but the model has {largest} "):
        prepare_data(config)


def test_held_out_documents_that_no_packed_sequence_holds_count_too(tmp_path: Path, make_config: MakeConfig) -> None:
    """``eval`` scores them all, whatever max_sequences leaves of the packed ones."""
    make_tokenizer(tmp_path / "model")
    file = write_jsonl(tmp_path / "a.jsonl", [chr(33 + number) * 60 for number in range(60)])  # about a sequence each
    keys = {"model_dir": str(tmp_path / "model"), "eval_fraction": 0.5, "max_sequences": 1}
    data = prepare_data(make_config({file: 1}, **keys))
    assert data.evaluation is not None
    packed = max(int(each.rows(range(len(each)))[0].max()) for each in (data.train, data.evaluation))
    alone = max(int(document.ids.max()) for document in data.documents)
    assert alone > packed  # or this shows nothing
    (tmp_path / "model" / "config.json").write_text(json.dumps({"vocab_size": alone}))
    for force in (False, True):
        with pytest.raises(UsageError, match=f"gives token id {alone}, "):
            prepare_data(make_config({file: 1}, **keys), force=force)


def test_a_model_without_a_tokenizer(tmp_path: Path, make_config: MakeConfig) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", texts_of(5, "a"))
    with pytest.raises(UsageError, match="holds no tokenizer"):
        prepare_data(make_config({file: 1}, model_dir=str(tmp_path)))
    with pytest.raises(UsageError, match="is not a directory"):
        prepare_data(make_config({file: 1}, model_dir=str(tmp_path / "none")))


def test_documents_from_a_file_without_any(tmp_path: Path, make_config: MakeConfig) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", texts_of(5, "a"))
    data = prepare_data(make_config({file: 1}))
    empty = write_jsonl(tmp_path / "b.jsonl", [" "])
    with pytest.raises(UsageError, match=r"b\.jsonl has no documents"):
        documents_from_file(str(empty), 1, make_config({file: 1}), data.tokenizer)


def test_a_broken_dataset_leaves_nothing_of_those_before_it(tmp_path: Path, make_config: MakeConfig) -> None:
    """Also not the cache folder; but an entry that was there before, or was rebuilt by force, stays."""
    good, bad = write_jsonl(tmp_path / "good.jsonl", texts_of(20, "good")), tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": broken}\n', encoding="utf-8")
    config = make_config({good: 1, bad: -1})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=r"bad\.jsonl.*2"):
        prepare_data(config)
    assert sorted(tmp_path.rglob("*")) == before

    entry = prepare_data(make_config({good: 1})).directories[0]
    for force in (False, True):
        with pytest.raises(UsageError):
            prepare_data(make_config({good: 1, bad: -1}), force=force)
    assert len([path for path in entry.parent.iterdir() if path.is_dir()]) == 1
    assert prepare_data(make_config({good: 1})).reports[0].cache_hit
