"""What in prepared data is hardly meant is said, by `prepare` with places and by `train` and `eval` without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cadapter.commands.prepare import command
from cadapter.config import Config
from cadapter.data import HeldOutDocument, PreparedData, documents_from_file, load_tokenizer, prepare_data
from cadapter.data.remarks import data_warnings, held_out_warnings, repeats_of
from tests.data.conftest import MakeConfig, write_jsonl

GOOD = [f"good fox {number}" for number in range(20)]
BAD = [f"bad dog {number}" for number in range(20)]


def said(config: Config) -> tuple[PreparedData, str]:
    data = prepare_data(config)
    return data, "\n".join(data_warnings(data, config, repeats_of(data)))


def test_nothing_is_said_of_good_data(tmp_path: Path, make_config: MakeConfig) -> None:
    good, bad = write_jsonl(tmp_path / "good.jsonl", GOOD), write_jsonl(tmp_path / "bad.jsonl", BAD)
    assert said(make_config({good: 1, bad: -1}, eval_fraction=0.1))[1] == ""
    assert said(make_config({good: 1}, eval_fraction=0.1))[1] == ""


def test_a_text_in_both_classes_and_in_both_halves(tmp_path: Path, make_config: MakeConfig) -> None:
    good, both = write_jsonl(tmp_path / "good.jsonl", GOOD), write_jsonl(tmp_path / "both.jsonl", GOOD + BAD)
    _, words = said(make_config({good: 1, both: -1}, eval_fraction=0.2))
    assert "20 texts occur in more than one class, which cancel each other out.\ncadapter prepare shows where." in words
    assert "both in training and in evaluation" in words


def test_class_minus_one_alone(tmp_path: Path, make_config: MakeConfig) -> None:
    _, words = said(make_config({write_jsonl(tmp_path / "bad.jsonl", BAD): -1}))
    assert words.startswith("No trained token is of class +1: ")


@pytest.mark.parametrize("mix", [False, True])
def test_a_class_without_held_out_documents(tmp_path: Path, make_config: MakeConfig, mix: bool) -> None:
    file = tmp_path / "own.jsonl"
    records = [{"text": text, "class": class_} for texts, class_ in ((GOOD, 1), (BAD, -1)) for text in texts]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    for seed in range(100):
        keys = {"eval_fraction": 0.05, "seed": seed, "mix_datasets": mix}
        config = make_config([{"dataset_path": str(file), "class_field": "class"}], **keys)
        data, words = said(config)
        classes = {document.control_class for document in data.documents}
        absent = {1, -1} - classes
        assert len(data.documents) == 2
        if absent:
            assert f"No document of class {'+1' if absent == {1} else '−1'} is held out" in words
            assert held_out_warnings(data) == [words]
            return
        assert words == ""
    raise AssertionError("no seed holds out two of one class")


@pytest.mark.parametrize("mix", [False, True])
def test_the_end_of_a_single_document_is_no_second_one(
    tmp_path: Path, make_config: MakeConfig, mix: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "book.txt").write_text("A long story about a film. " * 60)
    datasets = {tmp_path / "book.txt": 1, write_jsonl(tmp_path / "bad.jsonl", BAD): -1}
    make_config(datasets, eval_fraction=0.1, mix_datasets=mix)
    command(tmp_path / "config.toml")
    printed = capsys.readouterr()
    assert "No text occurs twice." in printed.out
    assert printed.err == ""


def test_split_is_counted_before_max_sequences_and_says_so(
    tmp_path: Path, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_jsonl(tmp_path / "good.jsonl", [" ".join(GOOD)] * 9)
    for limit, words in ((None, "with nothing lost"), (2, "counted before tokens were dropped")):
        make_config([{"dataset_path": str(file), **({"max_sequences": limit} if limit else {})}])
        command(tmp_path / "config.toml")
        assert f"Split: in more than one sequence, {words}." in capsys.readouterr().out


def test_both_sides_of_a_pair_are_known_as_one(tmp_path: Path, make_config: MakeConfig) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"yes": a, "no": b}) + "\n" for a, b in zip(GOOD, BAD, strict=True)))
    plain = write_jsonl(tmp_path / "plain.jsonl", GOOD)
    tables = [{"dataset_path": str(plain)}, {"dataset_path": str(file), "chosen_field": "yes", "rejected_field": "no"}]
    config = make_config(tables, eval_fraction=0.2)
    data = prepare_data(config)
    tokenizer = load_tokenizer(config)
    sides = [documents_from_file(str(file), class_, config, tokenizer) for class_ in (1, -1)]
    for documents in ([each for each in data.documents if each.dataset == "pairs"], sides[0] + sides[1]):
        by_pair: dict[object, list[HeldOutDocument]] = {}
        for document in sorted(documents, key=lambda each: -each.control_class):
            by_pair.setdefault(document.pair, []).append(document)
        assert None not in by_pair
        for chosen, rejected in by_pair.values():
            texts = [tokenizer.fast.decode(each.ids, skip_special_tokens=True) for each in (chosen, rejected)]
            assert BAD[GOOD.index(texts[0].strip())] == texts[1].strip()
    assert all(each.pair is None for each in data.documents if each.dataset == "plain")
