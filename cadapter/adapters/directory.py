"""Control-adapter directories on disk: ``adapter_config.json``, ``adapter_model.safetensors`` and a model card.

The config is PEFT-shaped. Factors are stored as trained, in float32, under
``base_model.model.model.layers.N.control_A.weight`` [r, H] and ``….control_B.weight`` [H, r], or in the symmetric form
``….control_Q.weight`` [H, r] and ``….control_S.weight`` [r]. Directories of the published tool (qlora-pipe-lite), whose
``peft_type`` is "LORA", are recognised by their ``control_A`` or ``control_Q`` keys.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cadapter.adapters.control import SITES
from cadapter.adapters.factors import FORMS, Factors, Symmetric, named
from cadapter.adapters.layer_facts import LayerFacts
from cadapter.adapters.layer_facts import describe_layers as describe_layers  # found here too
from cadapter.algebra import orthogonality_error
from cadapter.errors import UsageError
from cadapter.files import read_json, refuse_links_out, write_json, write_text

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
CONTROL_TYPE = "CONTROL_ADAPTER"
MULTIPLICATIVE_TYPE = "MULTIPLICATIVE_LORA"
INVERSES = ("exact", "neumann")

LEAST_ORTHONORMAL = 1e-3
"""‖QᵀQ − I‖₂ above which a symmetric adapter is refused: its powers by t·S are none of ``I + W``."""

_CONTROL_KEY = re.compile(r"(?:.*\.)?layers\.([0-9]{1,9})\.control_([ABQS])(?:\.weight)?")
_SHAPES = {"A": ("r", "hidden size"), "B": ("hidden size", "r"), "Q": ("hidden size", "r"), "S": ("r",)}

_REMEDY = "Give the directory of an adapter, such as RUN/final."

Kind = Literal["control", "multiplicative", "additive"]


@dataclass
class ControlAdapterFiles:
    """A control adapter as its directory holds it.

    Attributes:
        path: the directory (for messages).
        rank, alpha: r, and alpha such that ``scale = alpha / r``; the symmetric form has alpha = r, no scale.
        layers: factors by layer number, all of one form.
        site, inverse, neumann_order: how it was trained.
        base_model_type, base_model_name_or_path: the base, where recorded.
        facts: facts of the base's layers by layer number; empty where not recorded.
        config: the whole ``adapter_config.json``; keys that this class does not know survive a rewrite.
    """

    path: Path
    rank: int
    alpha: float
    layers: Mapping[int, Factors]
    site: str = "block"
    inverse: str = "exact"
    neumann_order: int = 2
    base_model_type: str | None = None
    base_model_name_or_path: str | None = None
    facts: dict[int, LayerFacts] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def scale(self) -> float:
        """s = alpha / r."""
        return self.alpha / self.rank

    @property
    def form(self) -> str:
        """ "general" or "symmetric"."""
        return next(iter(self.layers.values())).form

    @property
    def hidden_size(self) -> int:
        """H."""
        return next(iter(self.layers.values())).A.shape[1]


# ---- reading ----------------------------------------------------------------------------------------------------


def read_adapter_config(path: Path) -> dict[str, Any]:
    """Read ``adapter_config.json`` of an adapter directory of any kind.

    Raises:
        UsageError: there is none, or it is no JSON object.
    """
    if not path.is_dir():
        raise UsageError(f"{path} is not a directory.\nGive the directory of an adapter.")
    file = path / CONFIG_NAME
    if not file.is_file():
        is_model = (path / "config.json").is_file()
        hint = (
            "\nThis is a model, complete as it is, as full fine-tuning writes them: give it where a model is wanted, "
            f"such as cadapter generate {shlex.quote(str(path))}. A command that takes both wants BASE first, then "
            "ADAPTER."
        )
        hint = hint if is_model else ""
        raise UsageError(f"{path} is not an adapter directory: it has no {CONFIG_NAME}.\n{_REMEDY}{hint}")
    refuse_links_out(path, (CONFIG_NAME, WEIGHTS_NAME))
    config = read_json(file)
    if not isinstance(config, dict):
        raise UsageError(f"{file} must hold a JSON object, not a {type(config).__name__}.")
    return config


def _weights_file(path: Path) -> Path:
    file = path / WEIGHTS_NAME
    if file.is_file():
        return file
    if (path / "adapter_model.bin").exists():
        raise UsageError(
            f"{path} holds pickled weights (adapter_model.bin), and unpickling a file can run any code.\n"
            f"Convert them to {WEIGHTS_NAME} with the program that wrote them."
        )
    raise UsageError(f"{path} is not an adapter directory: it has no {WEIGHTS_NAME}.\n{_REMEDY}")


def adapter_keys(path: Path) -> list[str]:
    """Names of the tensors in an adapter directory.

    Raises:
        UsageError: its weights are missing, pickled or damaged.
    """
    file = _weights_file(path)
    try:
        with safe_open(file, framework="pt") as weights:
            return list(weights.keys())
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{file} is damaged: {error}.\nCopy or download it again.") from error


def read_adapter_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of an adapter directory and make sure that they are finite floating-point numbers.

    Raises:
        UsageError: the weights are missing, pickled, damaged or empty, or a tensor holds anything else.
    """
    file, tensors = _weights_file(path), {}
    try:
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (a safetensors handle is no dict)
                tensors[name] = weights.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{file} is damaged: {error}.\nCopy or download it again.") from error
    if not tensors:
        raise UsageError(f"{file} holds no tensors.")
    for name, tensor in tensors.items():
        if not tensor.dtype.is_floating_point or tensor.element_size() < 2:
            raise UsageError(f"{file}: {name} holds {tensor.dtype}, not float32, float16 or bfloat16 numbers.")
        if tensor.numel() == 0:
            raise UsageError(f"{file}: {name} has shape {list(tensor.shape)}: it holds no numbers.")
        if not torch.isfinite(tensor.float()).all():
            raise UsageError(f"{file}: {name} holds NaN or infinite values: it is broken.\nUse an earlier checkpoint.")
    return tensors


