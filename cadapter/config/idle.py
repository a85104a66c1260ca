"""Keys that a config gives and that do nothing in it: allowed, and hardly meant."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from cadapter.classes import NEGATIVE, NEUTRAL
from cadapter.config.rules import Problem
from cadapter.config.schema import Config

_CONTROL = (
    "control_class0_lambda", "control_inverse", "control_neumann_order", "control_form", "control_gamma",
    "control_site", "class_weights",
)  # fmt: skip
_ADAPTERS = ("lora_rank", "lora_alpha", "lora_weight_dtype")
_EVALUATIONS = ("evals_per_run", "eval_gradient_accumulation_steps", "early_stopping_patience", "sample_prompts")
_STAGES = ("partition_method", "use_column_major_topology")
_SAMPLES = ("sample_max_new_tokens", "sample_temperature", "sample_chat")

_RULES: tuple[tuple[tuple[str, ...], Callable[[Config], bool], str], ...] = (
    (
        _CONTROL,
        lambda config: not config.use_control_adapters,
        "has no effect without Control Adapters; remove it, or set use_control_adapters = true",
    ),
    (
        ("class_weights.negative",),
        lambda config: not _may_hold(config, NEGATIVE),
        "has no effect without texts of class -1; remove it, or give a dataset with control_class = -1",
    ),
    (
        _STAGES,
        lambda config: config.pipeline_stages == 1,
        "has no effect on a single stage; remove it, or set pipeline_stages above 1",
    ),
    (
        _ADAPTERS,
        lambda config: config.full_fine_tune,
        "has no effect on full fine-tuning, which has no adapters; remove it",
    ),
    (
        ("control_gamma",),
        lambda config: config.control_form == "general",
        'has no effect in the general form; remove it, or set control_form = "symmetric"',
    ),
    (
        ("control_neumann_order",),
        lambda config: config.control_inverse == "exact",
        'has no effect on the exact inverse; remove it, or set control_inverse = "neumann"',
    ),
    (
        ("control_class0_lambda",),
        lambda config: config.control_class0_lambda > 0 and not _may_hold(config, NEUTRAL),
        "has no effect without texts of class 0; remove it, or give a dataset with control_class = 0",
    ),
    (
        _EVALUATIONS,
        lambda config: config.eval_fraction == 0,
        "has no effect without evaluations (eval_fraction = 0); remove it, or set eval_fraction above 0",
    ),
    (
        _SAMPLES,
        lambda config: not config.sample_prompts,
        "has no effect without sample_prompts; remove it, or give prompts",
    ),
    (
        ("early_stopping_patience",),
        lambda config: config.evals_per_run <= 2,
        "has no effect without an evaluation between the first step and the last; remove it, or raise evals_per_run",
    ),
)
"""Keys, when they do nothing, and what is said of them. Of a key that several rules name, the first counts; of a key
within an idle table nothing more is said."""


def idle_keys(config: Config) -> list[Problem]:
    """The keys given in ``config`` that have no effect, as far as the config alone says."""
    found: dict[tuple[str, ...], Problem] = {}
    for keys, is_idle, text in _RULES:
        for key in keys:
            path = tuple(key.split("."))
            is_told = path in found or path[:1] in found
            if not is_told and _is_given(config, path) and is_idle(config):
                found[path] = Problem(path, text)
    return list(found.values())


def _is_given(config: Any, path: tuple[str, ...]) -> bool:
    """Whether a config, or a table of one, names the key at ``path``."""
    name, *rest = path
    return name in config.model_fields_set and (not rest or _is_given(getattr(config, name), tuple(rest)))


def idle_in_run(
    config: Config,
    steps: int,
    layers: int,
    neutral_tokens: int,
    hidden_size: int | None = None,
    sequences: int | None = None,
    sequences_per_step: int = 1,
) -> list[Problem]:
    """The keys of ``config`` that do not do what they say in a run of so many steps on a model of so many layers.

    ``hidden_size``: of the model; ``sequences``: packed ones to train on; None: not known.
    """
    found = list(_idle_in_run(config, steps, layers, neutral_tokens))
    if hidden_size is not None and not config.full_fine_tune and config.lora_rank > hidden_size:
        text = f"the model's hidden size is {hidden_size:,}, beyond which a rank adds nothing; give a smaller one"
        found.append(Problem(("lora_rank",), text))
    if sequences is not None and sequences_per_step > sequences:
        key = "gradient_accumulation_steps" if config.gradient_accumulation_steps > 1 else "micro_batch_size"
        alone = getattr(config, key) == 1
        remedy = "use fewer processes, or more pipeline_stages" if alone else "lower it"
        text = f"a step is to take {sequences_per_step:,} sequences, and there are {sequences:,} in all; {remedy}"
        found.append(Problem((key,), text))
    return found


def _idle_in_run(config: Config, steps: int, layers: int, neutral_tokens: int) -> Iterable[Problem]:
    if config.warmup_steps > steps:
        text = f"the run has {steps:,} steps only, so that lr never reaches its value; lower warmup_steps"
        yield Problem(("warmup_steps",), text)
    every: Any = config.activation_checkpointing
    if isinstance(every, int) and every > layers:
        alone = f"the model has {layers} layers only, of which the first alone is computed again"
        text = f'{alone}; give at most {layers}, or "none"'
        yield Problem(("activation_checkpointing",), text)
    if config.control_class0_lambda > 0 and _may_hold(config, NEUTRAL) and not neutral_tokens:
        text = "has no effect, since no text has class 0; remove it, or check what class_field says"
        yield Problem(("control_class0_lambda",), text)


def _may_hold(config: Config, control_class: int) -> bool:
    """Whether a dataset is of this class, or its records say theirs themselves; pairs have the classes 1 and -1."""
    return any(
        dataset.control_class == control_class
        or dataset.class_field
        or (dataset.chosen_field and control_class != NEUTRAL)
        for dataset in config.datasets
    )
