"""The safetensors format: what dtypes are called in it, and the header that says where each tensor lies.

A file is an 8-byte little-endian header length, a JSON header {name: {dtype, shape, data_offsets}} with optional
``__metadata__``, and the tensors' bytes without holes, from which the offsets count.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = ("F64", "F32", "F16", "BF16")
"""The dtypes of weights that can be computed with as they are."""

_ALIGNMENT = 8


class Described(NamedTuple):
    """A tensor as a header describes it: its dtype by the format's name, its shape, and its size in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


def encoded_header(tensors: Iterable[Described], metadata: dict[str, str] | None) -> tuple[bytes, list[int]]:
    """The beginning of a file of ``tensors``, and where in the file each begins, in their order, and the last ends.

    It is padded with spaces, so that the tensors are aligned.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    ends = [0]
    for name, dtype, shape, size in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [ends[-1], ends[-1] + size]}
        ends.append(ends[-1] + size)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    beginning = len(text).to_bytes(8, "little") + text
    return beginning, [len(beginning) + end for end in ends]


def header_of(file: Path) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file, and the byte behind it, from which its offsets count.

    Raises:
        OSError, ValueError: the file cannot be read, or has no such header.
    """
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > file.stat().st_size - 8:
            raise ValueError("its header is longer than the file")
        return json.loads(opened.read(length)), 8 + length
