"""The cache: what is a hit, why something is none, damage, two builders at once, places that cannot be written."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cadapter.config import Config
from cadapter.data import PreparedData, cache, prepare_data
from cadapter.data.cache import DOCUMENTS, EVALUATION, FILES, FOLDER, MANIFEST, TRAIN
from cadapter.errors import CadapterError, UsageError
from tests.data.conftest import MakeConfig, write_jsonl
from tests.tiny_tokenizer import BOS, make_tokenizer

TEXTS = [f"document {number}: the fox jumps over {number * number} dogs" for number in range(60)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return write_jsonl(tmp_path / "data" / "a.jsonl", TEXTS)


def outcome(config: Config, **keys: Any) -> str:
    report = prepare_data(config, **keys).reports[0]
    return "hit" if report.cache_hit else report.cache_reason


def contents(data: PreparedData) -> list[bytes]:
    parts = [part for part in (data.train, data.evaluation) if part is not None]
    arrays = [array for part in parts for array in (*part.rows(range(len(part))), part.counts, part.tokens)]
    return [array.tobytes() for array in [*arrays, *(document.ids for document in data.documents)]]


def test_new_then_hit(file: Path, make_config: MakeConfig) -> None:
    config = make_config({file: 1})
    built = prepare_data(config)
    found = prepare_data(config)
    assert (built.reports[0].cache_hit, built.reports[0].cache_reason) == (False, "new")
    assert found.reports[0].cache_hit
    assert contents(found) == contents(built)
    assert found.fingerprint == built.fingerprint
    assert found.directories == built.directories
    assert [path.name for path in file.parent.iterdir() if path != file] == [FOLDER]
    assert sorted(path.name for path in built.directories[0].iterdir()) == sorted([*FILES, MANIFEST])


def test_a_hit_loads_no_tokenizer(file: Path, make_config: MakeConfig) -> None:
    prepare_data(make_config({file: 1}))
    assert "fast" not in vars(prepare_data(make_config({file: 1})).tokenizer)


def test_the_files_are_memory_mapped(file: Path, make_config: MakeConfig) -> None:
    data = prepare_data(make_config({file: 1}))
    before = pa.total_allocated_bytes()
    again = prepare_data(make_config({file: 1}))
    assert pa.total_allocated_bytes() == before
    assert contents(again) == contents(data)
    assert not again.documents[0].ids.flags.owndata


@pytest.mark.parametrize(
    "keys",
    [
        {"output_dir": "elsewhere"}, {"micro_batch_size": 4}, {"gradient_accumulation_steps": 2}, {"epochs": 5},
        {"lr": 0.5}, {"lora_rank": 3}, {"max_steps": 9},
    ],
)  # fmt: skip
def test_what_the_contents_do_not_depend_on(file: Path, make_config: MakeConfig, keys: dict[str, Any]) -> None:
    prepare_data(make_config({file: 1}))
    assert outcome(make_config({file: 1}, **keys)) == "hit"


@pytest.mark.parametrize(
    ("keys", "dataset", "reason"),
    [
        ({"sequence_len": 128}, {}, "option changed: sequence_len"),
        ({"sequence_prefix": "x"}, {}, "option changed: sequence_prefix"),
        ({"document_prefix": 3}, {}, "option changed: document_prefix"),
        ({"document_suffix": ""}, {}, "option changed: document_suffix"),
        ({"document_attention": "isolated"}, {}, "option changed: document_attention"),
        ({"overlength": "truncate"}, {}, "option changed: overlength"),
        ({}, {"overlength": "truncate"}, "option changed: overlength"),
        ({}, {"class_field": "class"}, "option changed: class_field"),
        ({}, {"chosen_field": "text", "rejected_field": "body"}, "option changed: chosen_field, "),
        ({"mask_tokens": True}, {}, "option changed: mask_tokens"),
        ({"mask_tokens": 2}, {}, "option changed: mask_tokens"),
        ({"seed": 43}, {}, "option changed: seed"),
        ({"eval_fraction": 0.2}, {}, "option changed: eval_fraction"),
        ({"mix_datasets": True}, {}, "option changed: mix_datasets"),
        ({"drop_tails": True}, {}, "option changed: drop_tails"),
        ({"max_sequences": 5}, {}, "option changed: max_sequences"),
        ({}, {"max_tokens": 500}, "option changed: max_tokens"),
        ({}, {"control_class": -1}, "option changed: control_class"),
        ({}, {"text_field": "body"}, "option changed: text_field"),
        ({"seed": 1, "sequence_len": 128}, {}, "option changed: seed, sequence_len"),
    ],
)
def test_options_that_matter(
    tmp_path: Path, make_config: MakeConfig, keys: dict[str, Any], dataset: dict[str, Any], reason: str
) -> None:
    file = tmp_path / "a.jsonl"
    records = [{"text": text, "body": text[::-1], "class": -1} for text in TEXTS]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    table = {"dataset_path": str(file)}
    before = prepare_data(make_config([table]))
    after = prepare_data(make_config([{**table, **dataset}], **keys))
    assert not after.reports[0].cache_hit
    assert after.reports[0].cache_reason.startswith(reason)
    assert after.fingerprint != before.fingerprint
    assert outcome(make_config([table])) == "hit"


def test_files_that_change(tmp_path: Path, make_config: MakeConfig) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"{name}: the fox jumps")
    config = make_config({tmp_path / "*.txt": 1})
    assert outcome(config) == "new"
    (tmp_path / "b.txt").write_text("b: the dog jumps")
    assert outcome(config) == "file changed: b.txt"
    (tmp_path / "c.txt").write_text("c: the dog jumps")
    assert outcome(config) == "file added: c.txt"
    (tmp_path / "a.txt").unlink()
    assert outcome(config) == "file removed: a.txt"
    (tmp_path / "c.txt").touch()
    assert outcome(config) == "hit"


def test_equal_contents_elsewhere_are_a_hit(tmp_path: Path, file: Path, make_config: MakeConfig) -> None:
    cache = str(tmp_path / "cache")
    prepare_data(make_config({file: 1}, cache_dir=cache))
    assert not (file.parent / FOLDER).exists()
    copy = shutil.copy(file, tmp_path / "renamed.jsonl")
    assert outcome(make_config({copy: 1}, cache_dir=cache)) == "hit"
    other = write_jsonl(tmp_path / "other.jsonl", TEXTS[:-1])
    assert outcome(make_config({other: 1}, cache_dir=cache)) == "new"


def test_the_tokenizer_matters(tmp_path: Path, file: Path, make_config: MakeConfig) -> None:
    make_tokenizer(tmp_path / "model")
    config = make_config({file: 1}, model_dir=str(tmp_path / "model"))
    assert outcome(config) == "new"
    make_tokenizer(tmp_path / "model", eos=BOS)
    assert outcome(config) == "tokenizer changed"


def test_force_rebuilds_and_replaces(file: Path, make_config: MakeConfig) -> None:
    config = make_config({file: 1})
    first = prepare_data(config)
    forced = prepare_data(config, force=True)
    assert (forced.reports[0].cache_hit, forced.reports[0].cache_reason) == (False, "forced")
    assert not first.directories[0].exists()
    assert list((file.parent / FOLDER).iterdir()) == forced.directories
    assert contents(first) == contents(forced)  # the first one's mapping outlives its files
    assert outcome(config) == "hit"


def test_force_builds_the_same_dataset_once(file: Path, make_config: MakeConfig) -> None:
    config = make_config([{"dataset_path": str(file)}, {"dataset_path": str(file)}])
    assert [report.cache_reason or "hit" for report in prepare_data(config).reports] == ["new", "hit"]
    assert [report.cache_reason or "hit" for report in prepare_data(config, force=True).reports] == ["forced", "hit"]


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        (TRAIN, lambda data: data[:-100], "damaged: train.arrow has"),
        (TRAIN, lambda data: b"X" * len(data), "damaged: train.arrow is no Arrow file"),
        (EVALUATION, lambda data: data[:-6] + b"XXXXXX", "damaged: evaluation.arrow is no Arrow file"),
        (DOCUMENTS, lambda data: None, "damaged: documents.arrow is missing"),
        (MANIFEST, lambda data: None, "damaged: no usable manifest.json"),
        (MANIFEST, lambda data: data[: len(data) // 2], "damaged: no usable manifest.json"),
        (MANIFEST, lambda data: b"[]", "damaged: no usable manifest.json"),
        # Files of another version: made anew under the same key, so that a run's fingerprint stays what it was.
        (
            MANIFEST,
            lambda data: data.replace(b'"layout"', b'"other"'),
            "damaged: its files are those of another version",
        ),
    ],
)
def test_damage_is_repaired(file: Path, make_config: MakeConfig, name: str, change: Any, reason: str) -> None:
    config = make_config({file: 1})
    expected = contents(prepare_data(config))
    (damaged,) = (file.parent / FOLDER).iterdir()
    data = change((damaged / name).read_bytes())
    (damaged / name).unlink()
    if data is not None:
        (damaged / name).write_bytes(data)
    repaired = prepare_data(config)
    assert repaired.reports[0].cache_reason.startswith(reason)
    assert contents(repaired) == expected
    assert not damaged.exists()
    assert outcome(config) == "hit"


def test_an_interrupted_build_leaves_nothing(
    file: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("cadapter.data.arrow.write_documents", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare_data(make_config({file: 1}))
    assert list(file.parent.iterdir()) == [file]
    assert outcome(make_config({file: 1})) == "new"


BUILDER = """
import os, signal, sys, time
from pathlib import Path
from cadapter import files
from cadapter.config import load_config
from cadapter.data import arrow, prepare_data
def stop(*_):
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    print("building", flush=True)
    time.sleep(60)
