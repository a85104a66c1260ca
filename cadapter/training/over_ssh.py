"""Several machines through ssh: DeepSpeed's runner starts the part of each, by pdsh.

What other machines need of this environment travels as the runner's exports. These stand on a command line, which
every user of a machine can read; what may be secret stays here, and each machine uses what its own login has.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from cadapter.errors import UsageError
from cadapter.training.job import JOB
from cadapter.training.nodes import DEFAULT_PORT, Node

LAUNCHER = "pdsh"
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
SECONDS_TO_TELL = 30
"""How long a signal may take to another machine."""

TRAVELLING = (
    "ACCELERATE_", "BNB_", "CADAPTER_TIMEOUT", "CUDA_", "DS_", "GLOO_", "HF_", "HUGGINGFACE_", "LD_LIBRARY_PATH",
    "MKL_", "MLFLOW", "MV2", "NCCL_", "OMP_", "PYTHON", "PYTORCH_", "SAFETENSORS_", "TMPDIR", "TOKENIZERS_", "TORCH",
    "TRANSFORMERS_", "TRITON_", "UCX", "XDG_CACHE_HOME",
)  # fmt: skip
"""What the names of variables begin with that a run depends on."""
_SECRET = re.compile(r"TOKEN(?!IZER)|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|_KEY(_|$)", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z_]\w*")


def is_secret(name: str) -> bool:
    """Whether a variable of this name may hold a secret."""
    return bool(_SECRET.search(name))


def _wanted(environ: Mapping[str, str]) -> dict[str, str]:
    """What of ``environ``, and of the user's files for DeepSpeed's runner, the other machines should have."""
    found = {name: value for name, value in environ.items() if name.startswith(TRAVELLING) and name != "DS_ENV_FILE"}
    file_name = environ.get("DS_ENV_FILE", ".deepspeed_env")
    for file in (Path("~").expanduser() / file_name, Path(file_name)):
        lines = file.read_text("utf-8").splitlines() if file.is_file() else []
        found.update({name.strip(): value for name, sign, value in (line.partition("=") for line in lines) if sign})
    return found


def travelling(environ: Mapping[str, str]) -> dict[str, str]:
    """Return what of ``environ`` goes to the other machines: what runs depend on, and no secret."""
    return {
        name: value
        for name, value in _wanted(environ).items()
        if _NAME.fullmatch(name) and not is_secret(name) and "\n" not in value
    }


def kept_back(environ: Mapping[str, str]) -> list[str]:
    """Return the names of what the other machines might miss, because it may be secret."""
    return sorted(filter(is_secret, _wanted(environ)))


def without_secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the runner's environment: it exports some variables by itself."""
    return {name: value for name, value in environ.items() if not is_secret(name)}


def chosen_gpus(nodes: Sequence[Node], environ: Mapping[str, str]) -> list[int] | None:
    """Return the numbers of the GPUs that CUDA_VISIBLE_DEVICES chooses on every machine; None where it is not set.

    Raises:
        UsageError: it does not choose by number, or fewer than a machine has slots.
    """
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return None
    names = [name.strip() for name in chosen.split(",")]
    if not all(name.isdecimal() for name in names):
        raise UsageError(
            f"CUDA_VISIBLE_DEVICES = {chosen!r} goes to all machines, but only numbers mean the same on each.\n"
            "Name the GPUs by number, or do not set it."
        )
    for node in nodes:
        if node.slots > len(names):
            raise UsageError(
                f"{node.where}: {node.name} has {node.slots} slots, but CUDA_VISIBLE_DEVICES = {chosen} chooses "
                f"{len(names)} GPUs on every machine.\nGive --num-gpus {len(names)}."
            )
    return [int(name) for name in names]


