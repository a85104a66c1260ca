"""A hostfile and ssh between two machines: one command on the first, real sshd and pdsh, and what travels."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cadapter.training.job import JOB
from tests.machines import Machine, obstacle, two_machines
from tests.tiny_project import Project, metrics

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


@pytest.mark.processes
def test_one_command_trains_on_two_machines(
    project: Project, machines: tuple[Machine, Machine], tmp_path: Path
) -> None:
    """Arguments and variables arrive as they are, secrets are on no command line, and a signal ends everything."""
    hosts = tmp_path / "hosts"
    hosts.write_text("node-a slots=4\nnode-b slots=4\n")
    keys = {"max_steps": 100_000, "epochs": 100_000, "pipeline_stages": 2}
    config = project.write_config("over ssh", **keys)
    changed = ("--set", 'layers_to_transform = "1:3"', "--set", "class_weights={positive=1.0,negative=0.5}")
    run = machines[0].start("train", config, "--hostfile", hosts, "--num-gpus", 1, *changed, **SENT, **SECRETS)
    directory = project.root / "over ssh"
    deadline = time.monotonic() + 120
    while not (directory / "metrics.jsonl").is_file() or len(metrics(directory)) < 2:
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline, run.communicate()
        time.sleep(0.05)

    everything = list(psutil.process_iter())
    lines = [" ".join(process.cmdline()) for process in everything if process.is_running()]
    assert any("pdsh" in line for line in lines)
    assert not [line for line in lines if any(value in line for value in SECRETS.values())]
    (job,) = {words.get(JOB) for words in map(variables, everything)} - {None}
    family = [process for process in everything if variables(process).get(JOB) == job]
    workers = [variables(process) for process in family if "RANK" in variables(process)]
    assert sorted(each["RANK"] for each in workers) == ["0", "1"]
    for each in workers:
        assert each["CUDA_VISIBLE_DEVICES"] == "3"
        assert {name: each[name] for name in SENT if name != "CUDA_VISIBLE_DEVICES"}.items() <= each.items()
        assert {name: each.get(name) for name in SENT} == {**SENT, "CUDA_VISIBLE_DEVICES": "3"}
        assert not SECRETS.keys() & each.keys()
    resolved = (directory / "resolved.json").read_text()
    assert '"negative": 0.5' in resolved

    run.send_signal(signal.SIGTERM)
    said, errors = run.communicate(timeout=120)
    assert run.returncode == 143, said + errors
    assert "a checkpoint is saved" in errors
    assert "Not sent to the other machines, since a command line is no place for secrets: HF_TOKEN, MLFLOW" in said
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []


def variables(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}
