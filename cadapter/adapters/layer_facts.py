"""What a conversion must know of the decoder layers of an adapter's base, found once and recorded with the adapter."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cadapter.models.checkpoint import Checkpoint
from cadapter.models.families import MODULES, Family
from cadapter.models.shell import WRITER_NAMES
from cadapter.models.writers import proven_modules

_LAYER_TENSOR = re.compile(r"model\.layers\.([0-9]{1,9})\.(.+)")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")

MOST_EXPERTS = 1 << 16
"""Of a layer; a config that says more is wrong."""


@dataclass(frozen=True)
class LayerFacts:
    """Facts of one decoder layer; names are those on disk, within the layer and without ``.weight``.

    Attributes:
        attention, mlp: the residual writers of the two modules, every expert's among them.
        post_norms: a norm stands between a writer and the addition to the residual stream.
        biased: the writers that have a non-zero bias.
        experts: how many experts the layer has.
        unknown: what is named like a residual writer and is none that conversions know how to change, such as experts
            that are stored the other way round; ``*`` stands for a number.
    """

    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    post_norms: bool = False
    biased: tuple[str, ...] = ()
    experts: int = 0
    unknown: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As it stands in the config under "layers": ``*`` stands for the number of each expert in turn."""
        entry: dict[str, Any] = {
            "attention": _folded(self.attention, self.experts),
            "mlp": _folded(self.mlp, self.experts),
            "post_norms": self.post_norms,
            "biased": _folded(self.biased, self.experts),
        }
        if self.experts:
            entry["experts"] = self.experts
        if self.unknown:
            entry["unknown"] = list(self.unknown)
        return entry

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> LayerFacts:
        """The facts that :meth:`to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: something is missing or of another kind.
        """
        experts = entry.get("experts", 0)
        if type(experts) is not int or not 0 <= experts <= MOST_EXPERTS:
            raise ValueError(f"{experts!r} is no number of experts")
        attention, mlp, biased = (_unfolded(entry[key], experts) for key in ("attention", "mlp", "biased"))
        return cls(attention, mlp, bool(entry["post_norms"]), biased, experts, _listed(entry.get("unknown", [])))


def _pattern(name: str) -> str:
    pattern, numbers = _NUMBER.subn("*", name)
    return pattern if numbers == 1 else name


def patterns(names: Iterable[str]) -> list[str]:
    """The ``names``; those that differ in the number of an expert alone are one, with ``*`` for the number."""
    return list(dict.fromkeys(_pattern(name) for name in names))


def _folded(names: Sequence[str], experts: int) -> list[str]:
    """The ``names``, with one pattern for what all ``experts`` have."""
    having = Counter(_pattern(name) for name in names)
    return list(dict.fromkeys(_pattern(name) if having[_pattern(name)] == experts else name for name in names))


def _listed(names: Any) -> tuple[str, ...]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{names!r} is no list of names")
    return tuple(names)


def _unfolded(names: Any, experts: int) -> tuple[str, ...]:
    names = _listed(names)
    if experts < 1 and any("*" in name for name in names):
        raise ValueError("it names experts and not how many they are")
    unfolded: list[str] = []
    for name in names:
        unfolded += [name.replace("*", str(number)) for number in range(experts)] if "*" in name else [name]
    return tuple(unfolded)


def describe_layers(checkpoint: Checkpoint, family: Family, layers: Iterable[int]) -> dict[int, LayerFacts]:
    """Facts of ``layers`` of a base model by layer number; reads the writers' biases and no more.

    The writers of a family that is in no table are tried on its blocks first.
    """
    layers = list(layers)
    modules: dict[int, set[str]] = {}
    for name in checkpoint.names():
        match = _LAYER_TENSOR.fullmatch(name)
        if match:
            module = match[2].removesuffix(".weight").removesuffix(".bias")
            modules.setdefault(int(match[1]), set()).add(module)
    proven = proven_modules(checkpoint.config, family, layers) if family.inferred else {}
    return {
        layer: _describe(
            checkpoint,
            family,
            f"model.layers.{layer}",
            sorted(modules.get(layer, ()), key=_by_number),
            proven.get(layer, frozenset(MODULES)),
        )
        for layer in layers
    }


def _by_number(name: str) -> list[tuple[bool, int | str]]:
    """A sorting key that puts expert 10 behind expert 9."""
    return [(part.isdigit(), int(part) if part.isdigit() else part) for part in name.split(".")]


def _describe(
    checkpoint: Checkpoint, family: Family, prefix: str, modules: Sequence[str], proven: Collection[str]
) -> LayerFacts:
    found = zip(MODULES, family.writers_among(modules), strict=True)
    attention, mlp = (names if module in proven else () for module, names in found)
    writers = (*attention, *mlp)
    biases = {writer: f"{prefix}.{writer}.bias" for writer in writers}
    biased = (writer for writer, name in biases.items() if name in checkpoint and bool(checkpoint.tensor(name).any()))
    return LayerFacts(
        attention=attention,
        mlp=mlp,
        post_norms=family.post_norms,
        biased=tuple(biased),
        experts=_experts(checkpoint, prefix, writers),
        unknown=tuple(patterns(name for name in modules if name not in writers and _is_named_like_a_writer(name))),
    )


def _experts(checkpoint: Checkpoint, prefix: str, writers: Iterable[str]) -> int:
    """How many experts these writers belong to, one by one or as one tensor [experts, out, in]."""
    count = 0
    for writer in writers:
        name = f"{prefix}.{writer}"
        if name in checkpoint and len(checkpoint.shape(name)) == 3:
            count = max(count, checkpoint.shape(name)[0])
        for number in _NUMBER.findall(writer):
            count = max(count, int(number) + 1)
    return count


def _is_named_like_a_writer(module: str) -> bool:
    """Whether a tensor may belong to a residual writer; biases of fused experts are ``down_proj_bias``."""
    return module.rpartition(".")[2].removesuffix("_bias") in WRITER_NAMES
