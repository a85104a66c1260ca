"""How the work is laid out: pipeline stages × data-parallel replicas, and which layers a stage holds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from cadapter.config import check_layout
from cadapter.errors import UsageError

LAYER_KINDS = ("EmbeddingLayer", "DecoderLayer", "HeadLayer")


@dataclass(frozen=True)
class Layout:
    """Stages × replicas, and where one process stands.

    With row-major ranks (the default) neighbouring ranks are replicas of one stage; with ``column_major``
    neighbouring ranks are the stages of one pipeline, so that a pipeline stays on one node.
    """

    stages: int
    replicas: int
    rank: int = 0
    column_major: bool = False

    @classmethod
    def of(cls, processes: int, stages: int, rank: int = 0, column_major: bool = False) -> Layout:
        """Lay out ``processes`` processes.

        Raises:
            UsageError: the stages do not divide the processes.
        """
        check_layout(stages, processes)
        return cls(stages, processes // stages, rank, column_major)

    def stage_of(self, rank: int) -> int:
        """The pipeline stage of a process, from 0."""
        return rank % self.stages if self.column_major else rank // self.replicas

    @property
    def stage(self) -> int:
        """The pipeline stage of this process, from 0."""
        return self.stage_of(self.rank)

    @property
    def replica(self) -> int:
        """The data-parallel replica of this process, from 0."""
        return self.rank // self.stages if self.column_major else self.rank % self.replicas

    @property
    def first_stage(self) -> bool:
        """Whether this process holds the embedding."""
        return self.stage == 0

    def stage_leaders(self) -> list[int]:
        """The ranks of replica 0, one for each stage in order."""
        return [stage if self.column_major else stage * self.replicas for stage in range(self.stages)]


def partition(weights: Sequence[float], parts: int) -> list[int]:
    """Cut a row of layers into ``parts`` non-empty contiguous parts whose heaviest is as light as can be.

    Returns the ``parts + 1`` bounds. Among equal cuts the one with the earliest bounds is taken.
    """
    count = len(weights)
    sums = [0.0]
    for weight in weights:
        sums.append(sums[-1] + weight)
    best = [[float("inf")] * (count + 1) for _ in range(parts + 1)]
    cut = [[0] * (count + 1) for _ in range(parts + 1)]
    best[0][0] = 0.0
    for part in range(1, parts + 1):
        for stop in range(part, count + 1):
            for start in range(part - 1, stop):
                heaviest = max(best[part - 1][start], sums[stop] - sums[start])
                if heaviest < best[part][stop]:
                    best[part][stop], cut[part][stop] = heaviest, start
    bounds = [count]
    for part in range(parts, 0, -1):
        bounds.append(cut[part][bounds[-1]])
    return bounds[::-1]


def stage_bounds(method: str, stages: int, layer_bytes: Sequence[int], trainable: Sequence[int]) -> list[int]:
    """Return the bounds of the stages over [embedding, blocks …, head] by the config's ``partition_method``.

    Args:
        method: "estimated_size" (bytes of weights), "uniform", "parameters" (trained ones), "type:REGEX".
        stages: number of stages.
        layer_bytes: bytes of weights of each pipeline layer.
        trainable: trained parameters of each pipeline layer.

    Raises:
        UsageError: more stages than layers, or a type that is no regular expression or matches none.
    """
    count = len(layer_bytes)
    if stages > count:
        raise UsageError(f"pipeline_stages = {stages}, but the model has only {count} pipeline layers.")
    weights: list[float]
    if method == "estimated_size":
        weights = [float(size) for size in layer_bytes]
    elif method == "uniform":
        weights = [1.0] * count
    elif method == "parameters":
        weights = [float(number) for number in trainable]
    else:
        try:
            pattern = re.compile(method.removeprefix("type:"), re.IGNORECASE)
        except re.error as error:
            raise UsageError(f"partition_method = {method!r} holds no regular expression: {error}.") from error
        kinds = [LAYER_KINDS[0], *[LAYER_KINDS[1]] * (count - 2), LAYER_KINDS[2]]
        weights = [float(bool(pattern.search(kind))) for kind in kinds]
        if not any(weights):
            raise UsageError(
                f"partition_method = {method!r} matches no layer.\nLayers are of the types {', '.join(LAYER_KINDS)}."
            )
    return partition(weights, stages)
