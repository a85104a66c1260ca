"""The program as users meet it: help, version, exit codes and what an error looks like."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

import cadapter
from cadapter.cli import COMMANDS

HEAVY = ["torch", "transformers", "deepspeed", "pyarrow", "peft", "numpy", "safetensors", "accelerate", "pydantic"]
PYDANTIC = "'pydantic'"
"""Some versions of Typer import it themselves for a command's parameters: no heavy module, but none of ours either."""
LOADED = f"""
import atexit, sys
atexit.register(lambda: print("loaded:", [name for name in {HEAVY} if name in sys.modules]))
from cadapter.cli import main
main()
"""


def run(*arguments: str, program: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``cadapter``, or ``program`` as Python source, as a process of its own."""
    start = ["-m", "cadapter"] if program is None else ["-c", program]
    return subprocess.run(
        [sys.executable, *start, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "100", "NO_COLOR": "1", **environment},
    )


def run_raising(statement: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the program with one more command, ``boom``, whose body is ``statement``."""
    program = f"""
import os, signal, sys, typer
from cadapter import cli, terminal
from cadapter.errors import *
def boom(path: str = "p") -> None:
    "Fail."
    secret = "local value"
    {statement}
cli.register("boom", boom, ["cadapter boom"])
cli.main()
"""
    return run(*arguments, program=program)


def test_help_lists_commands_and_keeps_the_lines_of_its_examples() -> None:
    done = run("--help")
    assert done.returncode == 0
    for command in COMMANDS:
        assert command in done.stdout
    for option in ("--quiet", "--debug", "--version", "--install-completion"):
        assert option in done.stdout
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    first = lines.index("Examples")
    assert lines[first + 1].startswith("cadapter ")
    assert lines[first + 2].startswith("cadapter ")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_ends_with_two_examples(command: str) -> None:
    done = run(command, "-h")
    assert done.returncode == 0
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    examples = lines[lines.index("Examples") + 1 :]
    assert len(examples) >= 2
    assert all(line.startswith(f"cadapter {command}") for line in examples)


def test_help_imports_nothing_heavy() -> None:
    done = run("--help", program=LOADED)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "loaded: []")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_imports_nothing_heavy(command: str) -> None:
    done = run(command, "--help", program=LOADED)
    assert done.stdout.splitlines()[-1].replace(PYDANTIC, "") == "loaded: []"


def test_completion_imports_nothing_heavy() -> None:
    done = run(program=LOADED, _CADAPTER_COMPLETE="complete_bash", COMP_WORDS="cadapter sch", COMP_CWORD="1")
    assert [line.replace(PYDANTIC, "") for line in done.stdout.splitlines()] == ["schema", "loaded: []"]


def test_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"cadapter {cadapter.__version__}\n")


def test_schema_prints_json_alone() -> None:
    done = run("schema")
    assert done.returncode == 0
    assert json.loads(done.stdout)["properties"]["lora_rank"]["default"] == 16
    assert done.stderr == ""


