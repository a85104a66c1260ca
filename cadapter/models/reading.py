"""Bytes of files into tensors, read by several threads at once.

One thread copies some GiB a second out of the page cache, and a GPU takes up many more. Each thread reads a piece into
a buffer of its own, in pinned memory for a GPU, and sends it on a stream of its own while the others read.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

THREADS = 8
PIECE = 16 * 2**20
"""Bytes that a thread reads at once; with ``THREADS`` it is what reading takes of the host's memory."""


class Stretch(NamedTuple):
    """Bytes of a file that belong into a contiguous tensor, from its start to its end."""

    file: Path
    offset: int
    target: Tensor


class Reader:
    """Threads with their buffers, for tensors on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1))
        self._own = threading.local()

    def read(self, stretches: Iterable[Stretch]) -> None:
        """Fill the targets, which are made on this device's current stream.

        Raises:
            OSError: a file cannot be read, or ends too early.
        """
        ready = None
        if self._device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self._device))  # their memory may still be in use by work before it
        # All pieces are done, or have failed, before one failure is raised.
        done = list(self._pool.map(lambda piece: self._try(piece, ready), list(_pieces(stretches))))
        for error in done:
            if error is not None:
                raise error

    def _try(self, piece: Stretch, ready: torch.cuda.Event | None) -> OSError | None:
        try:
            self._read_piece(piece, ready)
        except OSError as error:
            return error
        return None

    def _read_piece(self, piece: Stretch, ready: torch.cuda.Event | None) -> None:
        size = piece.target.numel()
        if not hasattr(self._own, "buffer"):
            self._own.buffer = torch.empty(PIECE, dtype=torch.uint8, pin_memory=ready is not None)
            self._own.stream = None if ready is None else torch.cuda.Stream(self._device)
        buffer, stream = self._own.buffer[:size], self._own.stream
        with open(piece.file, "rb", buffering=0) as file:
            file.seek(piece.offset)
            view, filled = memoryview(buffer.numpy()), 0
            while filled < size:
                count = file.readinto(view[filled:])
                if not count:
                    raise OSError(f"{piece.file} ends too early")
                filled += count
        if stream is None:
            piece.target.copy_(buffer)
            return
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            piece.target.copy_(buffer, non_blocking=True)
        stream.synchronize()


def _pieces(stretches: Iterable[Stretch]) -> Iterator[Stretch]:
    for file, offset, target in stretches:
        raw = target.reshape(-1).view(torch.uint8)
        for start in range(0, raw.numel(), PIECE):
            yield Stretch(file, offset + start, raw[start : start + PIECE])
