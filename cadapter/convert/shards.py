"""Rewrite a safetensors shard tensor by tensor: what does not change is copied as bytes, and while a tensor is written
the next one is worked out, so that two are in memory at most.
"""

from __future__ import annotations

import math
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from cadapter.errors import UsageError
from cadapter.models.safetensors_format import DTYPES, FLOATS, Described, encoded_header, header_of

_COPY_BYTES = 1 << 24


@dataclass(frozen=True)
class Entry:
    """One tensor of a shard; ``start`` and ``end`` are its bytes within the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


Replacement = Callable[[Entry], Tensor]


def read_header(file: Path) -> tuple[dict[str, str] | None, list[Entry]]:
    """Metadata and tensors of a safetensors file, in the order of their bytes.

    Raises:
        UsageError: the file is damaged.
    """
    try:
        header, start = header_of(file)
        metadata = header.pop("__metadata__", None)
        entries = [
            Entry(name, part["dtype"], tuple(part["shape"]), *(start + offset for offset in part["data_offsets"][:2]))
            for name, part in header.items()
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UsageError(f"{file} is damaged: {error}.") from error
    return metadata, sorted(entries, key=lambda entry: entry.start)


def rewrite_shard(
    source: Path, target: Path, replacement: Replacement, touched: Callable[[Entry], bool], dtype: str | None = None
) -> int:
    """Write ``source`` to ``target`` with some tensors replaced; returns the bytes of its tensors.

    Args:
        replacement: gives the new tensor of an entry for which ``touched`` holds or whose dtype changes; the result
            has the entry's shape and its new dtype.
        touched: whether an entry's values change.
        dtype: the dtype (safetensors' name) of all F64, F32, F16 and BF16 tensors; None keeps each one's own.
    """

    def dtype_of(entry: Entry) -> str:
        return dtype if dtype is not None and entry.dtype in FLOATS else entry.dtype

    def is_replaced(entry: Entry) -> bool:
        return touched(entry) or dtype_of(entry) != entry.dtype

    metadata, entries = read_header(source)
    if not any(is_replaced(entry) for entry in entries):
        shutil.copyfile(source, target)
        return sum(entry.end - entry.start for entry in entries)
    described = [_described(entry, dtype_of(entry)) for entry in entries]
    beginning, _ = encoded_header(described, metadata)
    wanted = [replacement if is_replaced(entry) else None for entry in entries]
    with open(source, "rb") as old, open(target, "xb") as new:
        new.write(beginning)
        for entry, tensor in _one_ahead(entries, wanted):
            if tensor is not None:
                new.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            else:
                _copy_range(old, new, entry.start, entry.end)
    return sum(each.bytes for each in described)


def _described(entry: Entry, dtype: str) -> Described:
    """The entry as it is written, in ``dtype``; of a dtype that is kept nothing need be known."""
    kept = dtype == entry.dtype
    size = entry.end - entry.start if kept else math.prod(entry.shape) * DTYPES[dtype].itemsize
    return Described(entry.name, dtype, entry.shape, size)


def _one_ahead(entries: Sequence[Entry], makers: Sequence[Replacement | None]) -> Iterator[tuple[Entry, Tensor | None]]:
    """The entries, each with what its maker makes of it; the next is made in a thread while the caller has the last."""
    waiting: deque[tuple[Entry, Future[Tensor] | None]] = deque()
    with ThreadPoolExecutor(max_workers=1) as worker:
        for entry, maker in zip(entries, makers, strict=True):
            waiting.append((entry, worker.submit(maker, entry) if maker else None))
            if len(waiting) > 1:
                yield _made(*waiting.popleft())
        while waiting:
            yield _made(*waiting.popleft())


def _made(entry: Entry, future: Future[Tensor] | None) -> tuple[Entry, Tensor | None]:
    return entry, future.result() if future else None


def _copy_range(old: BinaryIO, new: BinaryIO, start: int, end: int) -> None:
    old.seek(start)
    left = end - start
    while left:
        chunk = old.read(min(left, _COPY_BYTES))
        if not chunk:
            raise UsageError(f"{old.name} is damaged: it ends too early.")
        new.write(chunk)
        left -= len(chunk)
