"""Writing whole or not at all, and cleaning up after a process that was killed in between."""

from __future__ import annotations

import errno
import os
import pty
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cadapter.errors import UsageError
from cadapter.files import (
    STANDARD_OUTPUT,
    check_report,
    new_directory,
    new_file,
    remove_directory,
    tidy,
    write_json_report,
    write_report,
    write_text,
)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    with new_directory(tmp_path / "out") as made:
        (made / "file").write_text("old")

    def fail() -> None:
        with new_directory(tmp_path / "out", force=True) as made:
            (made / "file").write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "old"
    with pytest.raises(UsageError, match="already exists"), new_directory(tmp_path / "out"):
        pass


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    with new_file(tmp_path / "sub" / "out") as file:
        file.write_text("old")

    def fail() -> None:
        with new_file(tmp_path / "sub" / "out", force=True) as file:
            file.write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert names(tmp_path / "sub") == ["out"]
    assert (tmp_path / "sub" / "out").read_text() == "old"
    for path, force, message in (
        ("sub/out", False, "already exists"),
        ("sub", True, "is a directory"),
        ("sub/out/below", False, "Cannot write in"),
    ):
        with pytest.raises(UsageError, match=message), new_file(tmp_path / path, force):
            pytest.fail("nothing may be written")
    assert names(tmp_path / "sub") == ["out"]
    with new_file(tmp_path / "sub" / "out", force=True) as file:
        file.write_text("new")
    assert (tmp_path / "sub" / "out").read_text() == "new"


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_permissions_are_those_that_the_umask_leaves(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with new_directory(tmp_path / "out") as made:
            save_file({"x": torch.zeros(2)}, made / "a.safetensors")
            (made / "b.json").write_text("{}")
        (tmp_path / "usual").touch()
    finally:
        os.umask(before)
    assert names(tmp_path / "out") == ["a.safetensors", "b.json"]
    for file in (*(tmp_path / "out").iterdir(), tmp_path / "usual"):
        assert file.stat().st_mode & 0o777 == 0o666 & ~umask


KILLED = """
import os, signal, sys
from pathlib import Path
from cadapter import files
target = Path(sys.argv[1]) / "out"
if sys.argv[2] == "between the renames":
    rename = Path.rename
    def renamed(self, to):
        if "partial" in self.name:
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(self, to)
    Path.rename = renamed
with files.new_directory(target, force=True) as made:
    (made / "file").write_text("new")
    if sys.argv[2] == "while writing":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", ["while writing", "between the renames"])
def test_what_a_killed_process_leaves_is_tidied(tmp_path: Path, moment: str) -> None:
    with new_directory(tmp_path / "out") as made:
        (made / "file").write_text("old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), moment], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 2
    told = tidy(tmp_path)
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "old"
    assert len(told) == (1 if moment == "while writing" else 2)
    assert tidy(tmp_path) == []


def test_what_half_removed_directories_leave_is_tidied_and_never_put_back(tmp_path: Path) -> None:
    (tmp_path / ".out.removed-0123abcd").mkdir()
    assert tidy(tmp_path) == [f"{tmp_path}/.out.removed-0123abcd is removed: a process was killed while it removed it."]
    assert names(tmp_path) == []


def test_what_cannot_be_removed_is_told_and_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".a.removed-0123abcd").mkdir()
    (tmp_path / ".b.partial-0123abcd").write_text("half")

    def busy(path):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    monkeypatch.setattr(shutil, "rmtree", busy)
    told = tidy(tmp_path)
    assert len(told) == 2
    assert "cannot be removed: Device or resource busy" in told[0]
    assert names(tmp_path) == [".a.removed-0123abcd"]


def test_a_directory_that_cannot_be_renamed_is_removed_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Path) -> Path:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(Path, "rename", refused)
    (tmp_path / "out" / "below").mkdir(parents=True)
    remove_directory(tmp_path / "out")
    assert names(tmp_path) == []
    with pytest.raises(FileNotFoundError):
        remove_directory(tmp_path / "out")


@pytest.mark.parametrize("refused", ["old", "new"])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), KeyboardInterrupt()])
def test_a_directory_that_cannot_be_replaced_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str, error: BaseException
) -> None:
    """The disk takes neither rename, or a signal comes between them."""
    with new_directory(tmp_path / "out") as made:
        (made / "file").write_text("old")
    rename = Path.rename

    def renamed(self: Path, target: Path) -> Path:
        if ("partial" in self.name) == (refused == "new") and "replaced" not in self.name:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", renamed)
    with pytest.raises(type(error)), new_directory(tmp_path / "out", force=True) as made:
        (made / "file").write_text("new")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "old"


def test_only_leftovers_are_tidied(tmp_path: Path) -> None:
    write_text(tmp_path / "text", "whole")
    kept = [".hidden", ".out.partial-xyz", "out.partial-0123abcd", ".cache-0123abcd"]
    for name in kept:
        (tmp_path / name).write_text("")
    (tmp_path / ".text.partial-0123abcd").write_text("half")
    os.symlink(tmp_path / "text", tmp_path / ".link.partial-0123abcd")
    assert len(tidy(tmp_path)) == 2
    assert names(tmp_path) == sorted([*kept, "text"])
    assert (tmp_path / "text").read_text() == "whole"
    assert tidy(tmp_path / "missing") == []


def test_a_report_makes_its_folder_replaces_an_older_one_and_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "folder" / "report.html"
    for text in ("first", "second"):
        check_report(file)
        write_report(file, text)
        assert file.read_text() == text
    assert names(file.parent) == ["report.html"]
    write_report(tmp_path / "picture.png", b"\x89PNG")
    assert (tmp_path / "picture.png").read_bytes() == b"\x89PNG"
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"Written: {file}"] * 2 + [f"Written: {tmp_path / 'picture.png'}"]
    write_json_report(tmp_path / "x.json", {"ü": 1})
    write_json_report(STANDARD_OUTPUT, {"ü": 1})
    text = (tmp_path / "x.json").read_text("utf-8")
    assert capsys.readouterr().out == f"Written: {tmp_path / 'x.json'}\n{text}"
    assert '"ü"' in text


def test_where_no_report_can_be_written_is_known_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place, message in (("", "is a directory"), ("file/x", "is a file"), ("file/x/y", "is a file")):
        with pytest.raises(UsageError, match=message):
            check_report(tmp_path / place)
    check_report(None)
    check_report(STANDARD_OUTPUT)
    check_report(tmp_path / "a" / "b" / "c")
    assert names(tmp_path) == ["file"]  # looking leaves nothing behind


def test_a_report_through_a_link_goes_where_the_link_leads(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "old.json").write_text("old")
    for link, target in (("a.json", "there/old.json"), ("b.json", "there/new.json")):
        (tmp_path / link).symlink_to(target)
        check_report(tmp_path / link)
        write_report(tmp_path / link, "new")
        assert (tmp_path / link).is_symlink()
        assert (tmp_path / target).read_text() == "new"
    assert names(tmp_path) == ["a.json", "b.json", "there"]
    assert names(tmp_path / "there") == ["new.json", "old.json"]


def test_a_report_goes_into_a_pipe_or_a_device(tmp_path: Path) -> None:
    """The device is a terminal: in their directory no file could take its place, whoever runs this test."""
    pipe, device = tmp_path / "pipe", tmp_path / "device"
    os.mkfifo(pipe)
    terminal, side = pty.openpty()
    device.symlink_to(os.ttyname(side))
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE, text=True)
    for place in (pipe, device):
        check_report(place)
        write_report(place, "report")
    assert reader.communicate()[0] == "report"
    assert os.read(terminal, 100) == b"report"
    assert pipe.is_fifo()
    assert device.is_symlink()
    assert names(tmp_path) == ["device", "pipe"]


@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_a_report_to_what_standard_output_is_stands_among_the_rest(tmp_path: Path, kind: str) -> None:
    """Also where that is a file, which would otherwise be replaced, and with it what else is printed."""
    place = tmp_path / "stdout"  # as /dev/stdout is
    place.symlink_to("/proc/self/fd/1")
    program = (
        f"from cadapter.files import *; place = Path({str(place)!r}); print('before'); check_report(place); "
        "write_report(place, 'report\\n'); print('after')"
    )
    if kind == "pipe":
        text = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    else:
        with open(tmp_path / "out", "w") as out:
            subprocess.run([sys.executable, "-c", program], stdout=out, check=True)
        text = (tmp_path / "out").read_text()
    assert text == "before\nreport\nafter\n"
    assert place.is_symlink()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_known_before_the_work(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="Permission denied"):
        check_report(tmp_path / "report.html")
    tmp_path.chmod(0o700)
