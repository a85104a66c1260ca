"""One command, several processes: ``train`` and ``eval`` start themselves again under DeepSpeed's launcher.

The launcher starts one process for each GPU (or, without GPUs, as many as asked for) with RANK, WORLD_SIZE and
LOCAL_RANK set; these join the job instead of starting another. The parent stays, passes signals on to the
processes that work, and ends with their exit code.
"""

from __future__ import annotations

import contextlib
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
from cadapter.errors import UsageError
from cadapter.training.signals import REQUESTS

MODULE = "cadapter"


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


def launcher_command(options: LaunchOptions, processes: int, arguments: Sequence[str]) -> list[str]:
    """Return the command that starts ``cadapter ARGUMENTS`` under DeepSpeed's launcher."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(processes), "--no_local_rank"]
    command += ["--log_level", "error"]
    port = options.master_port
    if port is None and not options.several_nodes:
        port = _free_port()
    named = {
        "--num_nodes": options.num_nodes,
        "--hostfile": options.hostfile,
        "--master_addr": options.master_addr,
        "--master_port": port,
        "--node_rank": options.node_rank,
        "--launcher": options.launcher,
    }
    for name, value in named.items():
        if value is not None:
            command += [name, str(value)]
    if options.no_ssh:
        command.append("--no_ssh")
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
        for left in _workers(job.pid):
            left.kill()
    if code and received:
        return 128 + received[-1]
    return code if code >= 0 else 128 - code


def relaunched(options: LaunchOptions, stages: int, arguments: Sequence[str]) -> int | None:
    """Start ``cadapter ARGUMENTS`` in several processes if that is called for, and return their exit code.

    None says that this process does the work itself: it belongs to a job already, or one process is enough.

    Raises:
        UsageError: the processes cannot be laid out in ``stages`` stages.
    """
    if inside_a_job():
        return None
    processes = processes_to_start(options)
    if processes == 1 and not options.several_nodes:
        return None
    if not options.several_nodes:
        check_layout(stages, processes)
    return run_under_launcher(options, processes, arguments)
