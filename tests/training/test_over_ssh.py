"""A hostfile and ssh between two machines: one command on the first, real sshd and pdsh, and what travels."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cadapter.errors import UsageError
from cadapter.training.job import JOB
from cadapter.training.nodes import Node
from cadapter.training.over_ssh import check_machines, chosen_gpus, is_secret, kept_back, travelling, without_secrets
from tests.machines import Machine, obstacle, two_machines
from tests.tiny_project import Project, command, environment, metrics

# ---- what travels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("HF_TOKEN", True), ("HUGGING_FACE_HUB_TOKEN", True), ("WANDB_API_KEY", True), ("COMET_APIKEY", True),
        ("AWS_SECRET_ACCESS_KEY", True), ("MLFLOW_TRACKING_PASSWORD", True), ("DB_PASSWD", True),
        ("GOOGLE_APPLICATION_CREDENTIALS", True), ("my_private_key", True), ("HF_TOKEN_PATH", True),
        ("TOKENIZERS_PARALLELISM", False), ("HF_HOME", False), ("OMP_NUM_THREADS", False), ("PYTHONPATH", False),
        ("NCCL_SOCKET_IFNAME", False), ("PYTHONKEYBOARD", False), ("SSH_AUTH_SOCK", False),
    ],
)  # fmt: skip
def test_names_of_secrets(name: str, secret: bool) -> None:
    assert is_secret(name) == secret
    assert (name in without_secrets({name: "x"})) != secret


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home of one's own, and somewhere else to work."""
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def test_what_a_run_depends_on_travels(home: Path) -> None:
    sent = {
        "HF_HOME": "/data", "NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "eth1", "TORCH_NCCL_BLOCKING_WAIT": "1",
        "CUDA_LAUNCH_BLOCKING": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": "/a:/b", "PYTORCH_CUDA_ALLOC_CONF": "x",
        "TRITON_CACHE_DIR": "/tmp/t", "TMPDIR": "/scratch", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    others = {
        "HF_TOKEN": "hf_x",
        "USER": "me",
        "RANK": "0",
        "SLURM_PROCID": "0",
        "HF_TWO_LINES": "a\nb",
        "PYTHON-X": "1",
    }
    assert travelling({**sent, **others}) == sent
    assert kept_back({**sent, **others, "WANDB_API_KEY": "x"}) == ["HF_TOKEN"]  # the other would not travel anyway


def test_the_users_file_for_deepspeed_counts_as_it_does_there(home: Path) -> None:
    (home / ".deepspeed_env").write_text("NCCL_DEBUG=WARN\nMY_OWN=a=b\n\nMY_TOKEN=x\n")
    (home / "work" / ".deepspeed_env").write_text("MY_OWN=c\n")
    assert travelling({"NCCL_DEBUG": "INFO"}) == {"NCCL_DEBUG": "WARN", "MY_OWN": "c"}
    assert kept_back({}) == ["MY_TOKEN"]
    (home / "other").write_text("MY_OWN=d\n")
    assert travelling({"DS_ENV_FILE": str(home / "other")}) == {"MY_OWN": "d"}


MACHINES = [Node("node-a", 2, "hosts, line 1"), Node("node-b", 1, "hosts, line 2")]


def test_the_gpus_that_all_machines_use() -> None:
    assert chosen_gpus(MACHINES, {}) is None
    assert chosen_gpus(MACHINES, {"CUDA_VISIBLE_DEVICES": "3, 1,7"}) == [3, 1, 7]
    with pytest.raises(UsageError, match="hosts, line 1: node-a has 2 slots, but CUDA_VISIBLE_DEVICES = 3 chooses 1"):
        chosen_gpus(MACHINES, {"CUDA_VISIBLE_DEVICES": "3"})
    for names in ("", "-1", "GPU-1234,GPU-5678"):
        with pytest.raises(UsageError, match="only numbers mean the same on each"):
            chosen_gpus(MACHINES, {"CUDA_VISIBLE_DEVICES": names})


def test_programs_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--launcher slurm: the machines of a hostfile are reached by pdsh only"):
        check_machines(MACHINES, "slurm")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UsageError, match="ssh is not installed"):
        check_machines(MACHINES, "pdsh")


# ---- for real -------------------------------------------------------------------------------------------------------

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"

SSHD_CONFIG = """
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin yes
PasswordAuthentication no
UseDNS no
"""
SSH_CONFIG = """
Host node-*
    IdentityFile {folder}/key
    UserKnownHostsFile /dev/null
    StrictHostKeyChecking no
    LogLevel ERROR
"""


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Machine, Machine]]:
    """Two machines, each of which lets the other in."""
    missing = [name for name in ("ssh", "ssh-keygen", "pdsh", SSHD) if shutil.which(name) is None]
    reason = f"{', '.join(missing)} not installed" if missing else obstacle()
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("machines")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True, timeout=60)
    (folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=folder))
    (folder / "ssh_config").write_text(SSH_CONFIG.format(folder=folder))
    with two_machines(folder) as pair:
        servers = []
        for machine in pair:
            machine.do("mount", "--bind", folder / "ssh_config", "/etc/ssh/ssh_config")
            machine.do("mount", "-t", "tmpfs", "none", "/run")
            machine.do("mkdir", "/run/sshd")
            servers.append(subprocess.Popen(machine.inside(SSHD, "-D", "-f", folder / "sshd_config")))
        try:
            yield pair
        finally:
            for server in servers:
                server.terminate()
                server.wait(60)


