"""Additive LoRA → LoRA in one GGUF file, as llama.cpp's ``--lora`` loads it.

llama.cpp adds ``(alpha / r)·B·(A·x)`` with one alpha for the file and r from the shapes. alpha is that of the first
pair, ``s·r``; a pair whose own s·r differs has the quotient in its B.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from cadapter.adapters.directory import CONFIG_NAME, kind_of, read_adapter_config
from cadapter.convert.gguf_layout import LayoutPair, architecture_of, laid_out
from cadapter.convert.lora_directory import LoraPair, read_lora
from cadapter.errors import UsageError
from cadapter.files import new_file
from cadapter.models.checkpoint import load_model_config, resolve_model
from cadapter.models.loading import make_skeleton
from cadapter.models.own_code import OwnCodeNeeded

OutType = Literal["f32", "f16", "bf16", "q8_0"]

_KINDS: dict[OutType, tuple[Kind, ...]] = {
    "f32": (Kind.F32,),
    "f16": (Kind.F16, Kind.F32),
    "bf16": (Kind.BF16, Kind.F32),
    "q8_0": (Kind.Q8_0, Kind.F16, Kind.F32),
}
"""For each choice the types that a tensor may take, the first that can hold it."""

PROGRAM = "to-gguf"


@dataclass(frozen=True)
class GgufLora:
    """A LoRA as llama.cpp has it: its ``name``, llama.cpp's name of the ``architecture``, and its ``pairs``."""

    name: str
    architecture: str
    pairs: tuple[LayoutPair, ...]

    @property
    def alpha(self) -> float:
        """The file's: s·r of the first pair."""
        return self.pairs[0].scale * self.pairs[0].A.shape[-2]


@dataclass
class GgufSummary:
    """What was written.

    Attributes:
        tensors, bytes: by type.
        kept: tensors of another type than asked for, by name: which, and why.
        rounding: the largest ‖X − stored X‖ / ‖X‖ of a tensor.
    """

    tensors: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    kept: dict[str, tuple[str, str]] = field(default_factory=dict)
    rounding: float = 0.0


def lay_out(lora: Path, base: str | None = None) -> GgufLora:
    """Read the additive LoRA in directory ``lora`` and lay it out as llama.cpp has it.

    Args:
        base: a model directory or hub id, of which only the config is read; None: what the LoRA's config names, where
            that is a directory.

    Raises:
        UsageError: the directory holds another kind of adapter, or what llama.cpp cannot apply; or it does not fit the
            base, or that is not known.
    """
    pairs = _read(lora)
    directory = _base_directory(lora, base)
    try:
        config = load_model_config(directory)
    except OwnCodeNeeded as error:
        raise UsageError(
            f"{directory} is a model with code of its own, and llama.cpp has no architecture for such models.\n"
            f"Merge the LoRA instead: cadapter merge {directory} {lora} OUTPUT --trust-remote-code"
        ) from error
    architecture = architecture_of(config.model_type)
    skeleton = make_skeleton(config, torch.float32)
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    return GgufLora(lora.resolve().name, architecture.name, tuple(laid_out(pairs, config, shapes, str(lora))))


def write_gguf(
    lora: GgufLora,
    output: Path,
    outtype: OutType = "f32",
    force: bool = False,
    advance: Callable[[int], None] = lambda modules_done: None,
) -> GgufSummary:
    """Write ``lora`` as the GGUF file ``output``.

    Args:
        outtype: of all tensors that it can hold; the others stay f16, or f32.
        advance: called with 1 after each module.

    Raises:
        UsageError: ``output`` exists.
    """
    summary = GgufSummary()
    with new_file(output, force) as file:
        writer = gguf.GGUFWriter(file, lora.architecture)
        try:
            writer.add_type(gguf.GGUFType.ADAPTER)
            writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
            writer.add_name(lora.name)
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, lora.alpha)
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            for pair in lora.pairs:
                _add(writer, pair, lora.alpha, outtype, summary)
                advance(1)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    return summary


# ---- reading ----------------------------------------------------------------------------------------------------


