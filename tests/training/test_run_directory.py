"""One run at a time in a directory, and what a killed one left there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cadapter.errors import UsageError
from cadapter.training.run_directory import RunDirectory

HOLDER = """
import sys, time
from pathlib import Path
from cadapter.training.run_directory import RunDirectory
directory = RunDirectory(Path(sys.argv[1]))
directory.claim()
print("claimed", flush=True)
time.sleep(60)
"""


def test_a_directory_is_one_runs_until_its_process_ends(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "claimed\n"
    other = RunDirectory(tmp_path)
    with pytest.raises(UsageError, match="Another process is training in"):
        other.claim()
    with pytest.raises(UsageError, match="Another process is training in"):
        other.tidy_up()
    assert os.listdir(tmp_path) == []
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    other.claim()
    other.close()


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".step-000005.partial-0123abcd").mkdir(parents=True)
    (tmp_path / ".best.replaced-0123abcd").mkdir()
    directory = RunDirectory(tmp_path)
    assert len(directory.tidy_up()) == 2
    assert (tmp_path / "best").is_dir()
    assert list((tmp_path / "checkpoints").iterdir()) == []
    directory.close()


def test_a_directory_that_is_not_there_is_nobodys(tmp_path: Path) -> None:
    RunDirectory(tmp_path / "missing").claim()
    assert not (tmp_path / "missing").exists()