def check_machines(nodes: Sequence[Node], launcher: str | None) -> None:
    """Check that the other machines can be reached and have Python and this directory under the same paths.

    Raises:
        UsageError: one cannot or has not, or a program is missing here.
    """
    if launcher not in (None, LAUNCHER):
        raise UsageError(
            f"--launcher {launcher}: the machines of a hostfile are reached by {LAUNCHER} only.\n"
            "Start cadapter itself under srun, mpirun or torchrun, or on each machine with --no-ssh and --node-rank."
        )
    for program in ("ssh", LAUNCHER):
        if shutil.which(program) is None:
            raise UsageError(
                f"{program} is not installed; a hostfile's machines are reached by it.\n"
                "Install it, or start the command on each machine with --no-ssh and --node-rank."
            )
    for path in (os.getcwd(), sys.executable):
        if shlex.quote(path) != path:
            raise UsageError(f"{path}: over ssh, DeepSpeed's runner cannot use a path with such signs or spaces.")
    line = f"cd {os.getcwd()} && test -x {sys.executable}"
    quiet = subprocess.DEVNULL
    asked = [
        subprocess.Popen([*SSH, node.name, line], stdin=quiet, stdout=quiet, stderr=subprocess.PIPE, text=True)
        for node in nodes
    ]
    answers = [process.communicate()[1].strip() for process in asked]
    for node, process, said in zip(nodes, asked, answers, strict=True):
        if process.returncode == 255:  # ssh's own failures
            raise UsageError(f"{node.where}: {node.name} cannot be reached.\n{said}")
        if process.returncode:
            raise UsageError(
                f"{node.where}: {node.name} has no directory {os.getcwd()}, or no {sys.executable}.\n"
                "All machines need them under the same paths."
            )


def _argument(word: str) -> str:
    """``word`` so that pdsh and the remote shell leave it as it is: the runner quotes those with spaces, no others."""
    quoted = re.sub(r"([\\$`])", r"\\\1", word) if " " in word else shlex.quote(word)
    return quoted.replace("%", "%%")


def _value(text: str) -> str:
    """A variable's ``text`` so that it arrives as it is: the runner puts it in double quotes where these signs are."""
    return re.sub(r"([\\$`\"])", r"\\\1", text).replace("%", "%%")


def write_environment(file: Path, job: str, environ: Mapping[str, str]) -> None:
    """Write what goes to the other machines in the form of DeepSpeed's ``.deepspeed_env``."""
    values = {**travelling(environ), JOB: job}
    file.write_text("".join(f"{name}={_value(value)}\n" for name, value in values.items()), "utf-8")


def runner_command(
    folder: Path, nodes: Sequence[Node], gpus: Sequence[int] | None, address: str | None, port: int | None,
    arguments: Sequence[str],
) -> list[str]:  # fmt: skip
    """Return the command that starts ``cadapter ARGUMENTS`` on all of ``nodes``, with its hostfile in ``folder``.

    Args:
        gpus: which GPUs each machine uses, as many as it has slots; None takes the first.
        address: of the first machine; None asks that machine itself.
    """
    largest = max(gpus) + 1 if gpus else 0
    hosts = folder / "hosts"
    hosts.write_text("".join(f"{node.name} slots={max(node.slots, largest)}\n" for node in nodes))
    options = [f"--hostfile={hosts}", f"--launcher={LAUNCHER}", f"--master_port={port or DEFAULT_PORT}"]
    if address:
        options.append(f"--master_addr={address}")
    if gpus:
        slots = (f"{node.name}:{','.join(map(str, gpus[: node.slots]))}" for node in nodes)
        options.append(f"--include={'@'.join(slots)}")
    # The runner (0.19.8) does not tell pdsh's launchers its log level. The remote shell reads two words here.
    module = " --log_level=critical cadapter"
    fixed = ["--no_ssh_check", "--no_local_rank", "--log_level=critical", "--module", module]
    return [sys.executable, "-m", "deepspeed.launcher.runner", *options, *fixed, *map(_argument, arguments)]


def signal_first_machine(node: Node, job: str, number: int) -> bool:
    """Send a signal to the workers on the first machine, which tell all others; return whether there were any."""
    line = f"cd {os.getcwd()} && {sys.executable} -m cadapter.training.job {job} {number}"
    try:
        done = subprocess.run(
            [*SSH, node.name, line], stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS_TO_TELL, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0
