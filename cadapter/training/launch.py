"""One command, several processes: ``train`` and ``eval`` start themselves again under DeepSpeed's launcher.

The launcher starts one process for each GPU (or, without GPUs, as many as asked for) with RANK, WORLD_SIZE and
LOCAL_RANK set; these join the job instead of starting another. The parent stays, passes signals on to the
processes that work, and ends with their exit code. It calls the launcher's part that starts the processes of one
machine (``deepspeed.launcher.launch``), also where the user calls it on each of several machines; only where it has
to reach the others itself, the part that does so (``deepspeed.launcher.runner``) comes first.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cadapter
from cadapter.config import check_layout
from cadapter.errors import UsageError
from cadapter.terminal import note
from cadapter.training import nodes, over_ssh
from cadapter.training.error_file import ErrorFile
from cadapter.training.job import JOB, end_with_parent, run_job, signal_workers
from cadapter.training.nodes import DEFAULT_PORT, Node
from cadapter.training.tasks import Task, task_of


@dataclass(frozen=True)
class LaunchOptions:
    """How many processes, where, and how they are started; None where the launcher's default holds."""

    num_gpus: int | None = None
    num_nodes: int | None = None
    hostfile: Path | None = None
    master_addr: str | None = None
    master_port: int | None = None
    node_rank: int | None = None
    no_ssh: bool = False
    launcher: str | None = None

    @property
    def several_nodes(self) -> bool:
        """Whether more than this machine may take part."""
        return bool(self.hostfile) or (self.num_nodes or 1) > 1 or self.node_rank is not None


@dataclass(frozen=True)
class Part:
    """What this machine starts.

    Attributes:
        devices: the GPUs of each machine, one for each process, in the order of ranks.
        number: which of the machines this is.
        address, port: where rank 0 listens.
    """

    devices: dict[str, list[str]]
    number: int
    address: str
    port: int

    def in_words(self) -> str:
        """What the user should see to be alike on all machines."""
        counts = [len(devices) for devices in self.devices.values()]
        first, own = sum(counts[: self.number]), counts[self.number]
        ranks = f"rank {first}" if own == 1 else f"ranks {first} to {first + own - 1}"
        return (
            f"Node {self.number} of {len(counts)}: {ranks} of {sum(counts)}; "
            f"all meet at {self.address}, port {self.port}."
        )


def inside_a_job() -> bool:
    """Whether the environment describes a job that this process belongs to (torchrun, DeepSpeed's launcher)."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def join_task(task: Task, options: LaunchOptions) -> None:
    """Describe the job of ``srun`` or ``mpirun`` in the environment, as torchrun would have.

    Raises:
        UsageError: options say how to start processes that are started already.
    """
    asked = {
        "--num-gpus": options.num_gpus, "--num-nodes": options.num_nodes, "--hostfile": options.hostfile,
        "--no-ssh": options.no_ssh or None, "--launcher": options.launcher,
    }  # fmt: skip
    given = [name for name, value in asked.items() if value is not None]
    if given:
        raise UsageError(
            f"{', '.join(given)}: this is one of {task.size} processes that {task.program} started already.\n"
            "Leave the option out; or start one process a machine, and tell it its --node-rank."
        )
    address = options.master_addr or os.environ.get("MASTER_ADDR") or task.address
    port = options.master_port or os.environ.get("MASTER_PORT") or task.port or DEFAULT_PORT
    if not address:
        raise UsageError(
            f"{task.program} started this process as one of {task.size}, but does not tell where the first one runs.\n"
            "Give its machine with --master-addr, or set MASTER_ADDR."
        )
    described = {
        "RANK": task.rank, "WORLD_SIZE": task.size, "LOCAL_RANK": task.local_rank, "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }  # fmt: skip
    os.environ.update({name: str(value) for name, value in described.items()})
    if task.rank == 0:
        note(f"Started by {task.program}: {task.size} processes, which meet at {address}, port {port}.")


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
    if gpus and options.num_gpus > gpus:
        raise UsageError(f"--num-gpus {options.num_gpus}: only {gpus} GPUs are visible on this machine.")
    return options.num_gpus


def check_numbers(options: LaunchOptions) -> None:
    """Raise :class:`UsageError` for counts below one."""
    for name, value in (("--num-gpus", options.num_gpus), ("--num-nodes", options.num_nodes)):
        if value is not None and value < 1:
            raise UsageError(f"{name} {value}: give at least 1.")


def nodes_of(options: LaunchOptions) -> list[Node]:
    """Return the machines of the run, as the hostfile or --num-nodes says.

    Raises:
        UsageError: they do not say it, or not as they should.
    """
    if options.hostfile:
        return nodes.chosen(nodes.read_hostfile(options.hostfile), options.num_nodes, options.num_gpus)
    if options.num_nodes is None or options.node_rank is None or options.master_addr is None:
        raise UsageError(
            "Several machines need --num-nodes M, --node-rank K (from 0) and --master-addr A on each of them,\n"
            "or a --hostfile of lines 'HOST slots=N'; or start cadapter under srun or torchrun."
        )
    processes = processes_to_start(options)
    return [Node(f"node-{number}", processes, f"--num-gpus {processes}") for number in range(options.num_nodes)]


def part_of(machines: Sequence[Node], options: LaunchOptions) -> Part:
    """Return what this machine starts of a run on ``machines``.

    Raises:
        UsageError: it is none of them, cannot have so many processes, or the port is taken.
    """
    number = nodes.number_of_this_machine(machines) if options.node_rank is None else options.node_rank
    if not 0 <= number < len(machines):
        raise UsageError(f"--node-rank {number}: there are {len(machines)} machines, counted from 0.")
    own = machines[number]
    gpus = visible_gpus()
    if gpus and own.slots > gpus:
        raise UsageError(f"{own.where}: {own.slots} processes, but only {gpus} GPUs are visible on this machine.")
    address = options.master_addr or machines[0].name
    port = options.master_port or DEFAULT_PORT
    if len(machines) > 1:
        nodes.check_address(address)
    if number == 0 and not _is_free(port):
        raise UsageError(f"Port {port} of this machine is in use.\nChoose another with --master-port, on all machines.")
    devices = {node.name: [str(each) for each in range(node.slots)] for node in machines}
    return Part({**devices, own.name: _devices(own.slots)}, number, address, port)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as rank 0 does: a run that just ended is no bar
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


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


def launch_command(part: Part, arguments: Sequence[str]) -> list[str]:
    """Return the command that starts this machine's processes of ``cadapter ARGUMENTS`` under DeepSpeed's launcher."""
    world = base64.urlsafe_b64encode(json.dumps(part.devices).encode()).decode()
    options = [f"--world_info={world}", f"--node_rank={part.number}"]
    options += [f"--master_addr={part.address}", f"--master_port={part.port}"]
    fixed = ["--no_local_rank", "--log_level=critical", "--module", "cadapter"]
    return [sys.executable, "-m", "deepspeed.launcher.launch", *options, *fixed, *arguments]


def _with_accelerator(environ: Mapping[str, str]) -> dict[str, str]:
    """``environ`` of a launcher: DeepSpeed looks for an accelerator with a warning where there is none."""
    return {"DS_ACCELERATOR": "cuda" if visible_gpus() else "cpu", **environ}


def without_modules_of_here(environ: Mapping[str, str]) -> dict[str, str]:
    """``environ`` in which ``python -m`` (3.11 and newer) does not import from the working directory.

    It may be the user's texts' or a stranger's, and hold a torch.py. Unless cadapter itself is run from there.
    """
    if Path(cadapter.__file__).parents[1] == Path.cwd():
        return dict(environ)
    return {"PYTHONSAFEPATH": "1", **environ}


def run_part(part: Part, arguments: Sequence[str], errors: ErrorFile) -> int:
    """Run this machine's part of ``cadapter ARGUMENTS`` and return the exit code, as :func:`run_job`."""
    job = uuid.uuid4().hex
    environment = _with_accelerator(without_modules_of_here({**os.environ, JOB: job}))
    command = launch_command(part, arguments)
    return run_job(command, environment, lambda number: bool(signal_workers(job, number)), errors)


