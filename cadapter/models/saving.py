"""Write a complete Hugging Face model directory, part by part.

The model's skeleton says all names, shapes and sizes before the first tensor is there. So the shards are laid out
first, and each tensor is written to its place when its part comes: in any order, with one part in memory (and the
copies that taking its fused experts apart needs).
"""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cadapter.errors import CadapterError
from cadapter.files import read_json, write_json
from cadapter.models.checkpoint import INDEX_NAME, SINGLE_NAME
from cadapter.models.own_code import code_files
from cadapter.models.safetensors_format import NAMES, Described, encoded_header

SHARD_BYTES = 5 * 10**9
"""Bytes of tensors that a shard holds at most; a larger tensor has a shard of its own."""

COPIED = (
    "config*.json", "generation_config.json", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json",
    "vocab*.json", "vocab*.txt", "merges.txt", "chat_template*.json", "chat_template*.jinja", "*.model", "LICENSE*",
)  # fmt: skip
"""Files of the base that a model written from it needs beside its weights; nothing else is copied."""

_NEVER_COPIED = (".py", ".bin", ".pt", ".pth", ".pkl", ".pickle")

_SHARD_NAME = "model-{:05d}-of-{:05d}.safetensors"


def copy_companions(source: Path, target: Path, dtype: str | None, with_code: bool = False) -> list[str]:
    """Copy the files of :data:`COPIED` and return their names; with ``dtype``, config.json names it.

    Args:
        with_code: copy the model's own code, too.
    """
    copied = []
    for file in sorted(source.iterdir()):
        wanted = any(fnmatch.fnmatchcase(file.name, pattern) for pattern in COPIED)
        if wanted and file.is_file() and file.suffix not in _NEVER_COPIED:
            shutil.copyfile(file, target / file.name)
            copied.append(file.name)
    for file in code_files(source) if with_code else ():
        shutil.copyfile(file, target / file.name)
        copied.append(file.name)
    if dtype is not None:
        config = read_json(target / "config.json")
        key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
        write_json(target / "config.json", {**config, key: dtype})
    return copied


