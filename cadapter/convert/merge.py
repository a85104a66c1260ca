"""Merge adapters into a model: shard by shard, in float32, with one rounding at the end, to the shards it came from."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from cadapter.convert.operators import work_dtype
from cadapter.convert.plan import Plan
from cadapter.convert.shards import Entry, rewrite_shard
from cadapter.errors import CadapterError, UsageError
from cadapter.files import new_directory, read_json, write_json, write_text
from cadapter.models.checkpoint import INDEX_NAME, Checkpoint
from cadapter.models.safetensors_format import DTYPES, NAMES
from cadapter.models.saving import copy_companions


@dataclass
class MergeSummary:
    """What a merge did.

    Attributes:
        changed, copied: numbers of tensors whose values changed, and of all others.
        largest_change: the largest ``‖ΔW‖_F / ‖W‖_F`` among the changed, before rounding; ``largest_name`` is its
            tensor.
        dtypes: in which the changed are stored.
        bytes: bytes of weights written.
        seconds: wall-clock time.
    """

    changed: int = 0
    copied: int = 0
    largest_change: float = 0.0
    largest_name: str = ""
    dtypes: set[str] = field(default_factory=set)
    bytes: int = 0
    seconds: float = 0.0


@dataclass
class _Merger:
    """Replaces the tensors of one model and counts what it touched."""

    base: Checkpoint
    plan: Plan
    device: torch.device
    dtype: str | None
    advance: Callable[[int], None]
    summary: MergeSummary = field(default_factory=MergeSummary)

    def touched(self, entry: Entry) -> bool:
        return entry.name in self.plan

    def replacement(self, entry: Entry) -> Tensor:
        """The entry's tensor with its changes, worked out in float32 and rounded once; on the CPU."""
        old = self.base.tensor(entry.name, self.device)
        new = old.to(work_dtype(old), copy=True)
        for change in self.plan.get(entry.name, []):
            change.apply_(new)
        stored = new.to(DTYPES[self.dtype or entry.dtype], copy=True)  # new is used up below
        if not _fits(new, stored.dtype):
            raise UsageError(
                f"{self.base.directory}: {entry.name} would hold NaN or infinite values in {stored.dtype}.\n"
                "The base has them already, or they leave the range of that dtype: choose another with --dtype."
            )
        if entry.name in self.plan:
            self._count(entry.name, old, new, stored)
        return stored.cpu()

    def _count(self, name: str, old: Tensor, new: Tensor, stored: Tensor) -> None:
        """Note what changed; ``new`` is used up."""
        self.summary.changed += not torch.equal(stored, old.to(stored.dtype))
        size = torch.linalg.vector_norm(old, dtype=new.dtype).item()
        change = torch.linalg.vector_norm(new.sub_(old)).item() / size if size else 0.0
        self.summary.dtypes.add(str(stored.dtype).removeprefix("torch."))
        if change > self.summary.largest_change:
            self.summary.largest_change, self.summary.largest_name = change, name

    def rewrite(self, directory: Path) -> None:
        for file in self.base.files():
            self.summary.bytes += rewrite_shard(
                self.base.directory / file, directory / file, self.replacement, self.touched, self.dtype
            )
            self.advance(sum(self.base.file_of(name) == file for name in self.base.names()))
        self.summary.copied = len(self.base.names()) - self.summary.changed


def _fits(exact: Tensor, dtype: torch.dtype) -> bool:
    """Whether all numbers are finite in ``dtype``; NaN are none. One pass, faster than isfinite of half precision."""
    smallest, largest = torch.aminmax(exact) if exact.numel() else (exact.new_zeros(()), exact.new_zeros(()))
    return bool(torch.maximum(-smallest, largest) <= torch.finfo(dtype).max)


def merge_model(
    base: Checkpoint,
    plan: Plan,
    output: Path,
    card: Callable[[MergeSummary], str],
    device: str = "cpu",
    dtype: str | None = None,
    force: bool = False,
    advance: Callable[[int], None] = lambda tensors_done: None,
) -> MergeSummary:
    """Write ``base`` with the changes of ``plan`` to ``output``: same shards, same names, same index.

    Args:
        card: makes README.md from the summary.
        device: where the changes are worked out.
        dtype: "float32", "bfloat16" or "float16" for all weights; None keeps each tensor's own.
        advance: called after each shard with its number of tensors.

    Raises:
        UsageError: ``output`` exists, the base is quantised, or a result is not finite. Nothing is written then.
        CadapterError: every change was lost in rounding.
    """
    if getattr(base.config, "quantization_config", None) is not None:
        raise UsageError(f"{base.directory} is a quantised model.\nMerge into the model's unquantised weights.")
    short = None if dtype is None else NAMES[getattr(torch, dtype)]
    merger = _Merger(base, plan, torch.device(device), short, advance)
    begun = time.monotonic()
    with new_directory(output, force) as directory:
        merger.rewrite(directory)
        if not merger.summary.changed:
            raise CadapterError(
                "No stored value changed: the adapter's change is below the precision of the weights.\n"
                "Merge with --dtype float32, or at a greater strength. Nothing was written."
            )
        copy_companions(base.directory, directory, dtype, base.trust_remote_code)
        _write_index(base, directory, merger.summary.bytes)
        write_text(directory / "README.md", card(merger.summary))
    merger.summary.seconds = time.monotonic() - begun
    return merger.summary


def _write_index(base: Checkpoint, directory: Path, total_size: int) -> None:
    """The base's index with its ``total_size`` renewed; none where the base has none."""
    source = base.directory / INDEX_NAME
    if source.is_file():
        index = read_json(source)
        index["metadata"] = {**index.get("metadata", {}), "total_size": total_size}
        write_json(directory / INDEX_NAME, index)


_CARD_BEGINS = "`cadapter merge` changed "
_CARD_HEAD = 4096
"""Bytes of a model card in which that stands, if it does."""


def is_merged(directory: Path) -> bool:
    """Whether :func:`merge_model` wrote the model in ``directory``, as its card says."""
    card = directory / "README.md"
    if not card.is_file():
        return False
    with card.open("rb") as file:
        return _CARD_BEGINS.encode() in file.read(_CARD_HEAD)


def merge_card(base_name: str, recipe: list[str], notes: list[str], dtype: str | None, summary: MergeSummary) -> str:
    """README.md of a merged model: what was merged into what, and what that changed."""
    steps = "\n".join(f"{number}. {step}" for number, step in enumerate(recipe, start=1))
    remarks = "".join(f"\n{note}\n" for note in notes)
    return f"""---
library_name: transformers
tags:
- merge
- control-adapter
---

# Merged model

{_CARD_BEGINS}`{base_name}` by, in this order:

{steps}

{summary.changed} tensors changed and {summary.copied} were copied. The largest change of a tensor is
{summary.largest_change:.3%} of its norm ({summary.largest_name}). The changes were worked out in float32 and rounded
once, to {dtype or "the dtype the weights had"}.
{remarks}"""