def kind_of(path: Path) -> Kind:
    """Tell which kind of adapter a directory holds, by its keys first and its ``peft_type`` second.

    Raises:
        UsageError: it holds none that cadapter knows.
    """
    config = read_adapter_config(path)
    if any(_CONTROL_KEY.fullmatch(key) for key in adapter_keys(path)):
        return "control"
    peft_type = config.get("peft_type")
    if peft_type == MULTIPLICATIVE_TYPE:
        return "multiplicative"
    if peft_type == "LORA":
        return "additive"
    if peft_type == CONTROL_TYPE:
        raise UsageError(
            f"{path / WEIGHTS_NAME} has no control_A and control_B tensors (nor control_Q and control_S) although "
            f"{CONFIG_NAME} says that it is a control adapter."
        )
    raise UsageError(
        f"{path / CONFIG_NAME}: peft_type is {peft_type!r}.\n"
        f"cadapter reads {CONTROL_TYPE} and {MULTIPLICATIVE_TYPE} directories and LORA ones."
    )


def positive_number(config: Mapping[str, Any], key: str, file: Path) -> float:
    """Return ``config[key]`` as a positive finite number.

    Raises:
        UsageError: it is missing or something else.
    """
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise UsageError(f"{file}: {key} must be a positive number, not {value!r}.")
    return float(value)


def flag(config: Mapping[str, Any], key: str, file: Path) -> bool:
    """Return ``config[key]`` as a truth value; what is not there is false.

    Raises:
        UsageError: it is something else.
    """
    value = config.get(key)
    if not isinstance(value, bool | None):
        raise UsageError(f"{file}: {key} must be true or false, not {value!r}.")
    return bool(value)


def name_or_none(config: Mapping[str, Any], key: str, file: Path) -> str | None:
    """Return ``config[key]``, a string, or None where it is not there.

    Raises:
        UsageError: it is something else.
    """
    value = config.get(key)
    if not isinstance(value, str | None):
        raise UsageError(f"{file}: {key} must be a string, not {value!r}.")
    return value


