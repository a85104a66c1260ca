"""Two machines in one: network namespaces with a cable between them, a host name and a view of the files each.

A namespace lives as long as a process in it. The one that holds it open ends with its standard input, so that nothing
is left behind, however the tests end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.tiny_project import command, environment

PROGRAMS = ("unshare", "nsenter", "ip", "mount")


@dataclass(frozen=True)
class Machine:
    """A machine: ``holder`` is the process id by which its namespaces are found."""

    name: str
    address: str
    holder: int

    def inside(self, *words: object) -> list[str]:
        """The command that runs ``words`` on this machine."""
        return ["nsenter", "--target", str(self.holder), "--net", "--uts", "--mount", "--", *map(str, words)]

    def do(self, *words: object) -> str:
        """Run ``words`` on this machine; they must succeed."""
        done = subprocess.run(self.inside(*words), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def start(self, *arguments: object, **changes: str) -> subprocess.Popen[str]:
        """Start ``cadapter ARGUMENTS`` on this machine."""
        return subprocess.Popen(
            self.inside(*command(*arguments)), env=environment(**changes), cwd="/", text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip


def obstacle() -> str:
    """Why machines cannot be made here; empty where they can."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    if os.geteuid() != 0:
        return "network namespaces need root"
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "ip", "link", "add", "one", "type", "veth", "peer", "name", "other"],
        capture_output=True, text=True,
    )  # fmt: skip
    return f"network namespaces are not permitted: {tried.stderr.strip()}" if tried.returncode else ""


@contextlib.contextmanager
def two_machines(folder: Path) -> Iterator[tuple[Machine, Machine]]:
    """node-a at 10.99.0.1 and node-b at 10.99.0.2, which find each other by name; ``folder`` keeps their files."""
    (folder / "hosts").write_text("127.0.0.1 localhost\n10.99.0.1 node-a\n10.99.0.2 node-b\n")
    (folder / "resolv.conf").write_text("")  # nobody to ask: a name that is not in hosts is unknown at once
    with contextlib.ExitStack() as stack:
        machines = []
        for number, letter in enumerate("ab", 1):
            holder = subprocess.Popen(
                ["unshare", "--net", "--uts", "--mount", "sh", "-c", "echo ready; exec cat"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            stack.callback(holder.wait, 60)
            stack.callback(holder.stdin.close)
            assert holder.stdout.readline() == "ready\n"
            machine = Machine(f"node-{letter}", f"10.99.0.{number}", holder.pid)
            machine.do("hostname", machine.name)
            for name in ("hosts", "resolv.conf"):
                machine.do("mount", "--bind", folder / name, f"/etc/{name}")
            machines.append(machine)
        one, other = machines
        one.do("ip", "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", other.holder)
        for machine in machines:
            machine.do("ip", "address", "add", f"{machine.address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                machine.do("ip", "link", "set", device, "up")
        yield one, other