def _read(lora: Path) -> Mapping[str, LoraPair]:
    """The pairs of an additive LoRA directory, by module in Hugging Face's model."""
    kind = kind_of(lora)
    if kind == "control":
        raise UsageError(
            f"{lora} is a control adapter, which llama.cpp does not know.\n"
            f"Make a LoRA of it first: cadapter to-add-lora BASE {lora} LORA"
        )
    if kind == "multiplicative":
        raise UsageError(
            f"{lora} is a multiplicative LoRA, and llama.cpp knows additive ones.\nMake one of the control adapter "
            f"with cadapter to-add-lora, or merge this one: cadapter merge BASE {lora} OUTPUT"
        )
    pairs = read_lora(lora, PROGRAM).pairs
    biased = [module for module, pair in pairs.items() if pair.bias is not None and pair.bias.any()]
    if biased:
        raise UsageError(
            f"{lora} changes biases too (lora_bias of {biased[0]}{' …' * (len(biased) > 1)}), and a GGUF LoRA has no "
            f"place for them.\nMerge it: cadapter merge BASE {lora} OUTPUT"
        )
    if not any(pair.A.any() and pair.B.any() for pair in pairs.values()):
        raise UsageError(f"{lora} changes nothing: B·A = 0 in every module.\nGive a LoRA that was trained.")
    return pairs


def _base_directory(lora: Path, base: str | None) -> Path:
    if base is not None:
        return resolve_model(base, ("config.json",))
    recorded = read_adapter_config(lora).get("base_model_name_or_path")
    if not isinstance(recorded, str) or not os.path.isdir(recorded):
        raise UsageError(
            f"{lora / CONFIG_NAME} names {recorded!r} as its base model, which is no directory here.\n"
            "Give the base model, of which only the config is read: --base MODEL"
        )
    return Path(recorded)


class _Written(np.ndarray[Any, Any]):
    """An array that the GGUF writer writes with Python's own file.

    numpy's ``tofile`` goes through a buffer of C, whose last error is lost: on a full disk a file would be cut off and
    nobody told.
    """

    def tofile(self, fid: Any, sep: str = "", format: str = "%s") -> None:  # noqa: A002 (numpy's name)
        """Write the bytes to the open file ``fid``."""
        fid.write(np.ascontiguousarray(self).view(np.ndarray).data)


# ---- writing ----------------------------------------------------------------------------------------------------


def _add(writer: gguf.GGUFWriter, pair: LayoutPair, alpha: float, outtype: OutType, summary: GgufSummary) -> None:
    B = pair.B * (pair.scale * pair.A.shape[-2] / alpha)
    for name, factor in ((f"{pair.tensor}.lora_a", pair.A), (f"{pair.tensor}.lora_b", B)):
        kind, data, rounding, reason = _encoded(factor, outtype)
        writer.add_tensor(name, data.view(_Written), raw_dtype=kind)
        summary.tensors[kind.name.lower()] += 1
        summary.bytes[kind.name.lower()] += data.nbytes
        summary.rounding = max(summary.rounding, rounding)
        if reason:
            summary.kept[name] = (kind.name.lower(), reason)


def _encoded(factor: Tensor, outtype: OutType) -> tuple[Kind, np.ndarray[Any, Any], float, str]:
    """``factor`` in the first type that can hold it, what rounding changed of its norm, and why not ``outtype``."""
    values, reason = factor.contiguous().numpy(), ""
    for kind in _KINDS[outtype]:
        block = gguf.GGML_QUANT_SIZES[kind][0]
        if values.shape[-1] % block:
            reason = f"rows of {values.shape[-1]} numbers, no multiple of {block}"
            continue
        with np.errstate(all="ignore"):  # what overflows is found below
            data = gguf.quantize(values, kind)
            stored = gguf.dequantize(data, kind)
        if np.isfinite(stored).all():
            error, norm = (np.linalg.norm(X.astype(np.float64)) for X in (stored - values, values))
            return kind, data, float(error / norm) if norm else 0.0, reason
        reason = f"values beyond the range of {kind.name.lower()}"
    raise AssertionError("float32 holds float32")