SENT = {
    "HF_HOME": "/a b/$HOME/`x`/\"q\"/'s'/%n/\\t",
    "NCCL_DEBUG": "WARN",
    "GLOO_SOCKET_IFNAME": "cable",
    "TORCH_SHOW_CPP_STACKTRACES": "0",
    "CUDA_VISIBLE_DEVICES": "3,5",
}
SECRETS = {"HF_TOKEN": "hf_0123456789", "MLFLOW_TRACKING_PASSWORD": "0123456789", "WANDB_API_KEY": "0123456789"}
SEND_FROM_ELSEWHERE = """
import sys
from cadapter.training.nodes import Node
from cadapter.training.over_ssh import signal_first_machine
assert signal_first_machine(Node("node-a", 1), sys.argv[1], int(sys.argv[2]))
assert not signal_first_machine(Node("node-a", 1), "another job", int(sys.argv[2]))
"""


def start_endless(project: Project, machine: Machine, name: str, *options: object) -> subprocess.Popen[str]:
    """One command for both machines, two stages, in training."""
    hosts = project.root / "hosts"
    hosts.write_text("node-a slots=4\nnode-b slots=4\n")
    config = project.write_config(name, max_steps=100_000, epochs=100_000, pipeline_stages=2)
    run = machine.start("train", config, "--hostfile", hosts, "--num-gpus", 1, *options, **SENT, **SECRETS)
    wait_for(lambda: (project.root / name / "metrics.jsonl").is_file(), run)
    wait_for(lambda: len(metrics(project.root / name)) > 1, run)
    return run


def wait_for(ready: Callable[[], bool], run: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not ready():
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def variables(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


def command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def the_job() -> tuple[str, list[psutil.Process]]:
    """The name of the only job that runs over ssh, and its processes on both machines."""
    workers = [process for process in psutil.process_iter() if variables(process).get("HF_HOME") == SENT["HF_HOME"]]
    (job,) = {variables(process).get(JOB) for process in workers} - {None}
    return job, [process for process in psutil.process_iter() if variables(process).get(JOB) == job]


@pytest.mark.processes
def test_one_command_trains_on_two_machines(project: Project, machines: tuple[Machine, Machine]) -> None:
    """Arguments and variables arrive as they are, secrets are on no command line, and a signal ends everything."""
    changes = (
        "layers_to_transform = '1:3'",
        "class_weights={positive=1.0,negative=0.5}",
        'document_prefix="%n $x `y`"',
    )
    options = [word for change in changes for word in ("--set", change)]
    run = start_endless(project, machines[0], "over ssh", *options)
    directory = project.root / "over ssh"

    lines = [command_line(process) for process in psutil.process_iter()]
    assert any("pdsh" in line for line in lines)
    assert not [line for line in lines if any(value in line for value in SECRETS.values())]
    job, family = the_job()
    workers = [variables(process) for process in family if "RANK" in variables(process)]
    assert sorted(each["RANK"] for each in workers) == ["0", "1"]
    for each in workers:
        assert {name: each.get(name) for name in SENT} == {**SENT, "CUDA_VISIBLE_DEVICES": "3"}
        assert not SECRETS.keys() & each.keys()
    used = json.loads((directory / "resolved.json").read_text("utf-8"))["config"]
    assert used["layers_to_transform"] == "1:3"
    assert used["class_weights"]["negative"] == 0.5
    assert used["document_prefix"] == "%n $x `y`"

    machines[1].do(sys.executable, "-c", SEND_FROM_ELSEWHERE, job, int(signal.SIGUSR1))
    wait_for(lambda: any((directory / "checkpoints").glob("step-*")), run)
    run.send_signal(signal.SIGTERM)
    said, errors = run.communicate(timeout=120)
    assert run.returncode == 143, said + errors
    assert "a checkpoint is saved" in errors
    assert "Not sent to the other machines, since a command line is no place for secrets: HF_TOKEN, MLFLOW" in said
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []


@pytest.mark.processes
@pytest.mark.slow
def test_a_command_that_is_killed_leaves_nothing_on_any_machine(
    project: Project, machines: tuple[Machine, Machine]
) -> None:
    run = start_endless(project, machines[0], "killed over ssh")
    _, family = the_job()
    run.kill()
    run.communicate(timeout=120)
    _, alive = psutil.wait_procs(family, timeout=60)
    assert alive == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("node-c slots=1", "line 2: node-c cannot be reached.\n       ssh: Could not resolve hostname node-c"),
        ("node-b slots=1", "line 2: node-b has no directory {here}, or no {python}"),
    ],
)
def test_a_machine_that_cannot_take_part_is_named(
    project: Project, machines: tuple[Machine, Machine], tmp_path: Path, line: str, words: str
) -> None:
    hosts, here = tmp_path / "hosts", tmp_path / "here"
    hosts.write_text(f"node-a slots=1\n{line}\n")
    here.mkdir()
    node = machines[1]
    node.do("mount", "-t", "tmpfs", "none", tmp_path)  # node-b has its own
    try:
        config = project.write_config("nowhere")
        arguments = command("train", config, "--hostfile", hosts)
        enter = ("sh", "-c", 'cd "$0" && exec "$@"', here, "env", "-u", "CUDA_VISIBLE_DEVICES")
        done = subprocess.run(
            machines[0].inside(*enter, *arguments), capture_output=True, text=True, timeout=120, env=environment()
        )
    finally:
        node.do("umount", tmp_path)
    assert done.returncode == 2, done.stderr
    assert words.format(here=here, python=sys.executable) in done.stderr
    assert not (project.root / "nowhere").exists()
