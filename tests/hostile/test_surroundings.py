"""Every command where names are odd, inputs cannot be written, disks are full, clocks are wrong and others write too.

Disks that fill up or become read-only during training are in tests/training/test_full_disk.py, two builders of a cache
in tests/data/test_data_cache.py, two runs in one directory in tests/training/test_run_directory.py.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cadapter.errors import UsageError
from cadapter.files import new_directory, new_file
from tests.forked_commands import call, run_all, run_all_well
from tests.hostile.conftest import contents
from tests.tiny_project import Project

ODD = "mit Leerzeichen, Ümläuten & 'Zeichen' [1] 深い"
LONG = "l" * 200
pytestmark = pytest.mark.processes


@contextlib.contextmanager
def mounted(place: Path, *options: object) -> Iterator[None]:
    done = subprocess.run(["mount", *map(str, options), str(place)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"nothing can be mounted for the test: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@contextlib.contextmanager
def read_only(place: Path) -> Iterator[None]:
    with mounted(place, "--bind", place):
        subprocess.run(["mount", "-o", "remount,bind,ro", str(place)], check=True)
        yield


def new_seed() -> int:
    """Of texts that are not in any cache yet."""
    return int.from_bytes(os.urandom(3), "big")


def commands(project: Project, inputs: Path, out: Path) -> list[tuple[object, ...]]:
    """A command of each kind that reads ``inputs``, a copy of the good project, and writes to ``out``."""
    base, adapter, lora = inputs / "model", inputs / "run" / "final", inputs / "lora"
    keys = {"output_dir": str(out / "run"), "cache_dir": str(out.parent / "cache"), "seed": new_seed(), "max_steps": 1}
    config = Project(inputs).write_config("odd", **keys)
    config = config.rename(out.parent / "odd.toml")
    return [
        ("prepare", config),
        ("train", config),
        ("train", config, "--resume-from-checkpoint", "--set", "max_steps=2"),
        ("eval", config, "--adapter", adapter, "--data", f"{inputs / 'positive.jsonl'}:1", "--json", out / "scores"),
        ("generate", base, "Good", "--adapter", adapter, "--max-new-tokens", 1),
        ("inspect-norms", adapter, "--json", out / "norms.json", "--plot", out / "norms.png"),
        ("to-mult-lora", adapter, out / "mult"),
        ("to-add-lora", base, adapter, out / "lora"),
        ("merge", base, adapter, out / "merged"),
        ("to-gguf", lora, out / "lora.gguf", "--base", base),
    ]


def test_odd_names_and_inputs_that_cannot_be_written(good: Project, tmp_path: Path) -> None:
    """All of them at once: what is read lies on a read-only disk, and paths are 900 bytes long."""
    inputs = shutil.copytree(good.root, tmp_path / ODD / LONG / LONG, ignore=shutil.ignore_patterns("*.toml"))
    out = tmp_path / f"out {ODD}" / LONG / LONG
    out.mkdir(parents=True)
    words = commands(good, inputs, out)
    before = contents(inputs)
    with read_only(inputs):
        run_all_well(*(call(*each) for each in words))
    assert contents(inputs) == before
    assert (out.parent / "cache").is_dir()
    names = {"run", "scores", "norms.json", "norms.png", "mult", "lora", "merged", "lora.gguf"}
    assert {path.name for path in out.iterdir()} == names


def test_outputs_that_cannot_be_written(good: Project, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    words = [each for each in commands(good, good.root, out) if each[0] not in ("prepare", "generate")]
    del words[1]  # what cannot be trained cannot be resumed
    with read_only(out):
        for each, done in zip(words, run_all(*(call(*each) for each in words)), strict=True):
            assert done.returncode in (1, 2), f"{each}\n{done.stdout}{done.stderr}"
            assert "Read-only file system" in done.stderr or "cannot be written: Permission denied" in done.stderr, each
            assert "internal error" not in done.stderr, each
    assert list(out.iterdir()) == []


def test_disks_that_fill_up(good: Project, tmp_path: Path) -> None:
    """64 KiB: less than any output takes. Nothing of it is left."""
    out = tmp_path / "out"
    out.mkdir()
    model = good.root / "model"
    with mounted(out, "-t", "tmpfs", "-o", "size=64k", "none"):
        words = [each for each in commands(good, good.root, out) if each[0] not in ("generate", "eval")]
        words = [each for each in words if each[0] != "inspect-norms" and "--resume-from-checkpoint" not in each]
        words.append(("to-gguf", good.root / "lora", out / "x.gguf", "--base", model, "--outtype", "f16"))
        words[0] = (*words[0], "--set", f'cache_dir="{out / "cache"}"')
        (out / "filling").write_bytes(bytes(60 * 1024))
        for each in words:
            (done,) = run_all(call(*each))
            assert done.returncode in (1, 2), f"{each}\n{done.stdout}{done.stderr}"
            assert "No space left on device" in done.stderr or "MiB are free" in done.stderr, (each, done.stderr)
            assert "internal error" not in done.stderr, each
            left = {path.name for path in out.rglob("*")}
            assert left <= {"filling", "cache", "run", "error.txt"}, each


@pytest.mark.parametrize(
    "name", ["x" * 300, "y" * 250, "a/" * 2500], ids=["no-name-of-a-file", "no-room-beside-it", "no-path"]
)
def test_names_that_are_too_long_are_told_in_plain_words(good: Project, tmp_path: Path, name: str) -> None:
    adapter = good.root / "run" / "final"
    words = [("merge", good.root / "model", adapter, tmp_path / name), ("to-mult-lora", adapter, tmp_path / name)]
    if name[0] != "y":
        words += [("inspect-norms", tmp_path / name), ("prepare", tmp_path / name)]
    for each, done in zip(words, run_all(*(call(*each) for each in words)), strict=True):
        assert done.returncode in (1, 2), each
        assert "File name too long" in done.stderr, done.stderr
        assert "internal error" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_clocks_do_not_matter(good: Project, tmp_path: Path) -> None:
    """Texts from the future, and texts that change while their time stays: the cache goes by what they hold."""
    texts = tmp_path / "texts.jsonl"
    shutil.copyfile(good.root / "positive.jsonl", texts)
    config = good.write_config("clocks", ("positive",), cache_dir=str(tmp_path / "cache"), seed=new_seed())
    words = ("prepare", config.rename(tmp_path / "config.toml"), "--set", f'datasets.0.dataset_path="{texts}"')
    future = 4_000_000_000
    os.utime(texts, (future, future))
    first, second = run_all_well(call(*words), call(*words))
    assert "miss (new)" in first
    assert "hit" in second
    texts.write_bytes(texts.read_bytes().replace(b"film", b"plot"))
    os.utime(texts, (future, future))
    (third,) = run_all_well(call(*words))
    assert "miss (file changed" in third
    for manifest in (tmp_path / "cache").rglob("manifest.json"):
        os.utime(manifest, (1, 1))
    os.utime(texts, (1, 1))
    (fourth,) = run_all_well(call(*words))
    assert "hit" in fourth


# ---- several at once ------------------------------------------------------------------------------------------------


def test_who_comes_second_does_not_replace_what_came_first(tmp_path: Path) -> None:
    def write_late(make: object, name: str) -> None:
        with make(tmp_path / name) as slow:
            with make(tmp_path / name) as quick:
                (quick / "file" if quick.is_dir() else quick).write_text("first")
            (slow / "file" if slow.is_dir() else slow).write_text("second")

    for make, name in ((new_directory, "directory"), (new_file, "file")):
        with pytest.raises(UsageError, match="already exists"):
            write_late(make, name)
    assert (tmp_path / "directory" / "file").read_text() == (tmp_path / "file").read_text() == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["directory", "file"]


def test_a_link_that_leads_nowhere_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    for make in (new_directory, new_file):
        with pytest.raises(UsageError, match="already exists"), make(tmp_path / "out"):
            pass
    with new_file(tmp_path / "out", force=True) as file:
        file.write_text("here")
    assert not (tmp_path / "out").is_symlink()
    assert not (tmp_path / "elsewhere").exists()


def test_many_that_replace_one_directory_leave_one_of_them_whole(tmp_path: Path) -> None:
    failed: list[BaseException] = []

    def write(number: int) -> None:
        try:
            for turn in range(10):
                with new_directory(tmp_path / "out", force=True) as made:
                    for part in "ab":
                        (made / part).write_text(f"{number} {turn}")
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert (tmp_path / "out" / "a").read_text() == (tmp_path / "out" / "b").read_text()


@pytest.mark.slow
def test_two_commands_that_write_one_output(good: Project, tmp_path: Path) -> None:
    from tests.tiny_project import command, environment

    words = command("merge", good.root / "model", good.root / "run" / "final", tmp_path / "merged")
    started = [
        subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=300) for process in started]
    assert sorted(process.returncode for process in started) == [0, 2], said
    assert sum("already exists" in errors for _, errors in said) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    run_all_well(call("generate", tmp_path / "merged", "Good", "--max-new-tokens", 1))
