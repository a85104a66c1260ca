"""What a run will be, from its config alone: no weight is read, nothing is written, and no GPU is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from cadapter.config import Config, check_layout
from cadapter.data import KnownCounts, known_counts
from cadapter.data.batches import BatchPlan
from cadapter.errors import UsageError
from cadapter.models.checkpoint import resolve_model
from cadapter.models.isolation import check_isolation
from cadapter.models.loading import DTYPES, FLEX_ATTENTION, CausalLM
from cadapter.models.outline import CONFIG_FILES, open_weightless
from cadapter.planning.fitting import Remedy, Settings, remedies
from cadapter.planning.layouts import Candidate, Place, Verdict, judge
from cadapter.planning.machines import Machine
from cadapter.planning.memory import RunSizes, StageMemory, all_stages, heaviest
from cadapter.training.layout import Layout, stage_bounds
from cadapter.training.modes import mode_of
from cadapter.training.modes.base import Mode
from cadapter.training.recompute import FASTEST_FIRST, Recompute, in_a_word, recompute_for, usable_bytes
from cadapter.training.sizes import carrier_of, compiles_on, situation_of, sizes_of

NOWHERE = torch.device("meta")
"""Where the model of a forecast lies."""


@dataclass(frozen=True)
class Outlook:
    """A run as its config describes it, on GPUs: the model without its weights, what is trained, and its sizes."""

    config: Config
    model: CausalLM
    mode: Mode
    sizes: RunSizes

    def bounds(self, stages: int) -> list[int]:
        """Which pipeline layers each of ``stages`` stages holds.

        Raises:
            UsageError: there are more stages than layers.
        """
        return stage_bounds(self.config.partition_method, stages, self.model.layer_bytes(), self.mode.trainable())


def outlook_of(config: Config) -> Outlook:
    """Work out the sizes of the run that ``config`` describes, for GPUs.

    Raises:
        UsageError: model and config do not go together.
    """
    # Packages of kernels need not be installed here; they keep what sdpa's kernels keep.
    elsewhere = ("auto", "flash_attention_2", "flash_attention_3")
    attention = None if config.attn_implementation in elsewhere else config.attn_implementation
    trusted = config.trust_remote_code
    checkpoint = open_weightless(resolve_model(config.model_dir, CONFIG_FILES, trusted), trusted)
    model = CausalLM(checkpoint, DTYPES[config.dtype], NOWHERE, attention, config.load_in_4bit)
    if config.document_attention == "isolated" and attention != FLEX_ATTENTION:
        check_isolation(CausalLM(checkpoint, DTYPES[config.dtype], "cpu", attention))  # it looks at real masks
    mode = mode_of(config, model)
    has_neutral = any(dataset.control_class == 0 or dataset.class_field for dataset in config.datasets)
    carrier = carrier_of(config, mode, has_neutral)
    return Outlook(config, model, mode, sizes_of(config, model, mode, carrier, compiles_on("cuda", config, model)))


@dataclass(frozen=True)
class Forecast:
    """All that a plan shows.

    Attributes:
        outlook: the run.
        machine: what it runs on.
        bounds, replicas: its layout.
        recompute: what blocks keep.
        stages: the memory of each stage.
        levels: bytes of the heaviest stage with each of the ways to keep activations.
        usable: bytes of a GPU that may be taken up; None: its memory is not known.
        counts: of the data, or why they are not known.
        steps: of the run, as far as they are known.
        layouts: of all GPUs, the run's own first; empty for one GPU.
        uneven: numbers of stages that cannot have the run's batch.
        remedies: single changes where the run does not fit; ``remedy``: what would make it fit.
    """

    outlook: Outlook
    machine: Machine
    bounds: list[int]
    replicas: int
    recompute: Recompute
    stages: list[StageMemory]
    levels: dict[str, float]
    usable: float | None
    counts: KnownCounts | str
    steps: BatchPlan | None
    layouts: list[Verdict]
    uneven: list[int]
    remedies: list[Remedy]
    remedy: Remedy | None

    @property
    def fits(self) -> bool | None:
        """Whether every stage fits; None: it is not known."""
        return None if self.usable is None else max(each.total for each in self.stages) <= self.usable

    @property
    def sequences_per_step(self) -> int:
        """Of the whole batch."""
        config = self.outlook.config
        return config.micro_batch_size * config.gradient_accumulation_steps * self.replicas


def forecast(config: Config, machine: Machine, sequences: int | None = None) -> Forecast:
    """Work out what ``config`` will be on ``machine``.

    Args:
        sequences: packed sequences to train on; None: what the cache knows.

    Raises:
        UsageError: model, config and machine do not go together.
    """
    check_layout(config.pipeline_stages, machine.gpus)
    outlook = outlook_of(config)
    bounds, replicas = outlook.bounds(config.pipeline_stages), machine.gpus // config.pipeline_stages
    usable = None if machine.free is None else usable_bytes(machine.free)
    chosen = _recompute(config, outlook.sizes, bounds, machine)
    stages = all_stages(outlook.sizes, bounds, chosen.block)
    counts = _counts(config, sequences)
    per_step = config.micro_batch_size * config.gradient_accumulation_steps * replicas
    known = counts.sequences if isinstance(counts, KnownCounts) else 0
    fits = usable is None or max(each.total for each in stages) <= usable
    tried, remedy = ([], None) if fits else _remedies(outlook, machine)
    layouts, uneven = _layouts(outlook, machine, usable) if machine.gpus > 1 else ([], [])
    return Forecast(
        outlook=outlook,
        machine=machine,
        bounds=bounds,
        replicas=replicas,
        recompute=chosen,
        stages=stages,
        levels={keep: heaviest(outlook.sizes, bounds, _same(keep)) for keep in FASTEST_FIRST},
        usable=usable,
        counts=counts,
        steps=BatchPlan(known, per_step, config.epochs, config.max_steps, config.seed) if known else None,
        layouts=layouts,
        uneven=uneven,
        remedies=tried,
        remedy=remedy,
    )


def _same(keep: str) -> Callable[[int], str]:
    return lambda _: keep


def _recompute(config: Config, sizes: RunSizes, bounds: list[int], machine: Machine) -> Recompute:
    return recompute_for(config.activation_checkpointing, sizes, bounds, machine.free)


def _counts(config: Config, sequences: int | None) -> KnownCounts | str:
    if sequences is not None:
        return KnownCounts(sequences, 0, sequences * config.sequence_len)
    try:
        return known_counts(config) or "the data is not prepared yet (cadapter prepare)"
    except UsageError as error:
        return str(error).splitlines()[0].rstrip(".")


def _layouts(outlook: Outlook, machine: Machine, usable: float | None) -> tuple[list[Verdict], list[int]]:
    """Every layout that has the run's batch and micro-batches, the run's own first; and stages that cannot have it."""
    config = outlook.config
    batch = config.gradient_accumulation_steps * (machine.gpus // config.pipeline_stages)
    found, uneven = [], []
    most = min(machine.gpus, len(outlook.sizes.layer_bytes))
    for stages in [number for number in range(1, most + 1) if machine.gpus % number == 0]:
        if batch % (machine.gpus // stages):
            uneven.append(stages)
            continue
        run = replace(outlook.sizes, accumulation=batch * stages // machine.gpus)
        bounds = outlook.bounds(stages)
        keep = _recompute(config, run, bounds, machine)
        matters = machine.nodes > 1 and 1 < stages < machine.gpus
        for column_major in (False, True) if matters else (config.use_column_major_topology,):
            places = _places(machine.gpus, stages, column_major)
            candidate = Candidate(run, tuple(bounds), places, column_major, in_a_word(keep), keep.block)
            found.append(judge(candidate, machine, usable))
    own = (config.pipeline_stages, config.use_column_major_topology)
    return sorted(found, key=lambda each: (each.candidate.stages, each.candidate.column_major) != own), uneven


def _places(gpus: int, stages: int, column_major: bool) -> tuple[Place, ...]:
    layouts = (Layout.of(gpus, stages, rank, column_major) for rank in range(gpus))
    return tuple(Place(layout.stage, layout.replica) for layout in layouts)


def _remedies(outlook: Outlook, machine: Machine) -> tuple[list[Remedy], Remedy | None]:
    config = outlook.config
    now = situation_of(config, outlook.mode, machine.gpus, config.activation_checkpointing)
    return remedies(now, lambda settings: _attempt(config, machine, settings))


def _attempt(config: Config, machine: Machine, settings: Settings) -> Remedy:
    """What the heaviest stage takes with other settings, on as many GPUs as these need."""
    assert machine.free is not None
    changed = config.model_copy(update=dict(settings))
    stages = changed.pipeline_stages
    gpus = machine.gpus if machine.gpus % stages == 0 else stages
    try:
        outlook = outlook_of(changed)
        bounds = outlook.bounds(stages)
    except UsageError as error:
        return Remedy(settings, None, False, str(error).splitlines()[0])
    chosen = recompute_for(changed.activation_checkpointing, outlook.sizes, bounds, machine.free)
    memory = heaviest(outlook.sizes, bounds, chosen.block)
    fits = memory <= usable_bytes(machine.free)
    others = [f"on {gpus} GPUs"] if gpus != machine.gpus else []
    if changed.activation_checkpointing == "auto":
        others.append(f"keeping {in_a_word(chosen)}")
    return Remedy(settings, memory, fits, ", ".join(["fits" if fits else "too much", *others]))
