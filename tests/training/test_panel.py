"""What someone sees who watches a run: a panel of any width, drawn once, and plain lines where nothing can be drawn."""

from __future__ import annotations

import io
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cadapter.adapters.guidelines import Guideline
from cadapter.terminal import spelt, without_controls
from cadapter.training.panel import Panel, View, rows_of
from cadapter.training.report import Reporter
from cadapter.training.samples import Sample
from tests.forked_commands import call, run_all_well
from tests.terminal_sessions import Session, on_terminal, plain
from tests.tiny_project import Project, command, environment

KEYS: dict[str, Any] = {
    "kinds": ("positive", "negative", "neutral"), "control_class0_lambda": 0.5, "max_steps": 6, "eval_fraction": 0.1,
    "evals_per_run": 3, "gradient_accumulation_steps": 4, "sample_prompts": ["The film"], "sample_max_new_tokens": 8,
}  # fmt: skip
TOP = "╭"
VALUES = {
    "train/loss": 2.43125, "train/loss_pos": 2.3101, "train/loss_neg": 2.5523, "train/loss_neutral": 0.0123,
    "train/norm_max": 0.4217, "train/spectral_max": 0.3456, "train/tokens_per_second": 12345.0, "train/lr": 2e-5,
    "train/grad_norm": 0.431, "train/skipped_steps": 2.0,
}  # fmt: skip
EVALUATION = {"eval/loss": 2.5012, "eval/loss_pos": 2.41, "eval/loss_neg": 2.59}


def view(**changes: Any) -> View:
    known = {
        "title": "Control Adapters · run", "total": 900, "step": 312, "epoch": 2, "phase": "training", "left": 754.0,
        "values": VALUES, "evaluation": EVALUATION, "evaluated": 270, "lowest": (2.4987, 240),
        "guideline": Guideline("σ_min(I+W)", 0.79, 0.1, 3, True, True), "memory": "31.2 of 79.6 GiB",
    }  # fmt: skip
    return View(**{**known, **changes})


def drawn(of: View, width: int, encoding: str = "utf-8", **options: Any) -> str:
    screen = io.TextIOWrapper(io.BytesIO(), encoding)
    Console(file=screen, width=width, force_terminal=True, **options).print(Panel(of))
    screen.flush()
    return screen.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [30, 40, 55, 56, 80, 120, 300])
def test_every_number_is_whole_at_any_width(width: int) -> None:
    lines = plain(drawn(view(), width).splitlines())
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).replace("│", " ").split())
    for words in (
        "step 312 of 900", "epoch 2", "12:34 left", "2.4312", "+1 2.3101", "−1 2.5523", "0 0.0123", "2.5012",
        "after step 270", "‖W‖F max 0.422", "‖W‖₂ max 0.346", "σ_min(I+W) ≥ 0.79", "12,345 tokens/s",
        "31.2 of 79.6 GiB", "lr 2.00e-05", "gradient 0.431", "training", "2 steps skipped",
    ):  # fmt: skip
        assert words in text, words
    assert "lowest 2.4987" in text
    assert "after step 240" in text


def test_what_is_not_known_yet_has_no_row() -> None:
    early = View("title", 10)
    assert rows_of(early) == [("now", [("starting", "")])]
    assert "step 0 of 10" in drawn(early, 80)


def test_a_guideline_that_is_passed_is_seen() -> None:
    kept = drawn(view(), 100)
    passed = drawn(view(guideline=Guideline("‖W‖_F", 1.7, 1.0, 3)), 100)
    assert "\x1b[32mσ_min(I+W) ≥ 0.79 (at least 0.1)" in kept
    assert "\x1b[1;31m‖W‖_F = 1.7 (at most 1)" in passed


def test_without_colours_and_on_streams_that_lack_characters() -> None:
    assert not re.search(r"\x1b\[[\d;]*[349]\d", drawn(view(), 80, no_color=True))
    for encoding in ("ascii", "cp1252", "cp437"):
        text = drawn(view(), 80, encoding)
        assert "?" not in text
        assert "sigma_min(I+W) >= 0.79" in text or encoding == "cp437"
        assert all(len(line) <= 80 for line in plain(text.splitlines()))


def test_spelling() -> None:
    assert spelt("‖W‖₂ ≤ 1 − σ · λ", "ascii") == "||W||2 <= 1 - sigma * lambda"
    assert spelt("‖W‖₂ × λ, é", "cp1252") == "||W||2 × lambda, é"
    assert spelt("漢", "cp1252") == "?"
    assert spelt("‖W‖₂ 漢", "utf-8") == "‖W‖₂ 漢"
    assert without_controls("a\x1b[2Jb\x07\r\n\tc\x9b") == "a�[2Jb��\n\tc�"


