"""How processes are started: the launcher's command, and the published spellings."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys

import pytest

from cadapter.errors import UsageError
from cadapter.training import launch
from cadapter.training.launch import LaunchOptions, inside_a_job, launcher_command, processes_to_start, relaunched


def parts(options: LaunchOptions, processes: int = 2) -> tuple[str, dict[str, str], list[str]]:
    """The launcher's module, its options by name, and what it is told to start."""
    command = launcher_command(options, processes, ["train", "config.toml", "--quiet"])
    assert command[:2] == [sys.executable, "-m"]
    start = command.index("--module")
    words = command[3:start]
    named = dict(word.split("=", 1) for word in words if "=" in word)
    return command[2], {**named, **{word: "" for word in words if "=" not in word}}, command[start + 1 :]


def world_of(named: dict[str, str]) -> dict[str, list[str]]:
    return json.loads(base64.urlsafe_b64decode(named["--world_info"]))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    """Pretend that so many GPUs are visible, as CUDA_VISIBLE_DEVICES says."""

    def set_gpus(count: int, visible: str | None) -> None:
        monkeypatch.setattr(launch, "visible_gpus", lambda: count)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return set_gpus


@pytest.mark.parametrize(
    ("count", "visible", "processes", "devices"),
    [
        (0, None, 2, ["-1", "-1"]),
        (0, "", 3, ["-1", "-1", "-1"]),
        (4, None, 2, ["0", "1"]),
        (2, "2,3", 2, ["2", "3"]),
        (3, "5, 1,7", 2, ["5", "1"]),
        (2, "GPU-aa,GPU-bb", 2, ["GPU-aa", "GPU-bb"]),
    ],
)
def test_one_machine_uses_the_visible_gpus(gpus, count: int, visible: str | None, processes: int, devices) -> None:
    gpus(count, visible)
    module, named, started = parts(LaunchOptions(), processes)
    assert module == "deepspeed.launcher.launch"
    assert world_of(named) == {"localhost": devices}
    assert started == ["cadapter", "train", "config.toml", "--quiet"]
    assert named["--master_addr"] == "127.0.0.1"
    assert 1024 <= int(named["--master_port"]) < 65536


def test_two_runs_on_one_machine_get_their_own_ports() -> None:
    ports = {parts(LaunchOptions())[1]["--master_port"] for _ in range(4)}
    assert len(ports) > 1
    assert parts(LaunchOptions(master_port=29501))[1]["--master_port"] == "29501"


def test_several_machines_are_the_runners_business() -> None:
    options = LaunchOptions(None, 2, "hosts", "node-a", 29500, 1, True, "pdsh")
    module, named, started = parts(options)
    assert module == "deepspeed.launcher.runner"
    expected = {
        "--num_nodes": "2", "--hostfile": "hosts", "--master_addr": "node-a", "--master_port": "29500",
        "--node_rank": "1", "--launcher": "pdsh", "--no_ssh": "",
    }  # fmt: skip
    assert expected.items() <= named.items()
    assert "--num_gpus" not in named  # the hostfile says how many each has
    assert parts(LaunchOptions(8, 2, "hosts"))[1]["--num_gpus"] == "8"
    assert started[:2] == ["cadapter", "train"]


def test_the_launchers_know_every_option() -> None:
    """DeepSpeed's own parsers take the commands; an option they do not know ends with exit code 2."""
    for options in (LaunchOptions(2), LaunchOptions(None, 2, "hosts", "node-a", 29500, 1, True, "pdsh")):
        command = launcher_command(options, 2, ["train", "--num-gpus", "2", "--quiet"])
        program = f"from {command[2]} import parse_args; print(parse_args())"
        done = subprocess.run(
            [sys.executable, "-c", program, *command[3:]],
            capture_output=True, text=True, timeout=120, env={**os.environ, "DS_ACCELERATOR": "cpu"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "'train', '--num-gpus', '2', '--quiet'" in done.stdout


def test_a_process_with_a_rank_belongs_to_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not inside_a_job()
    monkeypatch.setenv("RANK", "0")
    assert inside_a_job()
    assert relaunched(LaunchOptions(num_gpus=7), 2, []) is None


def test_how_many_processes(gpus) -> None:
    gpus(0, None)
    assert processes_to_start(LaunchOptions()) == 1
    assert processes_to_start(LaunchOptions(num_gpus=3)) == 3
    gpus(4, None)
    assert processes_to_start(LaunchOptions()) == 4
    with pytest.raises(UsageError, match="only 4 GPUs"):
        processes_to_start(LaunchOptions(num_gpus=5))
    with pytest.raises(UsageError, match="at least one"):
        processes_to_start(LaunchOptions(num_gpus=0))


@pytest.fixture(autouse=True)
def _keep_signal_handling():
    before = signal.getsignal(signal.SIGUSR1)
    yield
    signal.signal(signal.SIGUSR1, before)


def test_stages_that_do_not_divide_the_processes_are_refused_before_anything_starts(
    gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    gpus(0, None)
    monkeypatch.setattr(launch, "run_under_launcher", None)
    with pytest.raises(UsageError, match="pipeline_stages = 2 does not divide the 3 processes"):
        relaunched(LaunchOptions(num_gpus=3), 2, [])
