"""Signals at awkward moments: while a run starts, evaluates, or already stops."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from cadapter.training.state import newest_checkpoint
from tests.tiny_project import Project, command, environment, metrics, texts, write_jsonl

pytestmark = pytest.mark.processes

SHORT: dict[str, Any] = {"max_steps": 3, "pipeline_stages": 2}
SECONDS = 120


class Running:
    """A run on two processes, whose output goes to a file."""

    def __init__(self, config: Path, output: Path) -> None:
        self.output = output
        with open(output, "w", encoding="utf-8") as file:
            self.process = subprocess.Popen(
                command("train", config, "--num-gpus", 2), env=environment(), stdout=file, stderr=file
            )

    def said(self) -> str:
        return self.output.read_text("utf-8")

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def workers(self) -> list[psutil.Process]:
        return [child for child in self.family() if "RANK" in child.environ()]

    def when(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not ready():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.01)

    def ends(self, members: list[psutil.Process]) -> int:
        """The exit code; nothing may be left."""
        code = self.process.wait(SECONDS)
        _, alive = psutil.wait_procs(members, timeout=5)
        assert alive == []
        assert "Traceback" not in self.said()
        assert "internal error" not in self.said()
        return code


MOMENTS: dict[str, Callable[[Running], bool]] = {
    "launcher": lambda run: bool(run.family()),
    "workers": lambda run: len(run.workers()) == 2,
    "plan": lambda run: "steps in all" in run.said(),
}
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("moment", "number", "code"),
    [
        ("launcher", signal.SIGTERM, 143),
        pytest.param("workers", signal.SIGTERM, 143, marks=SLOW),
        pytest.param("plan", signal.SIGTERM, 143, marks=SLOW),
        pytest.param("launcher", signal.SIGINT, 130, marks=SLOW),
        pytest.param("workers", signal.SIGINT, 130, marks=SLOW),
        ("plan", signal.SIGINT, 130),
        pytest.param("launcher", signal.SIGUSR1, 0, marks=SLOW),
        ("workers", signal.SIGUSR1, 0),
        pytest.param("plan", signal.SIGUSR1, 0, marks=SLOW),
    ],
)
def test_while_a_run_starts(project: Project, tmp_path: Path, moment: str, number: int, code: int) -> None:
    directory = tmp_path / "run"
    running = Running(project.write_config(f"{moment}-{number}", **SHORT, output_dir=str(directory)), tmp_path / "said")
    running.when(lambda: MOMENTS[moment](running))
    members = running.family()
    running.process.send_signal(number)
    assert running.ends(members) == code, running.said()
    if code == 0:
        assert [line["step"] for line in metrics(directory)] == [1, 2, 3]
    else:
        assert not (directory / "final").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 0)])
def test_during_an_evaluation(own_project: Project, tmp_path: Path, number: int, code: int) -> None:
    for kind in ("positive", "negative"):
        write_jsonl(own_project.root / f"{kind}.jsonl", texts(kind, 2000))
    keys = {**SHORT, "eval_fraction": 0.9, "evals_per_run": 2, "max_checkpoints": 9}
    directory = own_project.root / "run"
    running = Running(own_project.write_config("run", **keys), tmp_path / "said")
    running.when(lambda: (directory / "metrics.jsonl").is_file())
    time.sleep(0.5)
    assert metrics(directory, "eval") == [], "the first evaluation is over already"
    members = running.family()
    running.process.send_signal(number)
    assert running.ends(members) == code, running.said()
    assert metrics(directory, "eval")[0]["step"] == 0
    steps = [line["step"] for line in metrics(directory)]
    assert steps == ([1] if code else [1, 2, 3])
    saved = sorted(path.name for path in (directory / "checkpoints").iterdir())
    assert saved == (["step-000001"] if code else ["step-000001", "step-000003"])


def test_a_second_interrupt_stops_at_once(project: Project, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    keys = {"max_steps": 2, "epochs": 10_000, "gradient_accumulation_steps": 20_000, "pipeline_stages": 2}
    running = Running(project.write_config("endless-step", **keys, output_dir=str(directory)), tmp_path / "said")
    running.when(lambda: (directory / "metrics.jsonl").is_file())
    time.sleep(1)
    members = running.family()
    running.process.send_signal(signal.SIGINT)
    time.sleep(2)
    assert running.process.poll() is None, "the first one lets the step end"
    started = time.monotonic()
    running.process.send_signal(signal.SIGINT)
    assert running.ends(members) == 130, running.said()
    assert time.monotonic() - started < 20
    assert newest_checkpoint(directory / "checkpoints") == (None, [])
