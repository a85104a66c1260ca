"""The machines of a run: what a hostfile says, which of them this one is, and what it starts."""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cadapter.errors import UsageError

DEFAULT_PORT = 29500
"""Where rank 0 listens when several machines have to know it beforehand; torchrun's and DeepSpeed's default too."""

HOSTFILE_FORM = "Write one line for each machine: HOST slots=N, such as node-a slots=8."
_HOSTFILE_LINE = re.compile(r"(?P<name>\w[\w.-]*)\s+slots=(?P<slots>\S+)")
_LOOPBACK = re.compile(r"localhost|127\.\d+\.\d+\.\d+")


@dataclass(frozen=True)
class Node:
    """A machine of the run.

    Attributes:
        name: what others call it.
        slots: how many processes run on it.
        where: what says so, for messages: "hosts, line 3".
    """

    name: str
    slots: int
    where: str = ""


def read_hostfile(path: str | Path) -> list[Node]:
    """Return the machines of a file of lines ``HOST slots=N``; a # begins a comment.

    Raises:
        UsageError: the file cannot be read, a line is something else, or a machine stands there twice.
    """
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UsageError(f"--hostfile {path} cannot be read: {reason}.\n{HOSTFILE_FORM}") from error
    nodes: dict[str, Node] = {}
    for number, line in enumerate(lines, 1):
        text = line.split("#", 1)[0].strip()
        if not text:
            continue
        where = f"{path}, line {number}"
        match = _HOSTFILE_LINE.fullmatch(text)
        if match is None:
            raise UsageError(f"{where}: {text!r} does not name a machine.\n{HOSTFILE_FORM}")
        name, slots = match["name"], match["slots"]
        if not slots.isdecimal() or int(slots) < 1:
            raise UsageError(f"{where}: slots={slots} is no number of processes.\n{HOSTFILE_FORM}")
        if name in nodes:
            raise UsageError(f"{where}: {name} stands in {nodes[name].where} already.\nGive each machine one line.")
        nodes[name] = Node(name, int(slots), where)
    if not nodes:
        raise UsageError(f"--hostfile {path} names no machine.\n{HOSTFILE_FORM}")
    loopback = [node for node in nodes.values() if _LOOPBACK.fullmatch(node.name)]
    if len(nodes) > 1 and loopback:
        raise UsageError(
            f"{loopback[0].where}: {loopback[0].name} is a different machine on each of them.\n"
            "Use a name or an address under which the others reach it."
        )
    return list(nodes.values())


def chosen(nodes: Sequence[Node], num_nodes: int | None, num_gpus: int | None) -> list[Node]:
    """Return the first ``num_nodes`` of ``nodes`` with ``num_gpus`` processes each; None takes all that there are.

    Raises:
        UsageError: there are fewer.
    """
    if num_nodes is not None and num_nodes > len(nodes):
        raise UsageError(f"--num-nodes {num_nodes}: the hostfile names {len(nodes)} machines only.")
    taken = list(nodes[:num_nodes])
    if num_gpus is None:
        return taken
    for node in taken:
        if num_gpus > node.slots:
            raise UsageError(f"--num-gpus {num_gpus}: {node.where} gives {node.name} {node.slots} slots only.")
    return [Node(node.name, num_gpus, node.where) for node in taken]


def names_of_this_machine() -> set[str]:
    """The names and addresses under which this machine may stand in a hostfile."""
    import psutil

    names = {socket.gethostname(), socket.getfqdn(), "localhost"}
    addresses = {each.address for interface in psutil.net_if_addrs().values() for each in interface}
    return names | addresses


def number_of_this_machine(nodes: Sequence[Node]) -> int:
    """Return which of ``nodes`` this machine is, from 0; a name matches with or without its domain.

    Raises:
        UsageError: none of them, or several.
    """
    own = names_of_this_machine()
    own |= {name.split(".")[0] for name in own if not _is_address(name)}
    found = [
        number
        for number, node in enumerate(nodes)
        if node.name in own or (not _is_address(node.name) and node.name.split(".")[0] in own)
    ]
    if len(found) != 1:
        which = "is none" if not found else f"is {len(found)}"
        named = ", ".join(f"{node.name} ({node.where})" for node in nodes)
        raise UsageError(
            f"This machine, {socket.gethostname()}, {which} of {named}.\n"
            "Say which it is with --node-rank, counted from 0."
        )
    return found[0]


def _is_address(name: str) -> bool:
    return ":" in name or bool(re.fullmatch(r"[\d.]+", name))


def check_address(address: str) -> None:
    """Raise :class:`UsageError` if other machines cannot reach rank 0 at ``address``."""
    if _LOOPBACK.fullmatch(address):
        raise UsageError(
            f"--master-addr {address} is a different machine on each of them.\n"
            "Give the name or address under which all machines reach the first one."
        )
