"""``cadapter eval`` as a steering report: more strengths, neutral texts, sampled texts, the page; what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cadapter.adapters.directory import ControlAdapterFiles, control_card, write_control_adapter
from cadapter.adapters.factors import LowRank
from tests.browser import CHROMIUM, browser
from tests.commands.test_eval_command import write_adapter, write_lora
from tests.forked_commands import call, run_all, run_all_well
from tests.tiny_project import HIDDEN, Project, texts, write_jsonl

SWEEP = [-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0]
SHORT = ["--samples", 3, "--sample-tokens", 6]


@pytest.fixture(scope="module")
def config(command_project: Project) -> Path:
    return command_project.write_config("report", eval_fraction=0.5)


@pytest.fixture(scope="module")
def adapter(command_project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("report") / "adapter", command_project.root / "model")


def records(file: Path) -> dict[str, list[dict[str, Any]]]:
    """The records of ``--json`` by kind."""
    kinds: dict[str, list[dict[str, Any]]] = {
        "dataset": [],
        "contrast": [],
        "kl_budget": [],
        "layer": [],
        "steering_at": [],
    }
    for record in json.loads(file.read_text()):
        (kind,) = (kind for kind in kinds if kind in record)
        kinds[kind].append(record)
    return kinds


@pytest.fixture(scope="module")
def report(
    command_project: Project, config: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str, list[Path]]:
    """A whole report of one process and one of two: where they lie, what the first printed, their JSON files."""
    place = tmp_path_factory.mktemp("reports")
    neutral = command_project.root / "neutral.jsonl"
    files = [place / f"{name}.json" for name in ("one", "two")]
    common = ["eval", config, "--adapter", adapter, "--neutral", neutral, *SHORT]
    first, _ = run_all_well(
        call(*common, "--html", place / "new" / "report.html", "--json", files[0]),
        call(*common, "--sweep", "--json", files[1], processes=2),
    )
    return place, first, files


@pytest.mark.processes
def test_a_sweep_compares_strengths_from_minus_two_to_two(report: tuple[Path, str, list[Path]], adapter: Path) -> None:
    _, printed, (file, _) = report
    found = records(file)
    for name in ("positive", "negative", "neutral"):
        own = [each for each in found["dataset"] if each["dataset"] == name]
        assert sorted(each["strength"] for each in own) == SWEEP
    assert [each["strengths"] for each in found["contrast"]] == [[t, -t] for t in (0.5, 1.0, 1.5, 2.0)]
    assert [each["steering_at"] for each in found["steering_at"]] == SWEEP
    neutral = {each["strength"]: each for each in found["dataset"] if each["dataset"] == "neutral"}
    for each in found["steering_at"]:
        assert each["cost_on"] == "neutral"
        assert (each["cost_kl"], each["cost_agreement"]) == (
            pytest.approx(neutral[each["steering_at"]]["kl"]),
            pytest.approx(neutral[each["steering_at"]]["top1_agreement"]),
        )
        assert len(each["samples"]) == 3
        assert all(sample["tokens"] <= 6 for sample in each["samples"])
        assert each["eos_rate"] == pytest.approx(sum(sample["ended"] for sample in each["samples"]) / 3)
    assert {each["dataset_of_prompt"] for each in found["steering_at"][0]["samples"]} == {
        "positive",
        "negative",
        "neutral",
    }
    assert [each["layer"] for each in found["layer"]] == [0, 2, 3]
    (choice,) = found["kl_budget"]
    assert choice["kl_budget"] == 0.1
    for sentence in choice["words"]:
        assert sentence in printed
    assert "of 3 texts of at most 6 tokens" in printed
    assert max(map(len, (line for line in printed.splitlines() if "─" in line or " ± " in line))) <= 120


@pytest.mark.processes
def test_tables_fit_80_columns(report: tuple[Path, str, list[Path]]) -> None:
    _, printed, _ = report
    rules = [line.rstrip() for line in printed.splitlines() if line.strip().startswith("─")]
    assert len(rules) == 4  # three datasets and the strengths
    assert max(map(len, rules)) <= 80


@pytest.mark.processes
@pytest.mark.skipif(CHROMIUM is None, reason="there is no browser: apt-get install chromium")
def test_the_page_of_a_real_run_in_a_browser(report: tuple[Path, str, list[Path]]) -> None:
    place, printed, _ = report
    page = place / "new" / "report.html"
    assert f"Written: {page}" in printed
    with browser() as chromium:
        chromium.look(1100)
        chromium.open(page)
        assert (chromium.requests, chromium.complaints) == ([page.as_uri()], [])
        drawn = [tuple(each) for each in chromium.ask(
            '[...document.querySelectorAll("svg.chart g.series")].map(g => [g.dataset.name, '
            'g.querySelectorAll(".mark").length])'
        )]  # fmt: skip
        assert {("lean", 9), ("KL", 9), ("contrast", 4), ("positive (+1)", 9), ("neutral (0)", 9)} <= set(drawn)
        assert chromium.ask('document.querySelectorAll(".sample").length') == 3


@pytest.mark.processes
def test_two_processes_find_the_same_and_write_the_same_texts(report: tuple[Path, str, list[Path]]) -> None:
    _, _, files = report
    one, two = (json.loads(file.read_text()) for file in files)
    for first, second in zip(one, two, strict=True):
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert second[name] == (pytest.approx(value, rel=1e-6, abs=1e-6) if isinstance(value, float) else value)


@pytest.mark.processes
def test_more_strengths_than_go_through_at_once(config: Path, adapter: Path, tmp_path: Path) -> None:
    """Several passes give what one pass gives, and a range what its numbers give."""
    files = [tmp_path / "range.json", tmp_path / "few.json"]
    run_all_well(
        call("eval", config, "--adapter", adapter, "--strength", "-1:1:0.2", "--json", files[0]),
        call("eval", config, "--adapter", adapter, "--strength", 0.6, "--strength", -0.6, "--json", files[1]),
    )
    many, few = (records(file)["dataset"] for file in files)
    assert sorted({each["strength"] for each in many}) == pytest.approx([-1 + 0.2 * k for k in range(11)])
    same = {(each["dataset"], each["strength"]): each for each in many}
    for each in few:
        other = same[each["dataset"], each["strength"]]
        for name, value in each.items():
            # float32, with other rows beside them
            assert other[name] == (pytest.approx(value, rel=1e-5, abs=1e-6) if isinstance(value, float) else value)


@pytest.mark.processes
def test_without_neutral_text_it_says_so(config: Path, adapter: Path) -> None:
    plain, bare = run_all(
        call("eval", config, "--adapter", adapter), call("eval", config, "--adapter", adapter, "--json", "-")
    )
    assert (plain.returncode, bare.returncode) == (0, 0)
    assert "There is no neutral text (class 0, or --neutral FILE)" in plain.stdout
    assert "repeated" not in plain.stdout
    scores = json.loads(bare.stdout)  # nothing else stands on standard output
    assert [each["strength"] for each in scores if "dataset" in each] == 2 * [0.0, 1.0, -1.0]


@pytest.mark.processes
def test_strengths_that_do_not_exist_are_left_out_of_a_sweep_and_refused_by_name(
    command_project: Project, config: Path, tmp_path: Path
) -> None:
    """I + W of a reflection: −1 is its own inverse's strength, but there is no half of it."""
    u = torch.zeros(4, HIDDEN)
    u[0, 0] = 1.0
    place = tmp_path / "reflection"
    files = ControlAdapterFiles(
        path=place, rank=4, alpha=4.0, layers={0: LowRank(u, -2 * u.T)}, site="block", base_model_type="llama",
        base_model_name_or_path=str(command_project.root / "model"), facts={},
    )  # fmt: skip
    place.mkdir()
    write_control_adapter(place, files, control_card(files))
    swept, named = run_all(
        call("eval", config, "--adapter", place, "--sweep", "--samples", 0, "--json", tmp_path / "x.json"),
        call("eval", config, "--adapter", place, "--strength", 0.5),
    )
    assert swept.returncode == 0, swept.stderr
    assert "Left out of the sweep, since they do not exist for this adapter: -1.5, -0.5, +0.5, +1.5." in swept.stderr
    assert {each["strength"] for each in records(tmp_path / "x.json")["dataset"]} == {-2.0, -1.0, 0.0, 1.0, 2.0}
    assert named.returncode == 2
    assert "layer 0" in named.stderr


