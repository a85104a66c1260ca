"""What is printed, and where: piped, on a terminal, quiet."""

from __future__ import annotations

import math
import os
import pty
import select
import subprocess
import sys
import time

import pytest

from cadapter import terminal

LONG = "a-long-cell/" * 40


@pytest.fixture(autouse=True)
def fresh():
    terminal.console.cache_clear()
    terminal.set_quiet(False)
    yield
    terminal.set_quiet(False)


def on_terminal(program: str, columns: int = 60, **environment: str) -> str:
    """What ``program`` shows on a pseudo-terminal, both streams."""
    leader, follower = pty.openpty()
    variables = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", f"import time\nfrom cadapter import terminal\n{program}"],
        stdout=follower,
        stderr=follower,
        stdin=follower,
        env={**variables, "COLUMNS": str(columns), "LINES": "30", "TERM": "xterm", **environment},
    )
    os.close(follower)
    shown = b""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if select.select([leader], [], [], 0.1)[0]:
            try:
                chunk = os.read(leader, 65536)
            except OSError:  # the other end is closed
                break
            if not chunk:
                break
            shown += chunk
    os.close(leader)
    assert process.wait(10) == 0
    return shown.decode()


def test_piped_table_holds_every_cell_whole_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [["[bold]x[/bold]", LONG, 1.5], ["β", None, -2]]
    terminal.table("Norms [all]", ["name", "path", "value"], rows, footer="two rows")
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "Norms [all]"
    assert any("[bold]x[/bold]" in line and LONG in line and line.endswith("1.5") for line in lines)
    assert any(line.split() == ["β", "-2"] for line in lines)
    assert lines[-1].strip() == "two rows"
    assert "\x1b" not in "".join(lines)


def test_columns_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.table("", ["a", "b", "c"], [["x", "1", "l"], ["xxxx", "1000", "llll"]], align="lrl")
    out = capsys.readouterr().out.splitlines()
    row = next(line for line in out if "x " in line)
    wide = next(line for line in out if "xxxx" in line)
    assert row.index("x") == wide.index("xxxx")
    assert row.index("1") == wide.index("1000") + 3
    assert row.index("l") == wide.index("llll")


def test_a_narrow_terminal_folds_cells_and_drops_nothing() -> None:
    shown = on_terminal(f"terminal.table('T', ['a', 'b'], [['{'k' * 150}', 7]])", columns=40)
    assert shown.count("k") == 150
    assert "…" not in shown


@pytest.mark.parametrize("columns", [80, 40, 14])
def test_numbers_are_never_folded(columns: int) -> None:
    names = ["stages × replicas", "accumulation", *(f"between {each}, MiB" for each in "abcd"), "remark"]
    cells = ["1 × 4", "4", "2,535,489.1", "6.891e-07", "-1,234.56*", "99.5%", "best of these"]
    shown = on_terminal(f"terminal.table('T', {names!r}, [{cells!r}], footer='F')", columns=columns)
    for number in cells[1:-1]:
        assert number in shown.split()
    assert len([line for line in shown.splitlines() if "replicas" in line]) == 1
    assert shown.split()[0] == "T"
    assert shown.split()[-1] == "F"


def test_a_row_that_has_no_room_is_a_block_of_lines() -> None:
    shown = on_terminal(
        "terminal.table('', ['name', 'a number', 'b', 'c'], [['x', 12345.678, 7.125, None]])", columns=24
    )
    assert [line for line in shown.splitlines() if line] == ["name      x", "a number  12345.678", "b         7.125"]


def test_colours_only_where_they_are_wanted() -> None:
    program = "terminal.table('T', ['a'], [['x']])"
    assert "\x1b[1m" in on_terminal(program)
    # NO_COLOR forbids colours (30 to 49 and 90 to 107); bold is none
    plain = on_terminal("terminal.console().print('x', style='red')", NO_COLOR="1")
    assert "\x1b[3" not in plain


def test_notes_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.note(f"[red]{LONG}")
    terminal.set_quiet(True)
    terminal.note("unheard")
    terminal.result("[blue]heard")
    assert capsys.readouterr().out == f"[red]{LONG}\n[blue]heard\n"


def test_progress_is_silent_for_quick_work(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.progress("Reading", 3, "files") as advance:
        for _ in range(3):
            advance()
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


@pytest.mark.parametrize(
    ("total", "text"), [(2000, "Reading: 1,500 of 2,000 files\n"), (None, "Reading: 1,500 files\n")]
)
def test_piped_progress_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, total: int | None, text: str
) -> None:
    clock = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock[0])
    with terminal.progress("Reading", total, "files") as advance:
        advance(1000)
        clock[0] = 1.5
        advance(500)
        clock[0] = 6.0
        advance(100)  # too soon after the last line
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", text)


def test_quiet_progress(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "_SHOW_AFTER_SECONDS", 0.0)
    terminal.set_quiet(True)
    with terminal.progress("Reading") as advance:
        advance()
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal_only_after_a_second() -> None:
    work = (
        "with terminal.progress('Merging', 4, 'tensors') as advance:\n    for _ in range(4): time.sleep({}); advance()"
    )
    assert on_terminal(work.format(0.01)) == ""
    shown = on_terminal(work.format(0.4))
    assert "Merging" in shown
    assert "3/4" in shown
    assert "tensors" in shown


def test_a_block_that_fails_ends_its_bar_and_keeps_its_error() -> None:
    shown = on_terminal(
        "try:\n    with terminal.progress('Merging', 4) as advance:\n        time.sleep(1.3); raise KeyError('lost')\n"
        "except KeyError as error: print('caught', error)"
    )
    assert "caught 'lost'" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1  # the cursor is hidden and shown again


def test_messages_hold_nothing_that_a_terminal_obeys(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.error("x.json: \x1b]0;title\x07\x1b[2J\x9b31m é\n\tnext\r")
    shown = capsys.readouterr().err
    assert shown == "error: x.json: \\x1b]0;title\\x07\\x1b[2J\\x9b31m é\n       \tnext\\x0d\n"


def test_bars_are_spelt_where_blocks_are_missing() -> None:
    assert terminal.spelt("██▌ ▏ 12", "ascii") == "### | 12"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1.0003, "1.000"), (0.4, "0.4000"), (0.0, "0"), (12.5, "12.50"), (1234.4, "1234"), (123456.0, "1.235e+05"),
     (1e-7, "1.000e-07"), (-0.99996, "-1.000"), (math.inf, "inf"), (math.nan, "nan")],
)  # fmt: skip
def test_a_rounded_number_does_not_look_like_an_exact_one(value: float, shown: str) -> None:
    assert terminal.significant(value) == shown
    assert terminal.significant(1.0003, 3) == "1.00"
