"""A forecast for the user, and as JSON."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cadapter.data import KnownCounts
from cadapter.planning.layouts import Verdict, best
from cadapter.planning.machines import Machine
from cadapter.planning.memory import CONTEXT_BYTES, GIB
from cadapter.planning.tables import in_toml, layout_table, memory_table, remedy_table, set_options
from cadapter.terminal import note, result, warn
from cadapter.training.forecast import Forecast
from cadapter.training.schedule import evaluation_steps


def show_forecast(found: Forecast, source: Path, overrides: Sequence[str]) -> None:
    """Print a plan and what to do next."""
    outlook, stages = found.outlook, len(found.stages)
    note(outlook.mode.description())
    if outlook.model.family.inferred:
        warn(f"Models of type {outlook.model.config.model_type!r} are in no table of families: sizes are inferred.")
    title = f"Pipeline stages × data-parallel replicas: {stages} × {found.replicas}"
    memory_table(title, outlook.sizes, found.bounds, found.stages)
    result(_kept(found))
    for line in _data(found):
        result(line)
    settings = _show_fit(found)
    if found.layouts:
        settings |= _show_layouts(found)
    note(f"compile: decoder blocks {'are' if outlook.sizes.compiled else 'are not'} compiled on GPUs.")
    given = [override for override in overrides if override.partition("=")[0].strip() not in settings]
    options = [part for override in given for part in ("--set", override)] + set_options(settings)
    note(f"Next: {shlex.join(['cadapter', 'train', str(source), *options, '--dry-run'])}")


def _kept(found: Forecast) -> str:
    setting = found.outlook.config.activation_checkpointing
    levels = ", ".join(f"{keep} {size / GIB:.1f}" for keep, size in found.levels.items())
    chosen = found.recompute.reason or f"activation_checkpointing: {setting}."
    if setting == "auto" and found.usable is None:
        chosen = "activation_checkpointing: auto takes the fastest that fits; none is shown (name a GPU)."
    return f"{chosen} The heaviest stage, in GiB: {levels}."


def _data(found: Forecast) -> list[str]:
    config, counts, steps = found.outlook.config, found.counts, found.steps
    batch = found.sequences_per_step
    lines = [
        f"{batch} sequences a step: {batch * config.sequence_len:,} tokens ({config.micro_batch_size} × "
        f"{config.gradient_accumulation_steps} accumulated × {found.replicas} replicas)."
    ]
    if steps is None:
        limit = f"; at most {config.max_steps:,} (max_steps)" if config.max_steps else ""
        lines.append(f"Steps: not known, since {counts}{limit}. --sequences N says how many there are.")
    elif isinstance(counts, KnownCounts):
        lines.append(
            f"{counts.sequences:,} sequences ({counts.tokens:,} tokens): {steps.steps_per_epoch:,} steps an epoch, "
            f"{steps.total_steps:,} steps in all."
        )
    lines.append(_evaluation(found))
    return lines


def _evaluation(found: Forecast) -> str:
    config, counts, steps = found.outlook.config, found.counts, found.steps
    if not config.eval_fraction:
        return "No evaluation (eval_fraction = 0)."
    known = isinstance(counts, KnownCounts) and counts.eval_sequences > 0
    size = f", {counts.eval_sequences:,} sequences" if known else ""  # type: ignore[union-attr]
    times = len(evaluation_steps(config.evals_per_run, steps.total_steps)) if steps else config.evals_per_run
    return f"Evaluation: {config.eval_fraction:.1%} of the documents{size}, {times} times."


def _card(machine: Machine) -> str:
    return f"a GPU of {machine.gib:g} GiB"


def _show_fit(found: Forecast) -> dict[str, Any]:
    """Say whether it fits, and if not what would; return the settings that do."""
    machine, usable = found.machine, found.usable
    if usable is None or machine.free is None:
        result("Whether it fits: say what the GPU has, with --gpu-memory or --gpu.")
        return {}
    peak = max(each.total for each in found.stages)
    room = (
        f"{peak / GIB:.1f} GiB of {usable / GIB:.1f} GiB ({machine.free / GIB:.1f} free beside CUDA's own "
        f"{CONTEXT_BYTES / GIB:g}, of which {1 - usable / machine.free:.0%} are kept in hand)"
    )
    if found.fits:
        result(f"It fits {_card(machine)}: {room}.")
        return {}
    warn(f"It does not fit {_card(machine)}: {room}.")
    remedy_table(found.remedies)
    if found.remedy is None or found.remedy.memory is None:
        result("None of these, and not all together, make it fit: take larger GPUs, or more of them.")
        return {}
    result(f"It fits with {in_toml(found.remedy.settings)}: {found.remedy.memory / GIB:.1f} GiB.")
    return dict(found.remedy.settings)


def _show_layouts(found: Forecast) -> dict[str, Any]:
    """Compare layouts; return the settings of the best one, where they are not the config's."""
    machine, chosen = found.machine, best(found.layouts)
    links = machine.local.name + (f" within a node, {machine.network.name} between nodes" if machine.nodes > 1 else "")
    result(
        f"{machine.gpus} GPUs like the {machine.gpu.name} on {machine.nodes} node(s), {links}; speeds are assumptions."
    )
    layout_table(found.layouts, chosen)
    if found.uneven:
        result(
            f"Not with this batch: {', '.join(map(str, found.uneven))} stages, whose replicas do not share it evenly."
        )
    if chosen is None:
        warn("None of these layouts fits.")
        return {}
    result(f"Best of these: {in_toml(layout_settings(chosen))}, {chosen.tokens_per_second:,.0f} tokens/s.")
    return {} if chosen is found.layouts[0] else layout_settings(chosen)


