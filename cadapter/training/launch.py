"""One command, several processes: ``train`` and ``eval`` start themselves again under DeepSpeed's launcher.

The launcher starts one process for each GPU (or, without GPUs, as many as asked for) with RANK, WORLD_SIZE and
LOCAL_RANK set; these join the job instead of starting another. The parent stays, passes signals on to the
processes that work, and ends with their exit code. On one machine it calls the launcher's part that starts
processes (``deepspeed.launcher.launch``); the part that looks for machines comes before it where there are several.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from cadapter.config import check_layout
from cadapter.errors import CadapterError, UsageError
from cadapter.training.signals import REQUESTS

MODULE = "cadapter"
SMALLEST_NEGATIVE_CODE = 256 - 65
"""The launcher ends with −N when a process was killed by signal N, which becomes 256 − N."""


@dataclass(frozen=True)
class LaunchOptions:
    """How many processes, where, and how they are started; None where the launcher's default holds."""

    num_gpus: int | None = None
    num_nodes: int | None = None
    hostfile: str | None = None
    master_addr: str | None = None
    master_port: int | None = None
    node_rank: int | None = None
    no_ssh: bool = False
    launcher: str | None = None

    @property
    def several_nodes(self) -> bool:
        """Whether more than this machine takes part."""
        return bool(self.hostfile) or (self.num_nodes or 1) > 1


def inside_a_job() -> bool:
    """Whether the environment describes a job that this process belongs to (torchrun, srun, DeepSpeed's launcher)."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def visible_gpus() -> int:
    """Number of GPUs that this process may use; CUDA_VISIBLE_DEVICES is honoured."""
    import torch

    return torch.cuda.device_count()


def processes_to_start(options: LaunchOptions) -> int:
    """Return how many processes this machine starts: --num-gpus, else one for each visible GPU, else one.

    Raises:
        UsageError: more than there are GPUs, or fewer than one.
    """
    gpus = visible_gpus()
    if options.num_gpus is None:
        return max(1, gpus)
    if options.num_gpus < 1:
        raise UsageError(f"--num-gpus {options.num_gpus}: at least one process is needed.")
    if gpus and options.num_gpus > gpus:
        raise UsageError(f"--num-gpus {options.num_gpus}: only {gpus} GPUs are visible on this machine.")
    return options.num_gpus


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _devices(processes: int) -> list[str]:
    """The GPUs of so many processes, named as CUDA_VISIBLE_DEVICES names them; "-1" is none."""
    if not visible_gpus():
        return ["-1"] * processes
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = chosen.split(",") if chosen else [str(number) for number in range(processes)]
    return [name.strip() for name in names[:processes]]


def launcher_command(options: LaunchOptions, processes: int, arguments: Sequence[str]) -> list[str]:
    """Return the command that starts ``cadapter ARGUMENTS`` under DeepSpeed's launcher.

    ``processes`` counts those of this machine. With several machines the launcher takes its numbers from the
    hostfile, unless --num-gpus is given.
    """
    part = "runner" if options.several_nodes else "launch"
    command = [sys.executable, "-m", f"deepspeed.launcher.{part}", "--no_local_rank", "--log_level", "critical"]
    if options.several_nodes:
        named = {
            "--num_gpus": options.num_gpus,
            "--num_nodes": options.num_nodes,
            "--hostfile": options.hostfile,
            "--master_addr": options.master_addr,
            "--master_port": options.master_port,
            "--node_rank": options.node_rank,
            "--launcher": options.launcher,
        }
        command += ["--no_ssh"] * options.no_ssh
    else:
        machine = json.dumps({"localhost": _devices(processes)})
        named = {
            "--world_info": base64.urlsafe_b64encode(machine.encode()).decode(),
            "--master_addr": options.master_addr or "127.0.0.1",
            "--master_port": options.master_port or _free_port(),
        }
    for name, value in named.items():
        if value is not None:
            command.append(f"{name}={value}")
    return [*command, "--module", MODULE, *arguments]


def _workers(process_id: int) -> list[Any]:
    """The processes below the launcher that run cadapter."""
    import psutil

    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process_id).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                words = child.cmdline()
                if MODULE in words and "deepspeed.launcher.launch" not in " ".join(words):
                    found.append(child)
    return found


def run_under_launcher(options: LaunchOptions, processes: int, arguments: Sequence[str]) -> int:
    """Run ``cadapter ARGUMENTS`` in several processes and return the exit code.

    SIGTERM, SIGINT and SIGUSR1 are passed on to the processes that work. When those have saved and stopped for a
    signal, the exit code is 128 + signal.

    Raises:
        CadapterError: a process was killed and could not say so itself.
    """
    received: list[int] = []
    # A session of its own: Ctrl-C reaches the workers through us alone, not the launcher, which would kill them.
    # DeepSpeed looks for an accelerator with a warning where there is none.
    environment = {"DS_ACCELERATOR": "cuda" if visible_gpus() else "cpu", **os.environ}
    job = subprocess.Popen(launcher_command(options, processes, arguments), env=environment, start_new_session=True)

    def pass_on(number: int, _frame: FrameType | None) -> None:
        import psutil

        if number != signal.SIGUSR1:
            received.append(number)
        workers = _workers(job.pid)
        for worker in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.send_signal(number)
        if not workers and number != signal.SIGUSR1:
            job.terminate()

    previous = {number: signal.signal(number, pass_on) for number in REQUESTS}
    try:
        code = job.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)  # whatever of the job is left
    if code and received:
        return 128 + received[-1]
    killed_by = -code if code < 0 else 256 - code if code > SMALLEST_NEGATIVE_CODE else 0
    if killed_by:
        hint = "\nPerhaps the machine ran out of memory." if killed_by == signal.SIGKILL else ""
        raise CadapterError(f"A process was killed by signal {killed_by} ({signal.strsignal(killed_by)}).{hint}")
    return code


def relaunched(options: LaunchOptions, stages: int, arguments: Sequence[str]) -> int | None:
    """Start ``cadapter ARGUMENTS`` in several processes if that is called for, and return their exit code.

    None says that this process does the work itself: it belongs to a job already, or one process is enough.

    Raises:
        UsageError: the processes cannot be laid out in ``stages`` stages.
    """
    # Until a trainer listens, a request to save kills nobody; the processes started here inherit that.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if inside_a_job():
        return None
    processes = processes_to_start(options)
    if processes == 1 and not options.several_nodes:
        return None
    if not options.several_nodes:
        check_layout(stages, processes)
    return run_under_launcher(options, processes, arguments)