def stop_when_written(path):
    if (path.parent / "manifest.json").exists():
        stop()
if sys.argv[2] == "flushing":
    files.flush_to_disk = stop_when_written
else:
    arrow.write_documents = stop
prepare_data(load_config(Path(sys.argv[1])))
"""


@pytest.mark.processes
@pytest.mark.parametrize("at_work", ["writing", "flushing"])
def test_what_killed_builds_left_is_removed_and_what_is_being_built_is_not(
    file: Path, make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], at_work: str
) -> None:
    config, folder = make_config({file: 1}), file.parent / FOLDER
    words = [sys.executable, "-c", BUILDER, str(tmp_path / "config.toml")]
    assert subprocess.run([*words, "killed"], check=False).returncode == -signal.SIGKILL
    (killed,) = folder.iterdir()
    (folder / ".others.partial-0123abcd").mkdir()
    with subprocess.Popen([*words, at_work], stdout=subprocess.PIPE, text=True) as working:
        assert working.stdout is not None
        assert any(line == "building\n" for line in working.stdout)
        (built,) = set(folder.iterdir()) - {killed, folder / ".others.partial-0123abcd"}
        (just_begun := folder / f".{'0' * 32}-{'0' * 8}.partial-{'0' * 8}").mkdir()
        for path in (killed, built):
            for each in (path, *path.iterdir()):
                os.utime(each, (0, 0))
        prepare_data(config)
        left = set(folder.glob(".*"))
        working.kill()
    assert left == {built, just_begun, folder / ".others.partial-0123abcd"}
    assert f"{killed} is removed: a process was killed while it wrote there." in capsys.readouterr().out


def test_an_existing_cache_directory_is_not_removed_by_an_error(tmp_path: Path, make_config: MakeConfig) -> None:
    (tmp_path / "cache").mkdir()
    file = write_jsonl(tmp_path / "a.jsonl", [""])
    with pytest.raises(UsageError, match="no documents"):
        prepare_data(make_config({file: 1}, cache_dir=str(tmp_path / "cache")))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_file_that_changes_while_it_is_read(
    file: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cadapter.data import building

    write_store = building.write_store

    def and_change(*arguments: Any) -> Any:
        store = write_store(*arguments)
        write_jsonl(file, TEXTS[1:])
        return store

    monkeypatch.setattr(building, "write_store", and_change)
    with pytest.raises(UsageError, match=r"a\.jsonl changed while it was being read"):
        prepare_data(make_config({file: 1}))
    assert list(file.parent.iterdir()) == [file]


def _prepare(config: Config, start: Any, results: Any) -> None:
    start.wait()
    data = prepare_data(config)
    results.put((str(data.directories[0]), data.train.rows(range(len(data.train)))[0].tobytes()))


@pytest.mark.processes
def test_two_builders_at_once(file: Path, make_config: MakeConfig) -> None:
    config = make_config({file: 1})
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(2), context.Queue()
    builders = [context.Process(target=_prepare, args=(config, start, results)) for _ in range(2)]
    for builder in builders:
        builder.start()
    (first, first_rows), (second, second_rows) = (results.get(timeout=120) for _ in builders)
    for builder in builders:
        builder.join()
        assert builder.exitcode == 0
    assert first_rows == second_rows
    assert outcome(config) == "hit"
    left = {str(path) for path in (file.parent / FOLDER).iterdir()}
    assert left == {first, second}  # equal when one was done before the other looked


def test_a_place_that_cannot_be_written(
    tmp_path: Path, file: Path, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "occupied").write_text("a file, so nothing can be made below it")
    config = make_config({file: 1}, cache_dir=str(tmp_path / "occupied" / "cache"))
    data = prepare_data(config)
    user = tmp_path / "user-cache" / "cadapter"
    assert data.directories[0].parent == user
    assert (
        f"The cache goes to {user}, since {tmp_path / 'occupied' / 'cache'}: Not a directory."
        in capsys.readouterr().out
    )
    assert outcome(config) == "hit"


def test_a_dataset_folder_that_cannot_be_written(
    tmp_path: Path, file: Path, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without cache_dir; a file in the folder's place stands for a disk that is read only, which root could write."""
    (file.parent / FOLDER).write_text("")
    data = prepare_data(make_config({file: 1}))
    user = tmp_path / "user-cache" / "cadapter"
    assert data.directories[0].parent == user
    assert f"The cache goes to {user}, since {file.parent / FOLDER}: " in capsys.readouterr().out
    assert outcome(make_config({file: 1})) == "hit"


