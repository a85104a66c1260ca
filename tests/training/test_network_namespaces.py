"""Several nodes for real: two machines with their own networks, names and views of the files, one shared directory.

node-b sees the project read-only, so that nothing but rank 0 can have written there.
"""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cadapter.training.job import JOB
from tests.machines import Machine, obstacle, two_machines
from tests.tiny_project import Project, metrics, run_well

pytestmark = pytest.mark.processes

LOSS = 1e-5
"""Losses are sums of some 500 float32 terms around 6, added in different orders and on different processes."""
STEPS = 6
KEYS: dict[str, Any] = {"max_steps": STEPS, "eval_fraction": 0.1, "evals_per_run": 1}
ENDLESS = {"max_steps": 100_000, "epochs": 100_000, "pipeline_stages": 2}
SECONDS = 120


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory, project: Project) -> Iterator[tuple[Machine, Machine]]:
    reason = obstacle()
    if reason:
        pytest.skip(reason)
    with two_machines(tmp_path_factory.mktemp("machines")) as (one, other):
        other.do("mount", "--bind", project.root, project.root)
        other.do("mount", "-o", "remount,ro,bind", project.root)
        yield one, other


@pytest.fixture(scope="module")
def losses(project: Project) -> list[dict[str, float]]:
    """Of one process."""
    run_well("train", project.write_config("nodes-1x1", **KEYS, gradient_accumulation_steps=8))
    return losses_of(project.root / "nodes-1x1")


def losses_of(directory: Path) -> list[dict[str, float]]:
    lines = metrics(directory) + metrics(directory, "eval")
    assert len(lines) > STEPS
    return [{name: value for name, value in line.items() if "loss" in name or name == "step"} for line in lines]


def ends(*commands: subprocess.Popen[str]) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each command, all of which must end soon."""
    try:
        said = [command.communicate(timeout=SECONDS) for command in commands]
    finally:
        for command in commands:
            command.kill()
    return [(command.returncode, *texts) for command, texts in zip(commands, said, strict=True)]


def works(machines: tuple[Machine, Machine], *arguments: object, **changes: str) -> list[tuple[int, str, str]]:
    """Run ``cadapter ARGUMENTS --node-rank K`` on both machines; both must succeed."""
    commands = [machine.start(*arguments, "--node-rank", rank, **changes) for rank, machine in enumerate(machines)]
    found = ends(*commands)
    assert [code for code, _, _ in found] == [0, 0], found
    return found


def processes_of_the_job(marked: psutil.Process) -> list[psutil.Process]:
    """All processes of the same job on both machines, the launchers among them."""
    job = marked.environ()[JOB]
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(JOB) == job:
                found.append(process)
        except psutil.Error:
            continue
    return found


def descendants(command: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(command.pid).children(recursive=True)


def when(ready: Callable[[], bool], *commands: subprocess.Popen[str]) -> None:
    """Wait until ``ready``, for as long as the commands run."""
    deadline = time.monotonic() + SECONDS
    while not ready():
        assert [command.poll() for command in commands] == [None] * len(commands), ends(*commands)
        assert time.monotonic() < deadline
        time.sleep(0.05)


def trains(directory: Path) -> Callable[[], bool]:
    return lambda: (directory / "metrics.jsonl").is_file() and len(metrics(directory)) > 2


def assert_none_left(processes: list[psutil.Process]) -> None:
    assert processes
    _, alive = psutil.wait_procs(processes, timeout=5)
    assert alive == []


def start_endless(project: Project, machines: tuple[Machine, Machine], name: str) -> list[subprocess.Popen[str]]:
    """Two stages, one on each machine, in training."""
    config = project.write_config(name, **ENDLESS)
    options = ("--num-nodes", 2, "--no-ssh", "--master-addr", "node-a")
    commands = [machine.start("train", config, *options, "--node-rank", k) for k, machine in enumerate(machines)]
    when(trains(project.root / name), *commands)
    return commands


@pytest.mark.slow
def test_a_pipeline_across_two_nodes(project: Project, machines: tuple[Machine, Machine], losses) -> None:
    config = project.write_config("nodes-2x1", **KEYS, gradient_accumulation_steps=8, pipeline_stages=2)
    (_, first, _), (_, second, _) = works(machines, "train", config, "--num-nodes", 2, "--master-addr", "10.99.0.1")
    assert losses_of(project.root / "nodes-2x1") == [pytest.approx(line, rel=LOSS) for line in losses]
    assert "Node 0 of 2: rank 0 of 2; all meet at 10.99.0.1, port 29500." in first
    assert second.splitlines() == [
        "Node 1 of 2: rank 1 of 2; all meet at 10.99.0.1, port 29500.",
        "node-b: waiting for rank 0, which prepares the data.",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("column_major", [pytest.param(False, id="row-major"), pytest.param(True, id="column-major")])
def test_two_processes_on_each_of_two_nodes(
    project: Project, machines: tuple[Machine, Machine], losses, tmp_path: Path, column_major: bool
) -> None:
    """Row-major a stage's replicas share a node; column-major each pipeline is on one node. Names say who is who."""
    name = f"nodes-2x2-{column_major}"
    keys = {**KEYS, "gradient_accumulation_steps": 4, "use_column_major_topology": column_major}
    config = project.write_config(name, **keys, pipeline_stages=2)
    hosts = tmp_path / "hosts"
    hosts.write_text("node-a slots=2\nnode-b.local slots=2\n")
    options = ("--hostfile", hosts, "--no-ssh", "--master-port", 29400)
    found = ends(*(machine.start("train", config, *options) for machine in machines))
    assert [code for code, _, _ in found] == [0, 0], found
    assert "Node 1 of 2: ranks 2 to 3 of 4; all meet at node-a, port 29400." in found[1][1]
    assert losses_of(project.root / name) == [pytest.approx(line, rel=LOSS) for line in losses]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_one_node_saves_and_stops_all(
    project: Project, machines: tuple[Machine, Machine], number: int, code: int
) -> None:
    name = f"signal-{number}"
    commands = start_endless(project, machines, name)
    family = [process for command in commands for process in descendants(command)]
    assert len(family) == 4  # a launcher and a worker on each
    commands[1].send_signal(number)
    (first, _, told), (second, _, _) = ends(*commands)
    assert (first, second) == (code, code)
    assert_none_left(family)
    (step,) = re.findall(r"Stopped after step (\d+); a checkpoint is saved", told)
    assert (project.root / name / "checkpoints" / f"step-{int(step):06d}" / "manifest.json").is_file()