@pytest.mark.processes
def test_a_lora_has_a_page_too(command_project: Project, tmp_path: Path) -> None:
    settings = {"kinds": ("positive",), "use_control_adapters": False, "lora_weight_decay": 0, "eval_fraction": 0.5}
    config = command_project.write_config("lora-report", **settings)
    lora = write_lora(tmp_path / "lora", command_project.root / "model")
    run_all_well(call("eval", config, "--adapter", lora, "--html", tmp_path / "lora.html", *SHORT))
    page = (tmp_path / "lora.html").read_text()
    assert "Loss and perplexity: positive (+1)" in page
    assert "Samples side by side" in page
    assert "budget" not in page.split("How to read this")[0]


@pytest.mark.processes
def test_documents_that_the_run_trained_on_are_not_scored_as_held_out(
    command_project: Project, config: Path, tmp_path: Path
) -> None:
    """The run is a real one; its adapter is scored with its own settings, with others, and away from its run."""
    trained = ["--set", f"output_dir={tmp_path / 'run'}", "--set", "max_steps=1"]
    copy = tmp_path / "copy"
    _, own, other, texts_given = run_all(
        call("train", config, *trained),
        call("eval", config, *trained),
        call("eval", config, *trained, "--set", "seed=7"),
        call("eval", config, *trained, "--set", "seed=7", "--data", f"{command_project.root / 'positive.jsonl'}:1"),
    )
    assert own.returncode == 0, own.stderr
    assert "not known" not in own.stderr
    assert other.returncode == 2
    assert "seed: 42 in the run, 7 now" in other.stderr
    assert other.stderr.count("error: ") == 1
    assert texts_given.returncode == 0
    shutil.copytree(tmp_path / "run" / "final", copy)
    (away,) = run_all(call("eval", config, "--adapter", copy))
    assert away.returncode == 0
    assert "whether it was trained on the documents that are held out here is not known" in away.stderr


@pytest.mark.processes
def test_other_texts_are_read_as_the_config_says(command_project: Project, adapter: Path, tmp_path: Path) -> None:
    words = texts("positive", 6, seed=4)
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"body": text}) + "\n" for text in words), encoding="utf-8")
    write_jsonl(tmp_path / "same.jsonl", words)
    config = tmp_path / "config.toml"
    text = command_project.write_config("body", ("positive",)).read_text()
    config.write_text(text.replace("[[datasets]]", '[[datasets]]\ntext_field = "body"'), encoding="utf-8")
    files = [tmp_path / "own.json", tmp_path / "same.json"]
    run_all_well(
        call("eval", config, "--adapter", adapter, "--data", f"{own}:1", "--json", files[0]),
        call("eval", config, "--adapter", adapter, "--data", f"{tmp_path / 'same.jsonl'}:1", "--json", files[1]),
    )
    first, second = (records(file)["dataset"] for file in files)
    assert [each["loss"] for each in first] == [each["loss"] for each in second]
    assert first[0]["documents"] == 6