def test_no_place_at_all(tmp_path: Path, file: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "occupied").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "occupied"))
    with pytest.raises(CadapterError, match=r"No place for the cache can be written:\n.*\n.*\nSet cache_dir\."):
        prepare_data(make_config({file: 1}, cache_dir=str(tmp_path / "occupied" / "cache")))


def test_a_manifest_of_another_version(file: Path, make_config: MakeConfig) -> None:
    config = make_config({file: 1})
    entry = prepare_data(config).directories[0]
    manifest = json.loads((entry / MANIFEST).read_text())
    (entry / MANIFEST).write_text(json.dumps({**manifest, "format": 0, "key": "0"}))
    entry.rename(entry.with_name("0-0"))
    assert outcome(config) == "made by another version"


def test_rows_of_several_streams(tmp_path: Path, make_config: MakeConfig) -> None:
    files = [write_jsonl(tmp_path / f"{name}.jsonl", [f"{name} {text}" for text in TEXTS]) for name in "abc"]
    data = prepare_data(make_config(dict(zip(files, (1, -1, 0), strict=True))))
    alone = [prepare_data(make_config({file: class_})).train for file, class_ in zip(files, (1, -1, 0), strict=True)]
    order = np.random.default_rng(0).permutation(len(data.train))
    parts = zip(*(part.rows(range(len(part))) for part in alone), strict=True)
    for joint, separate in zip(data.train.rows(order), parts, strict=True):
        assert np.array_equal(joint, np.concatenate(separate)[order])
    assert np.array_equal(data.train.counts, np.concatenate([part.counts for part in alone]))


def test_files_that_did_not_change_are_not_read_again(
    file: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their bytes are known by size, times and inode, once these are old enough to be relied on."""
    config = make_config({file: 1})
    read = []
    hash_of = cache.file_hash
    monkeypatch.setattr(cache, "file_hash", lambda path: read.append(path) or hash_of(path))

    def prepare_again() -> int:
        read.clear()
        assert outcome(config) == "hit"
        return len(read)

    prepare_data(config)
    assert prepare_again() == 1  # written a moment ago
    monkeypatch.setattr(cache, "_SETTLED_SECONDS", -1.0)
    prepare_data(config, force=True)
    assert prepare_again() == 0
    file.touch()
    assert prepare_again() == 1
    size = file.stat().st_size
    file.write_bytes(file.read_bytes().replace(b"fox", b"cat"))
    assert file.stat().st_size == size
    assert outcome(config) == "file changed: a.jsonl"


def test_the_chat_template_matters(tmp_path: Path, file: Path, make_config: MakeConfig) -> None:
    make_tokenizer(tmp_path / "model")
    config = make_config({file: 1}, model_dir=str(tmp_path / "model"))
    prepare_data(config)
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages }}")
    assert outcome(config) == "tokenizer changed"
