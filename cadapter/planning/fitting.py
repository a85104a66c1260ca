"""Which settings make a run fit a GPU that it does not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cadapter.adapters.directory import layer_ranges

Settings = Mapping[str, Any]
"""Keys of a config, and the values that they would have."""

ACCUMULATION = "gradient_accumulation_steps"


@dataclass(frozen=True)
class Situation:
    """What of a config can be changed for memory's sake.

    Attributes:
        kind: "control", "lora" or "full".
        checkpointing: the value of ``activation_checkpointing``.
        four_bit, rows, accumulation, stages, tokens: of the config.
        wide_gradients: whether gradients add up in a wider dtype than the weights have.
        replicas: that the stages are on.
        layers: of the model.
        chosen: those in which something is trained.
    """

    kind: str
    checkpointing: str | int
    four_bit: bool
    rows: int
    accumulation: int
    stages: int
    replicas: int
    tokens: int
    wide_gradients: bool
    layers: int
    chosen: Sequence[int]


@dataclass(frozen=True)
class Remedy:
    """Settings, and the bytes that the heaviest stage takes with them.

    Attributes:
        settings: what is changed.
        memory: bytes; None: it cannot be done.
        fits: whether that is little enough.
        remark: the same in words, and on what it rests, or why it cannot be done.
    """

    settings: Settings
    memory: float | None
    fits: bool
    remark: str


def changes(now: Situation) -> list[Settings]:
    """Single changes that take less memory, those first that change least of what is learnt."""
    found: list[Settings] = []
    if now.checkpointing != "auto":
        levels = ("selective", "full", "offload")
        later = levels[levels.index(now.checkpointing) + 1 :] if now.checkpointing in levels else levels
        found += [{"activation_checkpointing": level} for level in later]
    rows = now.rows
    while rows > 1:
        rows = rows // 2 if rows % 2 == 0 else 1
        found.append({"micro_batch_size": rows, ACCUMULATION: now.accumulation * now.rows // rows})
    if now.kind == "full" and now.wide_gradients:
        found.append({"gradient_dtype": "bfloat16"})
    if now.kind != "full" and not now.four_bit:
        found.append({"load_in_4bit": True})
    stages = 2 * now.stages
    while stages <= min(now.layers, 8 * now.stages):
        # On as many GPUs there are fewer replicas, which must do more for the same batch.
        factor = stages // now.stages
        more = {ACCUMULATION: now.accumulation * factor} if now.replicas % factor == 0 else {}
        found.append({"pipeline_stages": stages, **more})
        stages *= 2
    if len(now.chosen) > 1:
        found.append({"layers_to_transform": layer_ranges(now.chosen[len(now.chosen) // 2 :])})
    if now.tokens >= 128:
        found.append({"sequence_len": now.tokens // 128 * 64})
    return found


def remedies(now: Situation, attempt: Callable[[Settings], Remedy]) -> tuple[list[Remedy], Remedy | None]:
    """Try each change alone; where none is enough, add them up in their order.

    Args:
        now: the run.
        attempt: works out what the run takes with settings.

    Returns:
        Each change alone, and the first combination that fits: one change where one is enough; None: none does.
    """
    alone = [attempt(settings) for settings in changes(now)]
    for remedy in alone:
        if remedy.fits:
            return alone, remedy
    possible = [remedy.settings for remedy in alone if remedy.memory is not None]
    return alone, _together(possible, attempt, now.accumulation)


def _together(
    candidates: Sequence[Settings], attempt: Callable[[Settings], Remedy], accumulation: int
) -> Remedy | None:
    combined: dict[str, Any] = {}
    least = float("inf")
    for settings in candidates:
        both = {**combined, **settings}
        if ACCUMULATION in combined and ACCUMULATION in settings and "micro_batch_size" not in settings:
            both[ACCUMULATION] = combined[ACCUMULATION] * settings[ACCUMULATION] // accumulation
        remedy = attempt(both)
        if remedy.memory is None or remedy.memory >= least:
            continue
        combined, least = dict(remedy.settings), remedy.memory
        if remedy.fits:
            return remedy
    return None