def test_samples_are_indented_and_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter(tmp_path, 1, 1) as reporter:
        reporter.samples(1, 1, 0, 0.0, [Sample("Go", -1, " one\ntwo\x1b[2J"), Sample("Go", 1, "")])
    out = capsys.readouterr().out
    assert out == "samples after step 1: Go\n  −1  one\n      two�[2J\n  +1  (nothing)\n"


# ---- real runs on a real terminal -----------------------------------------------------------------------------------


def watched(project: Project, name: str, processes: int, columns: int, **changes: str) -> Session:
    layout = {"pipeline_stages": 2} if processes > 1 else {}
    config = project.write_config(name, **KEYS, **layout)
    session = on_terminal(command("train", config, "--num-gpus", processes), columns, **changes)
    assert session.code == 0, session.text()
    return session


def assert_nothing_comes_twice(last: list[str]) -> None:
    for step in (0, 3, 6):
        assert sum(line.startswith(f"evaluation after step {step}: ") for line in last) == 1
        assert sum(line.startswith(f"samples after step {step}: ") for line in last) == 1
    assert sum(line.startswith("The adapter is in ") for line in last) == 1
    assert not any(line.startswith("step ") for line in last), "plain lines beside a panel"


@pytest.mark.processes
@pytest.mark.slow
def test_two_processes_draw_one_panel_that_leaves_nothing_behind(project: Project) -> None:
    session = watched(project, "watched-2", 2, 100)
    screens = [plain(lines) for lines in session.screens()]
    assert len(screens) > 8
    panels = [sum(line.startswith(TOP) for line in lines) for lines in screens]
    assert max(panels) == 1
    assert panels[-1] == 0
    assert_nothing_comes_twice(screens[-1])
    full = next(lines for lines in screens if any("step 3 of 6" in line for line in lines))
    for label in ("loss", "norms", "speed", "now"):
        assert any(line.startswith(f"│ {label} ") for line in full), full
    text = session.text()
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor is hidden and shown again


@pytest.mark.processes
def test_a_narrow_terminal_without_colours(project: Project) -> None:
    session = watched(project, "watched-40", 1, 40, NO_COLOR="1")
    screens = [plain(lines) for lines in session.screens()]
    with_panel = [lines for lines in screens if any(re.match(r"step \d of 6 ", line) for line in lines)]
    assert with_panel
    for lines in with_panel:
        first = max(k for k, line in enumerate(lines) if re.match(r"step \d of 6 ", line))
        assert all(len(line) <= 40 for line in lines[first:])
    assert_nothing_comes_twice(screens[-1])
    assert not re.search(r"\x1b\[[\d;]*[349]\d", session.text())


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_with_few_characters(project: Project, encoding: str) -> None:
    session = watched(project, f"watched-{encoding}", 1, 80, PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    text = session.text(encoding)
    assert "||W||F max" in text
    assert "sigma_min(I+W) >=" in text
    assert "‖" not in text


@pytest.mark.processes
@pytest.mark.slow
def test_a_dumb_terminal_gets_lines(project: Project) -> None:
    session = watched(project, "watched-dumb", 1, 80, TERM="dumb")
    text = session.text()
    assert "\x1b" not in text
    assert "\nstep 1/6  epoch 1  loss " in text
    assert "\nstep 6/6  epoch 1  loss " in text


@pytest.mark.processes
@pytest.mark.parametrize("encoding", ["cp1252", pytest.param("ascii", marks=pytest.mark.slow)])
def test_a_log_in_a_windows_encoding(project: Project, encoding: str) -> None:
    """What lacks in the encoding is spelt: nothing fails, and there are no question marks but those of texts."""
    config = project.write_config(f"logged-{encoding}", **{**KEYS, "sample_prompts": None})
    log = project.root / f"{encoding}.log"
    with open(log, "wb") as file:
        variables = environment(PYTHONIOENCODING=encoding, PYTHONUTF8="0")
        done = subprocess.run(command("train", config), env=variables, stdout=file, stderr=file, check=False)
    said = log.read_bytes().decode(encoding)
    assert done.returncode == 0, said
    assert "step 1/6  epoch 1  loss " in said
    assert "||W||F max 0." in said
    assert "sigma_min(I+W) >= 0." in said
    assert "?" not in said
    assert "\x1b" not in said


def test_piped_lines(project: Project) -> None:
    (said,) = run_all_well(call("train", project.write_config("piped", **KEYS)))
    first = next(line for line in said.splitlines() if line.startswith("step 1/6"))
    pattern = (
        r"step 1/6  epoch 1  loss \d\.\d{4}  \+1 \d\.\d{4}  −1 \d\.\d{4}  0 0\.\d{4}  ‖W‖F max 0\.\d{4}  "
        r"‖W‖₂ max 0\.\d{4}  σ_min\(I\+W\) ≥ \d\.?\d* \(at least 0\.1\)  [\d,]+ tokens/s  \d\.\d\d GiB  \d:\d\d left"
    )
    assert re.fullmatch(pattern, first), first
    assert "\x1b" not in said
