"""Completion in the shells that Typer knows, as a user's shell asks for it; and how the help pages are made."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cadapter.cli import COMMANDS, EXIT_CODES, PANELS

SHELLS = {
    # What a shell's script sets when <TAB> is pressed behind "cadapter ge", and what it reads from the answer.
    "bash": {"COMP_WORDS": "cadapter ge", "COMP_CWORD": "1"},
    "zsh": {"_TYPER_COMPLETE_ARGS": "cadapter ge"},
    "fish": {"_TYPER_COMPLETE_ARGS": "cadapter ge", "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
}
ALLOWED_SECONDS = 0.5


def cadapter(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cadapter", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "100", **environment},
    )


def seconds_of(call) -> float:
    """The time of the processor that a child process takes, whatever else this machine does: the best of three."""
    found = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        call()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(found)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_is_answered_in_time(shell: str) -> None:
    answers: list[str] = []

    def ask() -> None:
        done = cadapter(**SHELLS[shell], _CADAPTER_COMPLETE=f"complete_{shell}")
        assert done.returncode == 0, done.stderr
        answers.append(done.stdout)

    assert seconds_of(ask) < ALLOWED_SECONDS
    assert "generate" in answers[0]
    assert "merge" not in answers[0]


@pytest.mark.parametrize("shell", SHELLS)
def test_options_are_completed_too(shell: str) -> None:
    asked = {key: value.replace("cadapter ge", "cadapter merge --str") for key, value in SHELLS[shell].items()}
    if "COMP_CWORD" in asked:
        asked["COMP_CWORD"] = "2"
    assert "--strength" in cadapter(**asked, _CADAPTER_COMPLETE=f"complete_{shell}").stdout


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_of_a_shell_is_shown(shell: str) -> None:
    done = cadapter("--show-completion", shell, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert done.returncode == 0, done.stderr
    assert f"complete_{shell}" in done.stdout
    assert "cadapter" in done.stdout
    program = shutil.which(shell)
    if program is not None:
        checked = subprocess.run([program, "-n"], input=done.stdout, capture_output=True, text=True)
        assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize(("shell", "file"), [("bash", ".bashrc"), ("zsh", ".zshrc"), ("fish", ".config/fish")])
def test_completion_installs_itself_where_the_shell_looks(shell: str, file: str, tmp_path: Path) -> None:
    done = cadapter("--install-completion", shell, HOME=str(tmp_path), _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert done.returncode == 0, done.stderr
    assert f"{shell} completion installed" in done.stdout
    assert (tmp_path / file).exists()


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes(tmp_path: Path) -> None:
    """The shell itself: the script is read, and its function is called as bash calls it."""
    program = tmp_path / "cadapter"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m cadapter "$@"\n')
    program.chmod(0o755)
    script = cadapter("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1").stdout
    asked = 'COMP_WORDS=(cadapter to-); COMP_CWORD=1; _cadapter_completion cadapter; echo "${COMPREPLY[*]}"'
    done = subprocess.run(
        ["bash", "--norc", "-c", f"{script}\n{asked}"],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
    )
    assert done.stdout.split() == ["to-mult-lora", "to-add-lora", "to-gguf"], done.stderr


# ---- help ----------------------------------------------------------------------------------------------------------


def test_the_help_lists_commands_in_groups_and_says_what_exit_codes_mean() -> None:
    screen = cadapter("--help").stdout
    titles = [title for title, names in PANELS.items() if set(names) & set(COMMANDS)]
    places = [screen.index(f"─ {title} ─") for title in titles]
    assert places == sorted(places)
    assert "─ Commands ─" not in screen  # the group of those that are in none
    words = " ".join(screen.split())
    assert "Exit codes" in words
    for code, meaning in EXIT_CODES.items():
        assert f"{code}: {meaning}" in words


@pytest.mark.parametrize("command", COMMANDS)
def test_a_page_of_help_is_in_sections(command: str) -> None:
    done = cadapter(command, "--help")
    lines = done.stdout.splitlines()
    assert any(line.strip().startswith("Usage: cadapter") for line in lines)
    assert "─ Options of every command ─" in done.stdout
    assert "Examples" in done.stdout
    titles = [line for line in lines if line.startswith("╭─")]
    assert len(titles) >= 2


def test_help_is_shown_in_time() -> None:
    def ask() -> None:
        assert cadapter("--help").returncode == 0

    assert seconds_of(ask) < ALLOWED_SECONDS