def run_over_ssh(machines: Sequence[Node], options: LaunchOptions, arguments: Sequence[str], errors: ErrorFile) -> int:
    """Run ``cadapter ARGUMENTS`` on ``machines``, reached through ssh, and return the exit code, as :func:`run_job`."""
    gpus = over_ssh.chosen_gpus(machines, os.environ)
    over_ssh.check_machines(machines, options.launcher)
    kept = over_ssh.kept_back(os.environ)
    if kept:
        note(
            f"Not sent to the other machines, since a command line is no place for secrets: {', '.join(kept)}. "
            "Set them in the logins there if they are needed."
        )
    job = uuid.uuid4().hex

    def tell(number: int) -> bool:
        return bool(signal_workers(job, number)) or over_ssh.signal_first_machine(machines[0], job, number)

    with tempfile.TemporaryDirectory(prefix="cadapter-") as folder:
        exports = Path(folder) / "environment"
        over_ssh.write_environment(exports, job, without_modules_of_here(os.environ))
        address, port = options.master_addr, options.master_port
        command = over_ssh.runner_command(Path(folder), machines, gpus, address, port, arguments)
        environment = {**over_ssh.without_secrets(os.environ), "DS_ENV_FILE": str(exports)}
        return run_job(command, _with_accelerator(without_modules_of_here(environment)), tell, errors)


def relaunched(
    options: LaunchOptions, stages: int, arguments: Sequence[str], directory: Path | None = None
) -> int | None:
    """Start ``cadapter ARGUMENTS`` in several processes if that is called for, and return their exit code.

    None says that this process does the work itself: it belongs to a job already, or one process is enough.
    ``directory`` is the run's, which keeps the error that ends it.

    Raises:
        UsageError: the processes cannot be laid out in ``stages`` stages, or options do not go together.
    """
    # Until a trainer listens, a request to save kills nobody; the processes started here inherit that.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # Read when torch is imported: that a connection to a rank is lost is said by us, in one line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if inside_a_job():
        if JOB in os.environ:  # the parent is the launcher, which may be killed together with the command
            end_with_parent()()
        return None
    task = task_of(os.environ)
    if task is not None and options.node_rank is None:
        join_task(task, options)
        return None
    check_numbers(options)
    errors = ErrorFile(directory)
    if options.several_nodes:
        machines = nodes_of(options)
        check_layout(stages, sum(node.slots for node in machines))
        if len(machines) > 1 and options.node_rank is None and not options.no_ssh:
            return run_over_ssh(machines, options, arguments, errors)
        part = part_of(machines, options)
        note(part.in_words())
        return run_part(part, arguments, errors)
    processes = processes_to_start(options)
    if processes == 1:
        return None
    check_layout(stages, processes)
    address, port = options.master_addr or "127.0.0.1", options.master_port or _free_port()
    return run_part(Part({"localhost": _devices(processes)}, 0, address, port), arguments, errors)
