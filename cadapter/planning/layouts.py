"""Layouts of a run on several GPUs, compared: memory, bubble, traffic and tokens per second."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cadapter.planning.machines import Link, Machine
from cadapter.planning.memory import RunSizes, heaviest
from cadapter.planning.schedule import bubble, step_seconds
from cadapter.planning.speed import stage_seconds
from cadapter.planning.traffic import crossing, gradient_bytes, ring_bytes, stage_traffic


class Place(NamedTuple):
    """What one process does."""

    stage: int
    replica: int


@dataclass(frozen=True)
class Candidate:
    """A layout that is possible.

    Attributes:
        run: its sizes, with the accumulation that this layout has.
        bounds: of the stages.
        places: of each process, by rank.
        column_major: whether neighbouring ranks are stages of one pipeline.
        keep: what blocks keep, in one word or a number; ``keep_of`` says it for each.
    """

    run: RunSizes
    bounds: tuple[int, ...]
    places: tuple[Place, ...]
    column_major: bool
    keep: str | int
    keep_of: Callable[[int], str]

    @property
    def stages(self) -> int:
        """S."""
        return len(self.bounds) - 1

    @property
    def replicas(self) -> int:
        """R."""
        return len(self.places) // self.stages


@dataclass(frozen=True)
class Verdict:
    """What a layout comes to.

    Attributes:
        memory: bytes of the heaviest stage.
        fits: whether that fits the GPU; None: its memory is not known.
        bubble: (S − 1)/(M + S − 1).
        stage_bytes: at each cut of one pipeline, in a step, both ways.
        replica_bytes: that a process of the stage with the most gradients sends in a step.
        crosses: whether hidden states, and gradients, go from node to node.
        seconds: of a step, without the optimiser's.
        reduction_seconds: of these, adding up gradients.
        tokens_per_second: of all GPUs.
    """

    candidate: Candidate
    memory: float
    fits: bool | None
    bubble: float
    stage_bytes: int
    replica_bytes: float
    crosses: tuple[bool, bool]
    seconds: float
    reduction_seconds: float
    tokens_per_second: float


def judge(candidate: Candidate, machine: Machine, usable: float | None) -> Verdict:
    """Estimate a layout; ``usable`` bytes of a GPU may be taken up."""
    run, bounds, stages = candidate.run, candidate.bounds, candidate.stages
    times = [stage_seconds(run, bounds, stage, candidate.keep_of, machine.gpu) for stage in range(stages)]
    transfers = [_transfer_seconds(candidate, machine, cut) for cut in range(stages - 1)]
    passes = step_seconds(
        [time.forward for time in times], [time.backward for time in times], transfers, run.accumulation
    )
    reduction = max(_reduction_seconds(candidate, machine, stage) for stage in range(stages))
    memory = heaviest(run, bounds, candidate.keep_of)
    sent = max(ring_bytes(gradient_bytes(run, bounds, stage), candidate.replicas) for stage in range(stages))
    tokens = run.micro_batch * run.accumulation * candidate.replicas
    return Verdict(
        candidate=candidate,
        memory=memory,
        fits=None if usable is None else memory <= usable,
        bubble=bubble(stages, run.accumulation),
        stage_bytes=stage_traffic(run) if stages > 1 else 0,
        replica_bytes=sent,
        crosses=(
            any(_cut_flows(candidate, machine, cut) for cut in range(stages - 1)),
            any(len(_nodes(candidate, machine, stage)) > 1 for stage in range(stages)),
        ),
        seconds=passes + reduction,
        reduction_seconds=reduction,
        tokens_per_second=tokens / (passes + reduction),
    )


def _ranks(candidate: Candidate, stage: int) -> list[int]:
    """The processes of a stage, by replica."""
    found = {place.replica: rank for rank, place in enumerate(candidate.places) if place.stage == stage}
    return [found[replica] for replica in range(candidate.replicas)]


def _cut_flows(candidate: Candidate, machine: Machine, cut: int) -> int:
    """How many pipelines leave a node at a cut, of the node where these are most."""
    pairs = zip(_ranks(candidate, cut), _ranks(candidate, cut + 1), strict=True)
    nodes = [(machine.node_of(one), machine.node_of(other)) for one, other in pairs]
    return max(Counter(one for one, other in nodes if one != other).values(), default=0)


def _transfer_seconds(candidate: Candidate, machine: Machine, cut: int) -> float:
    """Of a micro-batch at a cut, one way; pipelines that leave a node together share its link."""
    flows = _cut_flows(candidate, machine, cut)
    link: Link = machine.network if flows else machine.local
    return link.seconds(max(flows, 1) * crossing(candidate.run).forward, messages=2)


def _nodes(candidate: Candidate, machine: Machine, stage: int) -> set[int]:
    return {machine.node_of(rank) for rank in _ranks(candidate, stage)}


def _reduction_seconds(candidate: Candidate, machine: Machine, stage: int) -> float:
    """Adding up a stage's gradients in a ring; stages that do so over a node's link at once share it."""
    replicas = candidate.replicas
    if replicas == 1:
        return 0.0
    sent = ring_bytes(gradient_bytes(candidate.run, candidate.bounds, stage), replicas)
    messages = 2 * (replicas - 1)
    nodes = _nodes(candidate, machine, stage)
    if len(nodes) == 1:
        return machine.local.seconds(sent, messages)
    others = [_nodes(candidate, machine, other) for other in range(candidate.stages)]
    flows = max(sum(len(other) > 1 and node in other for other in others) for node in nodes)
    return machine.network.seconds(flows * sent, messages)


def best(verdicts: Sequence[Verdict]) -> Verdict | None:
    """The fastest that fits; of equals the one with fewer stages; None: none fits."""
    fitting = [verdict for verdict in verdicts if verdict.fits is not False]
    return min(fitting, key=lambda verdict: (-verdict.tokens_per_second, verdict.candidate.stages), default=None)