def _one_of(config: Mapping[str, Any], key: str, allowed: tuple[str, ...], file: Path) -> str:
    value = config.get(key, allowed[0])
    if value not in allowed:
        raise UsageError(f"{file}: {key} is {value!r}; it must be one of {', '.join(allowed)}.")
    return str(value)


def _read_factors(path: Path, form: str, rank: int) -> dict[int, Factors]:
    """Group the tensors by layer and check that every layer has both factors, of one rank and one hidden size."""
    file, wanted = path / WEIGHTS_NAME, [each.name for each in fields(FORMS[form])]
    found: dict[int, dict[str, Tensor]] = {}
    sizes: dict[str, int] = {}
    for name, tensor in read_adapter_tensors(path).items():
        match = _CONTROL_KEY.fullmatch(name)
        if match is None or match[2] not in wanted:
            has = " and ".join(f"control_{factor}" for factor in wanted)
            raise UsageError(f"{file}: unexpected tensor {name}; this control adapter has {has} only.")
        layer, factor = int(match[1]), match[2]
        if factor in found.setdefault(layer, {}):
            raise UsageError(f"{file}: {name} names layer {layer} a second time.")
        _check_shape(tensor, name, factor, rank, sizes, file)
        found[layer][factor] = tensor
    layers: dict[int, Factors] = {}
    for layer in sorted(found):
        missing = [factor for factor in wanted if factor not in found[layer]]
        if missing:
            raise UsageError(f"{file}: layer {layer} has no control_{missing[0]}; its other factor is there.")
        layers[layer] = FORMS[form](*(found[layer][factor] for factor in wanted))
    return layers


def _check_shape(tensor: Tensor, name: str, factor: str, rank: int, sizes: dict[str, int], file: Path) -> None:
    """Make sure that a factor has the shape of its kind; ``sizes`` holds the hidden size once one is known."""
    known = {"r": rank, **sizes}
    shape, expected = list(tensor.shape), [known.get(size, size) for size in _SHAPES[factor]]
    if len(shape) != len(expected) or any(e != s for e, s in zip(expected, shape, strict=True) if isinstance(e, int)):
        text = ", ".join(map(str, expected))
        raise UsageError(
            f"{file}: {name} has shape {shape}; with r = {rank} it must be [{text}]"
            + (", as in the tensors before it." if sizes else ".")
        )
    sizes.update((size, n) for size, n in zip(_SHAPES[factor], shape, strict=True) if size != "r")


def _form_of(path: Path, config: Mapping[str, Any]) -> str:
    """The form that the tensors' names tell, which the config must not contradict."""
    named_factors = {match[2] for key in adapter_keys(path) if (match := _CONTROL_KEY.fullmatch(key))}
    form = "symmetric" if named_factors & {"Q", "S"} else "general"
    said = _one_of({"control_form": form, **config}, "control_form", tuple(FORMS), path / CONFIG_NAME)
    if said != form:
        raise UsageError(f"{path / CONFIG_NAME}: control_form is {said!r}, but {WEIGHTS_NAME} holds the {form} form.")
    return form


def _inverse_of(config: Mapping[str, Any], form: str, file: Path) -> str:
    """How class −1 was trained.

    The published tool records nothing: its general form is trained with the Neumann series of order 2, and its
    symmetric form has an exact inverse.
    """
    published = config.get("peft_type") != CONTROL_TYPE
    default = "neumann" if published and form == "general" else "exact"
    return _one_of({"control_inverse": default, **config}, "control_inverse", INVERSES, file)


def _check_orthonormal(layers: Mapping[int, Factors], file: Path) -> None:
    """Make sure that the columns of Q are orthonormal, on which every power of a symmetric adapter rests."""
    for layer, factors in layers.items():
        if isinstance(factors, Symmetric) and (error := orthogonality_error(factors.Q)) > LEAST_ORTHONORMAL:
            raise UsageError(
                f"{file}: the columns of control_Q of layer {layer} are not orthonormal (‖QᵀQ − I‖₂ = {error:.2g}): "
                "this is no symmetric control adapter, or it is damaged."
            )


