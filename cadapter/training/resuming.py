"""What may differ between a checkpoint's settings and those of the run that goes on from it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from cadapter.config import Config
from cadapter.errors import UsageError

FREE = frozenset(
    {
        "model_dir", "output_dir", "cache_dir", "init_from", "epochs", "max_steps", "micro_batch_size",
        "gradient_accumulation_steps", "eval_gradient_accumulation_steps", "pipeline_stages", "partition_method",
        "use_column_major_topology", "activation_checkpointing", "attn_implementation", "compile", "evals_per_run",
        "checkpoint_interval_hours", "checkpoint_interval_steps", "max_checkpoints", "trust_remote_code",
        "early_stopping_patience", "sample_prompts", "sample_max_new_tokens", "sample_temperature", "sample_chat",
        "max_skipped_steps",
    }
)  # fmt: skip
"""Keys that change where a run happens, how long it is or how it is laid out, and not what a step does. What follows
from them and does matter (sequences a step, the model's shape) is compared by itself, and so are the texts, wherever
their files lie."""

EXCUSED_BY = {
    "seed": {"seed"},
    "sequence_len": {"sequence_len"},
    "sequences per step": {"micro_batch_size", "gradient_accumulation_steps"},
    "training data": {
        "datasets", "sequence_len", "seed", "eval_fraction", "max_sequences", "drop_tails", "mix_datasets",
        "mask_tokens", "sequence_prefix", "document_prefix", "document_suffix", "document_attention", "overlength",
        "model_dir",
    },
}  # fmt: skip
"""Facts of a run that may change where one of these keys is given with --set, which says that it is meant."""


def settings_of(config: Config) -> dict[str, Any]:
    """A config as a checkpoint records it."""
    return config.model_dump(mode="json")


def given_keys(overrides: Iterable[str]) -> set[str]:
    """The keys of the config that ``--set`` options name: "datasets.1.control_class=1" names datasets."""
    return {override.partition("=")[0].strip().partition(".")[0] for override in overrides}


def excused_facts(given: Collection[str]) -> set[str]:
    """The facts that may differ from the checkpoint's, since ``--set`` says so."""
    return {fact for fact, keys in EXCUSED_BY.items() if not keys.isdisjoint(given)}


def compare_settings(saved: Mapping[str, Any], now: Mapping[str, Any], given: Collection[str], where: str) -> list[str]:
    """Return what differs, a line for each key with both values.

    Args:
        saved, now: settings of the checkpoint and of this run.
        given: keys that ``--set`` names.
        where: the checkpoint, for the message.

    Raises:
        UsageError: a key that changes what a step does differs, and ``--set`` does not name it.
    """
    old, new = dict(flat_settings(saved)), dict(flat_settings(now))
    differing = [key for key in {**new, **old} if old.get(key) != new.get(key)]
    lines = {key: difference(key, old.get(key), new.get(key)) for key in differing}
    refused = [lines[key] for key in differing if not _may_change(key, given)]
    if refused:
        raise UsageError(
            f"{where} was written with other settings, and going on would not be the same run:\n"
            + "".join(f"  {line}\n" for line in refused)
            + "Set them back (what was given with --set has to be given again), or name each with --set to go on with "
            "the new value."
        )
    return list(lines.values())


def difference(name: str, saved: Any, now: Any) -> str:
    """``name`` with the checkpoint's value and this run's; what is None is not set."""
    before, after = ("not set" if value is None else repr(value) for value in (saved, now))
    return f"{name}: {before} in the checkpoint, {after} now"


def _may_change(key: str, given: Collection[str]) -> bool:
    first, _, rest = key.partition(".")
    return first in FREE or first in given or rest.endswith("dataset_path")


def flat_settings(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Keys as --set spells them, "datasets.1.control_class", with their values."""
    if isinstance(value, Mapping):
        parts = [(str(name), part) for name, part in value.items()]
    elif isinstance(value, list) and any(isinstance(part, Mapping) for part in value):
        parts = [(str(number), part) for number, part in enumerate(value)]
    else:
        yield key, value
        return
    for name, part in parts:
        yield from flat_settings(part, f"{key}.{name}" if key else name)
