"""What no single key can know: combinations that cannot work, and those that work but are hardly meant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cadapter.classes import NEUTRAL, POSITIVE
from cadapter.config.lines import KeyPath
from cadapter.config.toml import toml_key, toml_text
from cadapter.errors import UsageError


@dataclass(frozen=True)
class Problem:
    """Something wrong at ``path``; ``text`` says what is wrong and, after a semicolon, what to do."""

    path: KeyPath
    text: str
    shows_value: bool = True

    @property
    def key(self) -> str:
        """The path as it is written after --set: ``datasets.0.control_class``."""
        return toml_key(self.path)


class WrongKey(UsageError):
    """What only the model shows to be wrong with one key of the config; where the key stands, who knows it adds."""

    def __init__(self, problem: Problem, value: object) -> None:
        super().__init__(f"{problem.key} = {toml_text(value)}: {problem.text}.")
        self.problem = problem


@dataclass(frozen=True)
class _Conflict:
    key: str
    found: Callable[[Any], object]
    text: str


def _is_symmetric(config: Any) -> bool:
    """Whether the adapters are Control Adapters in the symmetric form; without them ``control_form`` says nothing."""
    return bool(config.use_control_adapters) and config.control_form == "symmetric"


_CONFLICTS = (
    _Conflict(
        "full_fine_tune",
        lambda config: config.full_fine_tune and config.use_control_adapters,
        "cannot go with use_control_adapters = true; choose one of the two",
    ),
    _Conflict(
        "lora_weight_decay",
        lambda config: config.full_fine_tune and config.lora_weight_decay,
        "full fine-tuning has no weight decay; remove the key",
    ),
    _Conflict(
        "lora_dropout",
        lambda config: config.full_fine_tune and config.lora_dropout,
        "full fine-tuning has no adapters; remove the key",
    ),
    _Conflict(
        "init_from",
        lambda config: config.full_fine_tune and config.init_from is not None,
        "full fine-tuning has no adapters; give the model to start from as model_dir",
    ),
    _Conflict(
        "load_in_4bit",
        lambda config: config.full_fine_tune and config.load_in_4bit,
        "weights in 4 bits cannot be trained themselves; remove it, or full_fine_tune",
    ),
    _Conflict(
        "lora_alpha",
        lambda config: _is_symmetric(config) and config.lora_alpha is not None,
        "the symmetric form has no scale; remove the key",
    ),
    _Conflict(
        "control_inverse",
        lambda config: _is_symmetric(config) and config.control_inverse == "neumann",
        "the symmetric form has an exact inverse and needs no series; remove the key",
    ),
    _Conflict(
        "lora_weight_dtype",
        lambda config: _is_symmetric(config) and config.lora_weight_dtype == "bfloat16",
        'bfloat16 cannot hold orthonormal directions, on which the inverse rests; use "float32"',
    ),
    _Conflict(
        "target_modules",
        lambda config: config.use_control_adapters and config.target_modules is not None,
        "Control Adapters act on whole layers; remove the key, or choose layers with layers_to_transform",
    ),
)


_DATASET_CONFLICTS = (
    _Conflict(
        "messages_field",
        lambda dataset: dataset.messages_field and dataset.text_field not in (None, "text"),
        "a record is read as a chat or as a text; remove this key or text_field",
    ),
    _Conflict(
        "chosen_field",
        lambda dataset: dataset.chosen_field and (dataset.messages_field or dataset.text_field not in (None, "text")),
        "chosen_field and rejected_field say where texts are; remove text_field and messages_field, or these two",
    ),
    _Conflict(
        "chosen_field",
        lambda dataset: dataset.chosen_field and not dataset.rejected_field,
        "goes with rejected_field; give both",
    ),
    _Conflict(
        "rejected_field",
        lambda dataset: dataset.rejected_field and not dataset.chosen_field,
        "goes with chosen_field; give both",
    ),
    _Conflict(
        "class_field",
        lambda dataset: dataset.class_field and dataset.chosen_field,
        "what is chosen has class 1 and what is rejected -1; remove the key",
    ),
    _Conflict(
        "control_class",
        lambda dataset: dataset.control_class not in (None, POSITIVE) and (dataset.class_field or dataset.chosen_field),
        "this dataset's records say their class themselves; remove the key",
    ),
)


def conflicts(config: Any) -> list[Problem]:
    """The impossible combinations in ``config``, an object with the config's keys as attributes.

    While a file is being checked, a key whose own value is wrong is None here: no rule takes None for a choice.
    """
    problems = [Problem((rule.key,), rule.text) for rule in _CONFLICTS if rule.found(config)]
    for index, dataset in enumerate(config.datasets):
        if config.use_control_adapters is False:
            problems += [Problem(("datasets", index, key), text) for key, text in _needs_classes(dataset)]
        problems += [
            Problem(("datasets", index, rule.key), rule.text) for rule in _DATASET_CONFLICTS if rule.found(dataset)
        ]
    return problems


def _needs_classes(dataset: Any) -> list[tuple[str, str]]:
    """The keys of a dataset that give tokens classes, which only Control Adapters know, and what to do."""
    known = "only Control Adapters know classes; set use_control_adapters = true"
    found = [(key, f"{known}, or remove the key") for key in ("class_field", "chosen_field") if getattr(dataset, key)]
    if dataset.control_class not in (None, POSITIVE):
        found.append(("control_class", f"{known}, or control_class = 1"))
    return found


def check_layout(pipeline_stages: int, processes: int) -> None:
    """Raise :class:`UsageError` if ``processes`` cannot be shared out over ``pipeline_stages`` evenly."""
    if processes % pipeline_stages:
        raise UsageError(
            f"pipeline_stages = {pipeline_stages} does not divide the {processes} processes of this run.\n"
            "Change pipeline_stages, or the number of processes (--num-gpus, --num-nodes)."
        )


def has_neutral_dataset(config: Any) -> bool:
    """Whether a dataset as a whole is of class 0."""
    return any(dataset.control_class == NEUTRAL for dataset in config.datasets)


def idle_neutral(config: Any) -> list[str]:
    """What to say of texts of class 0, if there are any; nothing where they have a loss."""
    if config.control_class0_lambda * config.class_weights.neutral:
        return []
    key = "class_weights.neutral" if config.control_class0_lambda else "control_class0_lambda"
    return [f"The texts of class 0 train nothing: set {key} above 0, or leave them out."]


def config_warnings(config: Any) -> list[str]:
    """What is allowed in ``config`` and hardly meant, one sentence each."""
    warnings = []
    if config.use_control_adapters and not config.lora_weight_decay:
        warnings.append(
            "Control Adapters are trained without weight decay, which the method needs: "
            "set lora_weight_decay (100 to 500 at rank 16 with lr = 2e-5)."
        )
    if config.lora_weight_decay and config.lora_weight_dtype == "bfloat16":
        warnings.append(
            "lora_weight_decay is off: bfloat16 weights would lose it in rounding. "
            'Set lora_weight_dtype = "float32" to have it.'
        )
    if config.gradient_dtype != "float32" and not config.full_fine_tune:
        warnings.append("gradient_dtype has an effect on full fine-tuning only.")
    if has_neutral_dataset(config):
        warnings += idle_neutral(config)
    if config.control_inverse == "neumann" and config.lora_weight_dtype == "bfloat16":
        warnings.append(
            'control_inverse = "neumann" with bfloat16 adapters adds rounding to the truncated series: '
            'use "exact", or lora_weight_dtype = "float32".'
        )
    return warnings