def check_layer_list(config: Mapping[str, Any], layers: Collection[int], file: Path, more: bool = False) -> None:
    """Make sure that an adapter has tensors of the layers that its config lists, and, unless ``more``, of no other.

    Raises:
        UsageError: it has not, or the list is none.
    """
    listed = config.get("layers_to_transform")
    if listed is None:
        return
    listed = [listed] if isinstance(listed, int) else listed
    if not isinstance(listed, list) or not all(type(layer) is int for layer in listed):
        raise UsageError(f"{file}: layers_to_transform must be a list of layer numbers.")
    if len(set(listed)) != len(listed):
        twice = next(layer for layer in listed if listed.count(layer) > 1)
        raise UsageError(f"{file}: layers_to_transform names layer {twice} twice.")
    wrong = set(listed) - set(layers) if more else set(listed) ^ set(layers)
    if wrong:
        raise UsageError(
            f"{file}: layers_to_transform says {sorted(listed)}, but {WEIGHTS_NAME} holds layers {sorted(layers)}."
        )


def _read_facts(config: Mapping[str, Any], layers: Iterable[int], file: Path) -> dict[int, LayerFacts]:
    recorded = config.get("layers")
    if recorded is None:
        return {}
    facts = {}
    for layer in layers:
        try:
            facts[layer] = LayerFacts.from_json(recorded[str(layer)])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(f'{file}: the entry of layer {layer} under "layers" is not right ({error!r}).') from error
    return facts


def read_control_adapter(path: Path) -> ControlAdapterFiles:
    """Read and validate a control-adapter directory, ours or of the published tool.

    ``use_rslora`` of a published config is folded into ``alpha``, so that ``scale = alpha / r`` always holds.

    Raises:
        UsageError: anything is not right, with file and tensor or key named.
    """
    path = Path(path)
    config = read_adapter_config(path)
    if kind_of(path) != "control":
        raise UsageError(
            f"{path} is not a control adapter: {WEIGHTS_NAME} has no control_A and control_B tensors, nor control_Q "
            "and control_S.\nGive a control adapter; LoRAs are for cadapter merge, and for peft."
        )
    file, form = path / CONFIG_NAME, _form_of(path, config)
    rank = positive_number(config, "r", file)
    if not rank.is_integer():
        raise UsageError(f"{file}: r must be a whole number, not {rank}.")
    alpha = rank if form == "symmetric" else positive_number(config, "lora_alpha", file)
    order = config.get("control_neumann_order", 2)
    if isinstance(order, bool) or not isinstance(order, int) or order < 1:
        raise UsageError(f"{file}: control_neumann_order must be a whole number of at least 1, not {order!r}.")
    layers = _read_factors(path, form, int(rank))
    check_layer_list(config, layers, file)
    _check_orthonormal(layers, path / WEIGHTS_NAME)
    return ControlAdapterFiles(
        path=path,
        rank=int(rank),
        alpha=alpha * math.sqrt(rank) if flag(config, "use_rslora", file) and form == "general" else alpha,
        layers=layers,
        site=_one_of(config, "control_site", SITES, file),
        inverse=_inverse_of(config, form, file),
        neumann_order=order,
        base_model_type=name_or_none(config, "base_model_type", file),
        base_model_name_or_path=name_or_none(config, "base_model_name_or_path", file),
        facts=_read_facts(config, layers, file),
        config=config,
    )


def validate_against(adapter: ControlAdapterFiles, hidden_size: int, layers: int) -> None:
    """Make sure that ``adapter`` fits a model of this hidden size and number of layers.

    Raises:
        UsageError: it does not.
    """
    if adapter.hidden_size != hidden_size:
        raise UsageError(
            f"{adapter.path} is an adapter of another hidden size: {adapter.hidden_size}, where the model has "
            f"{hidden_size}.\nUse it with the model it was trained on" + _trained_on(adapter)
        )
    outside = [layer for layer in adapter.layers if layer >= layers]
    if outside:
        raise UsageError(
            f"{adapter.path} has factors for layer {outside[0]}, but the model has {layers} layers (0 to {layers - 1})."
            "\nUse it with the model it was trained on" + _trained_on(adapter)
        )


