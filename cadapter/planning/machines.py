"""GPUs and the links between them: what is assumed of their speed. Sources are in docs/planning.md."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from cadapter.errors import UsageError
from cadapter.planning.memory import CONTEXT_BYTES, GIB


@dataclass(frozen=True)
class Link:
    """A connection.

    Attributes:
        name: as on the command line.
        gigabytes: 10⁹ bytes per second in one direction, as sold.
        share: of that which large messages reach, assumed.
        microseconds: of a message, besides its bytes.
        between_nodes: whether it connects nodes, rather than GPUs of one.
    """

    name: str
    gigabytes: float
    share: float
    microseconds: float
    between_nodes: bool = False

    def seconds(self, count: float, messages: int = 1) -> float:
        """How long ``count`` bytes take in so many messages."""
        return count / (self.gigabytes * 1e9 * self.share) + messages * self.microseconds * 1e-6


def _named(*links: Link) -> dict[str, Link]:
    return {link.name: link for link in links}


LINKS = _named(
    Link("nvlink", 450, 0.8, 10),
    Link("nvlink3", 300, 0.8, 10),
    Link("pcie5", 63, 0.8, 15),
    Link("pcie", 31.5, 0.8, 15),
    Link("pcie3", 15.75, 0.8, 15),
    Link("ib-ndr", 50, 0.9, 10, True),
    Link("ib-hdr", 25, 0.9, 10, True),
    Link("100gbe", 12.5, 0.9, 30, True),
    Link("25gbe", 3.125, 0.9, 50, True),
    Link("10gbe", 1.25, 0.9, 50, True),
    Link("1gbe", 0.125, 0.9, 100, True),
)
DEFAULT_LOCAL, DEFAULT_NETWORK = LINKS["pcie"], LINKS["10gbe"]


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU: 10¹² operations per second of dense bfloat16 products as sold, and GiB of memory."""

    name: str
    tflops: float
    gib: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100", 989, 79.6),
        Gpu("h200", 989, 140.4),
        Gpu("a100", 312, 79.6),
        Gpu("a100-40gb", 312, 39.6),
        Gpu("l40s", 362, 45),
        Gpu("a6000", 155, 48),
        Gpu("rtx5090", 210, 32),
        Gpu("rtx4090", 165, 24),
        Gpu("rtx3090", 71, 24),
    )
}
DEFAULT_GPU = GPUS["h100"]


@dataclass(frozen=True)
class Machine:
    """GPUs that are alike, on nodes that are alike.

    Attributes:
        gpus: of all nodes.
        nodes: how many.
        gpu: of which kind.
        gib: memory of each; None: not said, so nothing is checked.
        local, network: what connects GPUs of a node, and nodes.
    """

    gpus: int = 1
    nodes: int = 1
    gpu: Gpu = DEFAULT_GPU
    gib: float | None = None
    local: Link = DEFAULT_LOCAL
    network: Link = DEFAULT_NETWORK

    @property
    def free(self) -> float | None:
        """Bytes of each GPU that training can have: all but CUDA's own."""
        return None if self.gib is None else self.gib * GIB - CONTEXT_BYTES

    def node_of(self, rank: int) -> int:
        """The node of a process."""
        return rank // (self.gpus // self.nodes)


Named = TypeVar("Named")


def _find(kind: str, name: str, known: Mapping[str, Named]) -> Named:
    if name.lower() not in known:
        raise UsageError(f"{kind} {name}: not known.\nKnown are {', '.join(known)}.")
    return known[name.lower()]


def machine(
    gpus: int = 1, nodes: int = 1, links: tuple[str, ...] = (), gpu: str | None = None, gib: float | None = None
) -> Machine:
    """The machine that the command line describes.

    Args:
        gpus, nodes: how many in all.
        links: names of links, at most one within a node and one between nodes.
        gpu: the name of a kind of GPU.
        gib: memory of each GPU; None: that of the kind that is named.

    Raises:
        UsageError: a name is not known, or the numbers do not go together.
    """
    if gpus % nodes:
        raise UsageError(
            f"--gpus {gpus} does not divide over --nodes {nodes}.\nGive the number of GPUs of all nodes together."
        )
    found: dict[bool, Link] = {}
    for name in links:
        link = _find("--link", name, LINKS)
        if link.between_nodes in found:
            where = "between nodes" if link.between_nodes else "within a node"
            raise UsageError(
                f"--link {name}: a link {where} was given before, {found[link.between_nodes].name}.\n"
                "Give one within a node and one between nodes."
            )
        found[link.between_nodes] = link
    if nodes == 1 and True in found:
        raise UsageError(f"--link {found[True].name} connects nodes, and there is one.\nGive --nodes.")
    kind = _find("--gpu", gpu, GPUS) if gpu else DEFAULT_GPU
    memory = gib if gib is not None else kind.gib if gpu else None
    if memory is not None and not CONTEXT_BYTES < memory * GIB < math.inf:
        raise UsageError(
            f"--gpu-memory {gib:g}: CUDA itself takes {CONTEXT_BYTES / GIB:g} GiB; give what the card has."
        )
    return Machine(gpus, nodes, kind, memory, found.get(False, DEFAULT_LOCAL), found.get(True, DEFAULT_NETWORK))