@dataclass(frozen=True)
class _Place:
    """Where one tensor goes: ``start`` is its first byte within ``file``."""

    file: str
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class ModelWriter:
    """Writes a model's tensors under the names that they have on disk, with all that belongs to the model beside them.

    Args:
        base: the model directory whose config, tokenizer and further files are copied.
        skeleton: the whole ``AutoModelForCausalLM`` of its config; its tensors' values are not looked at, so they may
            be on the meta device. It says what the model consists of and how names in memory become names on disk
            (experts are fused in memory and one by one on disk).
        target: an existing directory, empty; making it whole or not at all is the caller's part.
        dtype: torch's name of the dtype that floating-point tensors are written in, but for those few that the model
            insists on having in float32.
        tied: the head is the embedding: its own name is left out, also where a part holds it.
        shard_bytes: bytes of tensors that a shard holds at most.
        with_code: the base's own code is copied, too.

    Attributes:
        tensors, bytes: number and size of the tensors written so far, as on disk.
    """

    def __init__(
        self,
        base: Path,
        skeleton: Any,
        target: Path,
        dtype: str,
        tied: bool,
        shard_bytes: int = SHARD_BYTES,
        with_code: bool = False,
    ) -> None:
        self.tensors = 0
        self.bytes = 0
        self._base = base
        self._skeleton = skeleton
        self._target = target
        self._dtype = dtype
        self._with_code = with_code
        self._left_out = frozenset(skeleton.all_tied_weights_keys if tied else ())
        shapes = {n: t.to("meta", self._dtype_of(n, t)) for n, t in skeleton.state_dict().items()}
        self._places = self._lay_out(self._on_disk(shapes), shard_bytes)
        self._written: set[str] = set()

    def add(self, part: Mapping[str, Tensor]) -> None:
        """Write tensors by their names in memory, such as one pipeline layer's; on any device, in any dtype.

        Raises:
            CadapterError: a tensor is written for the second time, is none of the model's, has another shape than
                the model's, or holds values that are not finite.
        """
        if not part:
            raise CadapterError("A part of the model without any tensor was to be written.")
        tensors = self._on_disk({name: self._stored(name, tensor) for name, tensor in part.items()})
        for name, tensor in tensors.items():
            self._write(name, tensor)

    def finish(self) -> None:
        """Write the index (where there are several shards) and the companions.

        Raises:
            CadapterError: tensors of the model were not written.
        """
        missing = [name for name in self._places if name not in self._written]
        if missing:
            raise CadapterError(
                f"The model would not be complete: {len(missing)} of {len(self._places)} tensors were not written.\n"
                + "\n".join(f"Missing: {name}" for name in missing[:5])
            )
        files = {name: place.file for name, place in self._places.items()}
        if len(set(files.values())) > 1:
            index = {"metadata": {"total_size": self.bytes}, "weight_map": dict(sorted(files.items()))}
            write_json(self._target / INDEX_NAME, index)
        copy_companions(self._base, self._target, self._dtype, self._with_code)

    def _on_disk(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors as the model's files hold them."""
        from transformers.core_model_loading import revert_weight_conversion

        kept = {name: tensor for name, tensor in tensors.items() if name not in self._left_out}
        return revert_weight_conversion(self._skeleton, kept)

    def _dtype_of(self, name: str, tensor: Tensor) -> torch.dtype:
        """The dtype on disk of what is called ``name`` in memory."""
        if not tensor.is_floating_point():
            return tensor.dtype
        float32 = getattr(self._skeleton, "_keep_in_fp32_modules_strict", None) or ()
        return torch.float32 if any(part in name for part in float32) else getattr(torch, self._dtype)

    def _stored(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor as it is written, on the CPU."""
        stored = tensor.detach().to(self._dtype_of(name, tensor))
        if not torch.isfinite(stored).all():
            raise CadapterError(
                f"{name} holds NaN or infinite values in {stored.dtype}: the training has diverged.\n"
                "Nothing is saved. Train with a smaller lr, with more warmup_steps, or with gradient_clipping."
            )
        return stored.cpu()

    def _lay_out(self, tensors: dict[str, Tensor], shard_bytes: int) -> dict[str, _Place]:
        """Make the shards, with headers and room for ``tensors``, which are given without values."""
        shards: list[dict[str, Tensor]] = [{}]
        room = shard_bytes
        for name, tensor in tensors.items():
            if tensor.nbytes > room and shards[-1]:
                shards.append({})
                room = shard_bytes
            shards[-1][name] = tensor
            room -= tensor.nbytes
        places: dict[str, _Place] = {}
        for number, shard in enumerate(shards, start=1):
            file = SINGLE_NAME if len(shards) == 1 else _SHARD_NAME.format(number, len(shards))
            places |= self._lay_out_shard(file, shard)
        return places

    def _lay_out_shard(self, file: str, tensors: dict[str, Tensor]) -> dict[str, _Place]:
        described = [
            Described(name, NAMES[tensor.dtype], tuple(tensor.shape), tensor.nbytes) for name, tensor in tensors.items()
        ]
        beginning, places = encoded_header(described, {"format": "pt"})
        with open(self._target / file, "xb") as shard:
            shard.write(beginning)
            shard.truncate(places[-1])
        return {
            name: _Place(file, start, tuple(tensor.shape), tensor.dtype)
            for (name, tensor), start in zip(tensors.items(), places, strict=False)
        }

    def _write(self, name: str, tensor: Tensor) -> None:
        place = self._places.get(name)
        if place is None:
            raise CadapterError(f"{name} was to be written, but {self._base} is a model without such a tensor.")
        if name in self._written:
            raise CadapterError(f"{name} was to be written twice.")
        if tuple(tensor.shape) != place.shape or tensor.dtype != place.dtype:
            raise CadapterError(
                f"{name} was to be written as {tuple(tensor.shape)} {tensor.dtype}, "
                f"but the model's is {place.shape} {place.dtype}."
            )
        with open(self._target / place.file, "r+b") as shard:
            shard.seek(place.start)
            shard.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._written.add(name)
        self.tensors += 1
        self.bytes += tensor.nbytes