def _trained_on(adapter: ControlAdapterFiles) -> str:
    return f" ({adapter.base_model_name_or_path})." if adapter.base_model_name_or_path else "."


# ---- writing ----------------------------------------------------------------------------------------------------


def control_config(adapter: ControlAdapterFiles) -> dict[str, Any]:
    """``adapter_config.json`` of ``adapter``: what its fields say, and what else its ``config`` holds."""
    config = {key: value for key, value in adapter.config.items() if key not in ("use_rslora", "layers")}
    config.update(
        peft_type=CONTROL_TYPE,
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        layers_to_transform=sorted(adapter.layers),
        base_model_name_or_path=adapter.base_model_name_or_path,
        base_model_type=adapter.base_model_type,
        control_form=adapter.form,
        control_site=adapter.site,
        control_inverse=adapter.inverse,
        control_neumann_order=adapter.neumann_order,
        hidden_size=adapter.hidden_size,
    )
    if adapter.facts:
        config["layers"] = {str(layer): facts.to_json() for layer, facts in sorted(adapter.facts.items())}
    return config


def write_control_adapter(
    directory: Path, adapter: ControlAdapterFiles, card: str, extra_files: Mapping[str, str] | None = None
) -> None:
    """Write ``adapter`` into ``directory``, which exists (see :func:`cadapter.files.new_directory`).

    Factors are written in float32; ``card`` becomes README.md, ``extra_files`` further text files by name.
    """
    tensors = {}
    for layer, factors in adapter.layers.items():
        for name, tensor in named(factors).items():
            stored = tensor.detach().to("cpu", torch.float32).contiguous()
            tensors[f"base_model.model.model.layers.{layer}.{name}.weight"] = stored
    save_file(tensors, directory / WEIGHTS_NAME, metadata={"format": "pt"})
    write_json(directory / CONFIG_NAME, control_config(adapter))
    for name, text in {**(extra_files or {}), "README.md": card}.items():
        write_text(directory / name, text)


def layer_ranges(layers: Iterable[int]) -> str:
    """Spell layer numbers as ranges: [0, 1, 2, 5] → "0:2,5"."""
    ranges: list[list[int]] = []
    for layer in sorted(layers):
        if ranges and layer == ranges[-1][1] + 1:
            ranges[-1][1] = layer
        else:
            ranges.append([layer, layer])
    return ",".join(f"{first}:{last}" if last > first else f"{first}" for first, last in ranges)


def control_card(adapter: ControlAdapterFiles) -> str:
    """The model card of a control adapter, in Markdown."""
    base = adapter.base_model_name_or_path or "(not recorded)"
    inverse = "exact" if adapter.inverse == "exact" else f"Neumann series of order {adapter.neumann_order}"
    operator = "`W = s·B·A`" if adapter.form == "general" else "`W = Q·diag(exp(S) − 1)·Qᵀ`"
    return f"""---
library_name: cadapter
tags:
- control-adapter
---

# Control Adapter

A Control Adapter changes what each decoder block adds to the residual stream: with {operator} of low rank, strength
+1 applies `I + W`, strength −1 its inverse, and every strength t between and beyond `(I + W)^t`.

| | |
|---|---|
| base model | `{base}` ({adapter.base_model_type or "type not recorded"}) |
| rank, alpha, scale | {adapter.rank}, {adapter.alpha:g}, {adapter.scale:g} |
| layers | {layer_ranges(adapter.layers)} ({len(adapter.layers)}) |
| form, site | {adapter.form}, `{adapter.site}` |
| inverse in training | {inverse} |

## Use

This is not a LoRA and `peft` does not load it; `cadapter` applies it natively, or converts and merges it:

```sh
cadapter inspect-norms ADAPTER
cadapter generate BASE "Once upon a time" --adapter ADAPTER --compare
cadapter to-add-lora BASE ADAPTER OUTPUT --strength 0.5
cadapter merge BASE ADAPTER OUTPUT --strength -1
```
"""
