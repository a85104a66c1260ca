"""Commands of cadapter without the seconds that each takes to import torch.

One process imports everything once and then forks for each command. Every command still has processes of its own,
which join a job as they would under torchrun, and ends with the exit code that it would have in a shell.
"""

from __future__ import annotations

import atexit
import importlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from tests.tiny_project import environment

ROOT = Path(__file__).parents[1]
IMPORTED = ("peft", "bitsandbytes.nn.parametrize", "cadapter.training.run", "cadapter.training.evaluation")
PATIENCE = 120


@dataclass(frozen=True)
class Call:
    """``cadapter WORDS``, by so many processes together."""

    words: tuple[str, ...]
    processes: int = 1


def call(*words: object, processes: int = 1) -> Call:
    return Call(tuple(map(str, words)), processes)


@cache
def _forking(variables: tuple[tuple[str, str], ...]) -> subprocess.Popen[str]:
    """The process that forks; it ends with this one."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.forked_commands"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment(**dict(variables)),
    )  # fmt: skip
    atexit.register(process.communicate)
    return process


def run_all(*calls: Call, **variables: str) -> list[subprocess.CompletedProcess[str]]:
    """Run the commands in order; of each, its exit code (the largest of its processes') and what they printed.

    ``variables`` of the environment are there from the start, in a process of their own.
    """
    process = _forking(tuple(sorted(variables.items())))
    results = []
    for each in calls:
        print(json.dumps(asdict(each)), file=process.stdin, flush=True)
        results.append(subprocess.CompletedProcess(**json.loads(process.stdout.readline())))
    return results


def run_all_well(*calls: Call, **variables: str) -> list[str]:
    """:func:`run_all`, where all must succeed; what each printed on standard output."""
    results = run_all(*calls, **variables)
    for done in results:
        assert done.returncode == 0, f"{done.args}\n{done.stdout}{done.stderr}"
    return [done.stdout for done in results]


def _command(words: list[str], rank: int, processes: int, port: int, output: str) -> None:
    """One process of a command; what it prints goes to files."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in numbers.items()}, MASTER_ADDR="127.0.0.1")
    for stream, ending in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{ending}", os.O_WRONLY | os.O_CREAT), stream)
    from cadapter.cli import main

    sys.argv = ["cadapter", *words]
    main()


def _run(words: list[str], processes: int) -> dict[str, object]:
    """Fork for one command and wait for it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as directory:
        outputs = [f"{directory}/{rank}" for rank in range(processes)]
        started = [
            fork.Process(target=_command, args=(words, rank, processes, port, output))
            for rank, output in enumerate(outputs)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join(PATIENCE)
            if process.is_alive():
                process.kill()
                process.join()
        printed = {
            name: "".join(Path(f"{output}.{ending}").read_text("utf-8") for output in outputs)
            for name, ending in (("stdout", "out"), ("stderr", "err"))
        }
    codes = [abs(process.exitcode or 0) for process in started]
    return {"args": words, "returncode": max(codes), **printed}


def main() -> None:
    """Answer each line of standard input with one of standard output."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed while modules are imported is no answer
    for name in IMPORTED:
        importlib.import_module(name)
    for line in sys.stdin:
        print(json.dumps(_run(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