def layout_settings(verdict: Verdict) -> dict[str, Any]:
    """The keys of a config that a layout is made of."""
    candidate = verdict.candidate
    return {
        "pipeline_stages": candidate.stages,
        "gradient_accumulation_steps": candidate.run.accumulation,
        "use_column_major_topology": candidate.column_major,
    }


def as_json(found: Forecast) -> dict[str, Any]:
    """Everything that :func:`show_forecast` prints, sizes in bytes."""
    machine, sizes, steps, counts = found.machine, found.outlook.sizes, found.steps, found.counts
    chosen = best(found.layouts)
    return {
        "model_type": found.outlook.model.config.model_type,
        "mode": found.outlook.mode.name,
        "gpus": machine.gpus,
        "nodes": machine.nodes,
        "stages": len(found.stages),
        "replicas": found.replicas,
        "bounds": found.bounds,
        "trained_parameters": sum(sizes.trainable),
        "activation_checkpointing": found.outlook.config.activation_checkpointing,
        "kept": found.recompute.keep if found.recompute.every else "none",
        "kept_every": found.recompute.every,
        "compiled": sizes.compiled,
        "sequences_per_step": found.sequences_per_step,
        "tokens_per_step": found.sequences_per_step * found.outlook.config.sequence_len,
        "sequences": counts.sequences if isinstance(counts, KnownCounts) else None,
        "eval_sequences": counts.eval_sequences if isinstance(counts, KnownCounts) else None,
        "eval_fraction": found.outlook.config.eval_fraction,
        "steps_per_epoch": steps.steps_per_epoch if steps else None,
        "steps": steps.total_steps if steps else None,
        "memory": [{**memory.parts(), "peak": memory.total} for memory in found.stages],
        "peak_by_kept": found.levels,
        "gpu_memory": None if machine.gib is None else machine.gib * GIB,
        "usable": found.usable,
        "fits": found.fits,
        "remedies": [_remedy(remedy) for remedy in found.remedies],
        "fits_with": _remedy(found.remedy) if found.remedy else None,
        "layouts": [_verdict(verdict) for verdict in found.layouts],
        "best_layout": _verdict(chosen) if chosen else None,
    }


def _remedy(remedy: Any) -> dict[str, Any]:
    return {"settings": dict(remedy.settings), "peak": remedy.memory, "fits": remedy.fits, "remark": remedy.remark}


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return {
        **layout_settings(verdict),
        "replicas": verdict.candidate.replicas,
        "kept": verdict.candidate.keep,
        "peak": verdict.memory,
        "fits": verdict.fits,
        "bubble": verdict.bubble,
        "bytes_between_stages": verdict.stage_bytes,
        "bytes_between_replicas": verdict.replica_bytes,
        "seconds_per_step": verdict.seconds,
        "seconds_adding_gradients": verdict.reduction_seconds,
        "tokens_per_second": verdict.tokens_per_second,
    }
