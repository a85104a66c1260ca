"""A model's tensors under the names they have in memory, read out of a checkpoint under the names it has on disk.

The two differ where the library has renamed or fused what a model's files hold: experts, which stand in the files one
by one and in memory as one tensor [experts, out, in]. Which is which says transformers' own table of conversions.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

from cadapter.errors import UsageError
from cadapter.models.checkpoint import Checkpoint

COMPUTED = ("rotary_emb.inv_freq",)
"""Ends of names of tensors that old checkpoints hold and that models now compute."""

_EXPERT = re.compile(r"(.+\.)(\d+)(\..+)")
"""The name of one expert's tensor; its last number is the expert's."""


@dataclass(frozen=True)
class Part:
    """A part of a tensor in memory as it stands on disk.

    Attributes:
        name: on disk.
        expert: which expert's it is; None: the tensor is on disk as it is in memory.
        rows: which of its output rows these are.
    """

    name: str
    expert: int | None = None
    rows: slice = field(default_factory=lambda: slice(None))


class StoredWeights:
    """The tensors of ``checkpoint`` by the names that they have in ``skeleton``, a causal LM on the meta device.

    The functions of transformers behind this (5.17 to 5.23) are not promised to stay; beside this module only
    :mod:`cadapter.models.saving` uses some, for the way back.

    Attributes:
        unknown: names on disk that the model has no place for.
        missing: names of single experts that are not on disk, where others of their layer are.
    """

    def __init__(self, checkpoint: Checkpoint, skeleton: Any) -> None:
        self._checkpoint = checkpoint
        self._skeleton = skeleton
        self._places: dict[str, Tensor] = skeleton.state_dict()
        self._sources: dict[str, list[tuple[str, str | None]]] = {}
        self.unknown: list[str] = []
        self.missing: list[str] = []
        transforms: list[WeightTransform] = get_model_conversion_mapping(skeleton)
        self._renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        converters = [each for each in transforms if isinstance(each, WeightConverter)]
        self._converter = {pattern: each for each in converters for pattern in each.source_patterns}
        # Experts are stacked in the order in which they come: the tenth after the ninth.
        for name in sorted(checkpoint.names(), key=dot_natural_key):
            target, pattern = self._place_of(name, converters)
            if target is not None:
                self._sources.setdefault(target, []).append((name, pattern))
            elif not self._is_ignored(name):
                self.unknown.append(name)
        for target, sources in self._sources.items():
            self._count_experts(target, sources)

    def _place_of(self, name: str, converters: list[WeightConverter]) -> tuple[str | None, str | None]:
        prefix = self._skeleton.base_model_prefix
        for renamings, conversions in ((self._renamings, converters), ([], [])):
            target, pattern = rename_source_key(name, renamings, conversions, prefix, self._places)
            if target in self._places:
                return target, pattern
        return None, None

    def _count_experts(self, target: str, sources: list[tuple[str, str | None]]) -> None:
        """Note which of the tensors that are stacked to ``target`` are missing or too many."""
        kinds: dict[str, dict[int, str]] = {}
        for name, pattern in sources:
            match = _EXPERT.fullmatch(name)
            if match and pattern is not None and isinstance(self._converter[pattern].operations[0], MergeModulelist):
                kinds.setdefault(f"{match[1]}*{match[3]}", {})[int(match[2])] = name
        for kind, names in kinds.items():
            wanted = range(self._places[target].shape[0])
            self.missing += [kind.replace("*", str(number)) for number in wanted if number not in names]
            self.unknown += [name for number, name in names.items() if number not in wanted]

    def _is_ignored(self, name: str) -> bool:
        patterns = getattr(self._skeleton, "_keys_to_ignore_on_load_unexpected", None) or ()
        return name.endswith(COMPUTED) or any(re.search(pattern, name) for pattern in patterns)

    def __contains__(self, name: str) -> bool:
        return name in self._sources

    def memory_name(self, name: str) -> str:
        """In which tensor in memory the tensor ``name`` on disk ends up."""
        return next(target for target, sources in self._sources.items() if any(source == name for source, _ in sources))

    def parts(self, target: str) -> list[Part]:
        """Where the numbers of a tensor in memory stand on disk.

        Raises:
            UsageError: they are stored in a way that is not known.
        """
        sources = self._sources[target]
        if len(sources) == 1 and sources[0][1] is None:
            return [Part(sources[0][0])]
        converter = self._converter[sources[0][1] or ""]
        kinds = [type(operation) for operation in converter.operations]
        if kinds not in ([MergeModulelist], [MergeModulelist, Concatenate]):
            raise UsageError(f"{self._checkpoint.directory}: how {target} is stored is not known.")
        found, row = [], 0
        for pattern in converter.source_patterns:  # one below the other, in this order
            names = [name for name, matched in sources if matched == pattern]
            rows = self._checkpoint.shape(names[0])[0]
            for expert, name in enumerate(names):
                found.append(Part(name, expert, slice(row, row + rows)))
            row += rows
        return found

    def numbers(self, prefix: str) -> int:
        """How many numbers the files hold for the places under ``prefix``."""
        total = 0
        for target, sources in self._sources.items():
            if target.startswith(prefix):
                total += sum(torch.Size(self._checkpoint.shape(name)).numel() for name, _ in sources)
        return total

    def read(self, prefix: str, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Read what the places under ``prefix`` hold straight to ``device``; names come back in full.

        Floating-point tensors take ``dtype``, or float32 where the model insists on it.

        Raises:
            UsageError: a shard is damaged, or tensors do not have the shapes that a conversion needs.
        """
        groups = {target: sources for target, sources in self._sources.items() if target.startswith(prefix)}
        names = [name for sources in groups.values() for name, _ in sources]
        tensors = self._checkpoint.tensors(names, device)
        found: dict[str, Tensor] = {}
        for target, sources in groups.items():
            wanted = self._dtype_of(target, dtype)
            parts: dict[str, Callable[[], Tensor]] = {
                name: partial(_cast, tensors.pop(name), wanted) for name, _ in sources
            }
            if sources[0][1] is None:
                found[target] = parts[sources[0][0]]()
            else:
                found.update(self._convert(target, sources, parts))
        return found

    def _dtype_of(self, target: str, dtype: torch.dtype) -> torch.dtype:
        kept = getattr(self._skeleton, "_keep_in_fp32_modules_strict", None) or ()
        return torch.float32 if any(part in target for part in kept) else dtype

    def _convert(
        self, target: str, sources: list[tuple[str, str | None]], parts: dict[str, Callable[[], Tensor]]
    ) -> dict[str, Tensor]:
        converter = deepcopy(self._converter[sources[0][1] or ""])
        for name, pattern in sources:
            converter.add_tensor(target, name, pattern, parts.pop(name))
        try:
            made = converter.convert(target, model=self._skeleton, config=self._skeleton.config)
        except (RuntimeError, ValueError, KeyError, IndexError) as error:
            raise UsageError(
                f"{self._checkpoint.directory}: {sources[0][0]} and its like cannot become {target}: {error}\n"
                "The files do not fit the config. Download the model again."
            ) from error
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
