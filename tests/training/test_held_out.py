"""An evaluation scores as held out only what its run held out, and says so where it cannot know."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cadapter.config import load_config
from cadapter.data import prepare_data
from cadapter.errors import UsageError
from cadapter.training.held_out import check_held_out
from cadapter.training.resuming import settings_of
from tests.tiny_project import CLASS_OF, Project, make_project, texts, write_jsonl

Run = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return make_project(tmp_path_factory.mktemp("held-out"), documents=40)


@pytest.fixture
def run(project: Project, tmp_path: Path) -> Run:
    """``run(key=value, …)``: the config of a run, and the adapter that it wrote."""

    def make(**keys: Any) -> tuple[Path, Path]:
        file = project.write_config("run", eval_fraction=0.2, cache_dir=str(tmp_path / "cache"), **keys)
        config = load_config(file)
        resolved = {"config": settings_of(config), "facts": {"training data": prepare_data(config).fingerprint}}
        adapter = tmp_path / "run" / "final"
        adapter.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / "resolved.json").write_text(json.dumps(resolved))
        return file, adapter

    return make


def held(config: Any) -> set[tuple[int, ...]]:
    return {tuple(document.ids.tolist()) for document in prepare_data(config).documents}


def trained(config: Any) -> set[tuple[int, ...]]:
    """Ids of the documents that are trained on: all that are not held out."""
    everything = config.model_copy(update={"eval_fraction": 0.9999})
    found = held(everything)
    return found - held(config)


@pytest.mark.parametrize(
    "change",
    [
        "seed=1",
        "eval_fraction=0.5",
        "datasets.0.max_tokens=300",
        'document_prefix="x"',
        'datasets.0.overlength="drop"',
        "mix_datasets=true",
    ],
)
def test_another_split_is_refused(run: Run, change: str) -> None:
    file, adapter = run()
    assert check_held_out(load_config(file), adapter) is None
    with pytest.raises(UsageError, match="held out other documents") as caught:
        check_held_out(load_config(file, [change]), adapter)
    key, value = change.split("=")
    assert f"{key}: " in str(caught.value)
    assert f"{json.loads(value)!r} now" in str(caught.value)
    assert "--data FILE:CLASS" in str(caught.value)


def test_what_is_refused_would_have_scored_trained_texts(run: Run) -> None:
    """The reason for all of this, seen: with another seed most of what is held out had been trained on."""
    file, _ = run()
    now = held(load_config(file, ["seed=1"]))
    assert len(now & trained(load_config(file))) > len(now) / 2


@pytest.mark.parametrize(
    "change",
    [
        "eval_fraction=0.1",
        "sequence_len=128",
        "mask_tokens=true",
        "drop_tails=true",
        "datasets.1.drop_tails=true",
        "lora_rank=8",
        "lr=1.0",
        'output_dir="elsewhere"',
        "micro_batch_size=4",
    ],
)
def test_what_moves_no_document_is_allowed(run: Run, change: str) -> None:
    file, adapter = run()
    changed = load_config(file, [change])
    assert check_held_out(changed, adapter) is None
    # And rightly: nothing that the run trained on is held out.
    length = min(changed.sequence_len, 64)
    before = {ids[: length - 1] for ids in trained(load_config(file))}
    assert not {ids[: length - 1] for ids in held(changed)} & before


def test_where_documents_stay_whole_the_length_of_sequences_counts(run: Run) -> None:
    file, adapter = run(overlength="drop")
    with pytest.raises(UsageError, match="sequence_len: 64 in the run, 128 now"):
        check_held_out(load_config(file, ["sequence_len=128"]), adapter)


def test_changed_texts_and_datasets_are_refused(project: Project, run: Run, tmp_path: Path) -> None:
    copy = shutil.copy(project.root / "positive.jsonl", tmp_path / "copy.jsonl")
    file, adapter = run()
    moved = [f"datasets.0.dataset_path={json.dumps(str(copy))}"]
    assert check_held_out(load_config(file, moved), adapter) is None  # the same texts elsewhere
    write_jsonl(Path(copy), texts("positive", 41))
    with pytest.raises(UsageError, match=r"datasets\.0\.dataset_path"):
        check_held_out(load_config(file, moved), adapter)
    without = file.read_text().partition("[[datasets]]")[0]
    dataset = (
        f'[[datasets]]\ndataset_path = "{project.root / "positive.jsonl"}"\ncontrol_class = {CLASS_OF["positive"]}\n'
    )
    file.write_text(without + dataset)
    with pytest.raises(UsageError, match=r"datasets\.1\.control_class: -1 in the run, not set now"):
        check_held_out(load_config(file), adapter)


def test_texts_that_changed_where_they_lie_are_refused(project: Project, run: Run, tmp_path: Path) -> None:
    copy = shutil.copy(project.root / "positive.jsonl", tmp_path / "own.jsonl")
    file, adapter = run()
    own = [f"datasets.0.dataset_path={json.dumps(str(copy))}"]
    resolved = json.loads((adapter.parent / "resolved.json").read_text())
    resolved["config"] = settings_of(load_config(file, own))
    (adapter.parent / "resolved.json").write_text(json.dumps(resolved))
    assert check_held_out(load_config(file, own), adapter) is None
    write_jsonl(Path(copy), texts("positive", 60, seed=7))
    with pytest.raises(UsageError, match="its texts or the tokenizer have changed"):
        check_held_out(load_config(file, own), adapter)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"config": {}, "facts": {}}', '{"config": 1}'])
def test_an_adapter_without_its_run_is_told(run: Run, content: str | None) -> None:
    file, adapter = run()
    place = adapter.parent / "resolved.json"
    if content is None:
        place.unlink()
    else:
        place.write_text(content)
    said = check_held_out(load_config(file), adapter)
    assert said is not None
    assert "is not known" in said
    assert "--data FILE:CLASS" in said


def test_a_checkpoint_lies_one_deeper(run: Run) -> None:
    file, adapter = run()
    checkpoint = adapter.parent / "checkpoints" / "step-000010"
    checkpoint.mkdir(parents=True)
    assert check_held_out(load_config(file), checkpoint) is None
    with pytest.raises(UsageError, match="seed"):
        check_held_out(load_config(file, ["seed=1"]), checkpoint)