@pytest.mark.slow
def test_a_request_to_save_stops_nothing(project: Project, machines: tuple[Machine, Machine]) -> None:
    commands = start_endless(project, machines, "save")
    commands[1].send_signal(signal.SIGUSR1)
    when(lambda: any((project.root / "save" / "checkpoints").glob("step-*")), *commands)
    commands[0].send_signal(signal.SIGTERM)
    assert [code for code, _, _ in ends(*commands)] == [143, 143]


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["worker", "launcher", "command"])
def test_nothing_is_left_of_a_node_where_a_process_was_killed(
    project: Project, machines: tuple[Machine, Machine], victim: str
) -> None:
    commands = start_endless(project, machines, f"killed-{victim}")
    family = [process for command in commands for process in descendants(command)]
    launcher, worker = descendants(commands[1])
    {"worker": worker, "launcher": launcher, "command": psutil.Process(commands[1].pid)}[victim].kill()
    (first, _, told), (second, _, _) = ends(*commands)
    assert second == (-signal.SIGKILL if victim == "command" else 1)
    # A command that is killed has its processes stop in good order.
    assert first == (143 if victim == "command" else 1), told
    assert_none_left(family)


@pytest.mark.slow
def test_a_node_that_does_not_see_the_cache_builds_its_own(
    project: Project, machines: tuple[Machine, Machine], losses
) -> None:
    cache = project.root / ".cadapter-cache"
    config = project.write_config("unshared", **KEYS, gradient_accumulation_steps=4, pipeline_stages=2)
    node = machines[1]
    node.do("mount", "-t", "tmpfs", "none", cache)
    try:
        options = ("--num-nodes", 2, "--num-gpus", 2, "--master-addr", "node-a")
        _, (_, said, _) = works(machines, "train", config, *options)
        own = node.do("ls", cache).split()
    finally:
        node.do("umount", cache)
    assert losses_of(project.root / "unshared") == [pytest.approx(line, rel=LOSS) for line in losses]
    assert f"node-b: rank 0's cache {cache}/" in said
    assert len(own) == 2, "each dataset's is built once, whatever the number of processes"