@pytest.mark.parametrize(
    "arguments", [["no-such-command"], ["schema", "extra"], ["schema", "--no-such-option"], ["--oops"]]
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert "Usage: cadapter" in done.stderr
    assert done.stdout == ""


def test_a_misspelt_command_is_answered_with_the_nearest() -> None:
    assert "schema" in run("schemas").stderr


@pytest.mark.parametrize(
    ("statement", "code", "stderr"),
    [
        ("raise UsageError('wrong key.\\nDo this.')", 2, "error: wrong key.\n       Do this.\n"),
        ("raise CadapterError('no [space] left')", 1, "error: no [space] left\n"),
        ("raise CheckFailed('norm too large')", 1, "error: norm too large\n"),
        ("raise Stopped('stopped after step 3', 15)", 143, "stopped after step 3\n"),
        ("raise KeyboardInterrupt", 130, "interrupted\n"),
        ("signal.signal(2, signal.default_int_handler); os.kill(os.getpid(), 2); signal.pause()", 130, "interrupted\n"),
        (
            "{}['lost']",
            1,
            "error: internal error: KeyError: 'lost'\n"
            "       Run again with --debug for the traceback, and report it.\n",
        ),
        ("sys.exit(7)", 7, ""),
        ("raise typer.Exit(3)", 3, ""),
        ("pass", 0, ""),
        ("terminal.warn('careful\\nvery')", 0, "warning: careful\n         very\n"),
    ],
)
def test_exit_codes_and_messages(statement: str, code: int, stderr: str) -> None:
    done = run_raising(statement, "boom")
    assert (done.returncode, done.stderr, done.stdout) == (code, stderr, "")


@pytest.mark.parametrize("arguments", [["--debug", "boom"], ["boom", "--debug"]])
@pytest.mark.parametrize(
    ("statement", "last"), [("raise UsageError('wrong')", "error: wrong"), ("1 / 0", "error: internal")]
)
def test_debug_shows_the_traceback_without_locals(arguments: list[str], statement: str, last: str) -> None:
    done = run_raising(statement, *arguments)
    assert "Traceback" in done.stderr
    assert "in boom" in done.stderr
    assert "local value" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(last)


@pytest.mark.parametrize("arguments", [["--quiet", "boom"], ["boom", "--quiet"]])
def test_quiet_silences_notes_but_no_warnings_and_no_results(arguments: list[str]) -> None:
    body = "terminal.note('a note'); terminal.warn('a warning'); terminal.table('Result', ['x'], [[1]])"
    loud, quiet = run_raising(body, "boom"), run_raising(body, *arguments)
    assert "a note" in loud.stdout
    assert "a note" not in quiet.stdout
    for done in (loud, quiet):
        assert done.stderr == "warning: a warning\n"
        assert "Result" in done.stdout


def test_options_keep_their_place_beside_the_global_ones() -> None:
    done = run_raising("print(path)", "boom", "--path", "x y", "--quiet")
    assert done.stdout == "x y\n"
    assert "--path" in run_raising("pass", "boom", "--help").stdout


def test_too_little_gpu_memory_is_no_internal_error() -> None:
    """In a command without advice of its own."""
    told = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which …"
    done = run_raising(f"import torch; raise torch.OutOfMemoryError({told!r})", "boom")
    assert done.returncode == 1
    first, second = done.stderr.splitlines()
    assert first == "error: GPU memory ran out: Tried to allocate 2.00 GiB."
    assert "--device cpu" in second


def test_a_closed_pipe_is_no_internal_error() -> None:
    """What is still in the buffer when the command has ended, too."""
    command = f"{sys.executable} -m cadapter schema | head -n 1"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, env=buffered)
    assert done.stdout == "{\n"
    assert done.stderr == ""


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_terminal_that_has_gone_is_a_pipe_that_nobody_reads(unbuffered: str) -> None:
    """Writing to it fails with EIO; it is not this process's own, whose end would also be a signal."""

    def ended(output: int) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "cadapter", "schema"], stdout=output, stderr=subprocess.PIPE, text=True, timeout=60,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered}, start_new_session=True,
        )  # fmt: skip
        os.close(output)
        return done.returncode, done.stderr

    terminal, side = pty.openpty()
    reader, writer = os.pipe()
    os.close(terminal)
    os.close(reader)
    assert ended(side) == ended(writer) == (1, "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", [["schema"], ["schema", "--help"], ["--version"]])
def test_output_on_a_full_disk_is_no_internal_error(command: list[str], unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "cadapter", *command], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "error: The output cannot be written: No space left on device.\n")


def test_a_stream_that_is_closed_from_the_start_is_no_error() -> None:
    command = f"{sys.executable} -m cadapter schema >&-"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_stream_without_unicode_is_no_error(tmp_path: Path) -> None:
    done = run("schema", PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert json.loads(done.stdout)
