"""What processes tell each other. Nothing else in cadapter calls a collective; the pipeline engine has its own."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from cadapter.errors import CadapterError, Stopped, UsageError
from cadapter.terminal import note
from cadapter.training.nccl import nccl_settings

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others; a node that builds a cache alone makes the others wait."""

FAILED, HEARD = "cadapter/failed", "cadapter/heard"
"""Keys of the store: the rank that tells of a failure with the exit code, and how many ranks know of it."""
BUCKET_NUMBERS = 1 << 26
"""How many numbers of gradients are added up at once: 256 MiB in float32."""

HEAD_START, PATIENCE = timedelta(seconds=2), timedelta(seconds=5)
"""How long other ranks let rank 0 tell of what all of them met, and how long rank 0 waits for them at the end."""


@dataclass(frozen=True)
class World:
    """The processes of this run and this process among them; the ``store`` is what they find each other through."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    store: dist.Store

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which decides, prints and writes."""
        return self.rank == 0


def join_world() -> World:
    """Join the job that the environment describes (RANK, WORLD_SIZE, LOCAL_RANK), or make a world of one process.

    CUDA processes talk through NCCL, others through gloo.

    Raises:
        UsageError: the environment describes a job incompletely, or there are fewer GPUs than local processes.
    """
    rank, size, local_rank = (
        _number(name, default) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if not 0 <= rank < size:
        raise UsageError(f"RANK = {rank} and WORLD_SIZE = {size} in the environment do not go together.")
    cuda = torch.cuda.is_available()
    gpus = torch.cuda.device_count() if cuda else 0
    needed_names = ["MASTER_ADDR", "MASTER_PORT"] * (size > 1) + ["LOCAL_RANK"] * (size > 1 and gpus > 1)
    missing = [name for name in needed_names if name not in os.environ]
    if missing:
        raise UsageError(f"WORLD_SIZE = {size}, but {' and '.join(missing)} is not set in the environment.")
    # srun can give each of its tasks a GPU of its own, which is the only one that the task sees.
    gpu = 0 if gpus == 1 and "SLURM_PROCID" in os.environ else local_rank
    os.environ["LOCAL_RANK"] = str(gpu)  # DeepSpeed takes it for the number of the GPU
    if cuda and gpu >= gpus:
        raise UsageError(
            f"Process {local_rank} of this node has no GPU: {gpus} are visible.\n"
            "Start as many processes as there are GPUs."
        )
    device = torch.device("cuda", gpu) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        needed = nccl_settings([torch.cuda.get_device_name(number) for number in range(gpus)], os.environ)
        os.environ.update(needed)
        if needed and size > 1 and rank == 0:
            note(f"RTX 40 cards have no peer-to-peer transfers: {' and '.join(f'{name}=1' for name in needed)} is set.")
    # Told its device, NCCL does not guess it from the rank, which is wrong on some clusters.
    backend, device_id = ("nccl", device) if cuda else ("gloo", None)
    store: dist.Store = dist.HashStore()
    if size > 1:
        store, rank, size = next(dist.rendezvous("env://", rank, size, timeout=TIMEOUT))
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT, device_id=device_id)
    return World(rank, size, local_rank, device, store)


def _number(name: str, default: int) -> int:
    """A number of the environment."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UsageError(f"{name} = {text!r} in the environment is no number.")
    return int(text)


def leave_world() -> None:
    """Leave the job, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def joined_world() -> Iterator[World]:
    """Be part of the job for as long as the block runs.

    When processes fail, together or because one of them did, one of them tells: it raises its error. The others end
    with :class:`SystemExit` and the same exit code, and print nothing.
    """
    world = join_world()
    try:
        yield world
    except BaseException as error:
        if world.size == 1:
            raise
        code = _another_tells(error, world)
        if code is not None:
            raise SystemExit(code) from None
        if not isinstance(error, Stopped):
            print(f"From rank {world.rank} of {world.size}:", file=sys.stderr, flush=True)
        raise
    finally:
        leave_world()


def _another_tells(error: BaseException, world: World) -> int | None:
    """Return None if this process is the one to tell of ``error``, else the exit code of the one that does."""
    interrupted = 130 if isinstance(error, KeyboardInterrupt) else 1
    own_code = error.exit_code if isinstance(error, CadapterError) else interrupted
    claim = f"{world.rank} {own_code}"
    try:
        if not world.is_main:
            with contextlib.suppress(dist.DistStoreError):
                world.store.wait([FAILED], HEAD_START)
        first = world.store.compare_set(FAILED, "", claim).decode()
        leave_world()  # those who wait for this process go on, and fail
        heard = world.store.add(HEARD, 1)
        deadline = time.monotonic() + PATIENCE.total_seconds()
        # Rank 0 often holds the store, which the others still have to ask.
        while world.is_main and heard < world.size and time.monotonic() < deadline:
            time.sleep(0.05)
            heard = world.store.add(HEARD, 0)
    except RuntimeError:
        # The store is gone, and rank 0 with it. It has told, and its exit code is the one to be seen first.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(HEAD_START.total_seconds())
        return own_code
    return None if first == claim else int(first.split()[1])


def sum_over_world(values: Tensor) -> Tensor:
    """Return the elementwise sum of ``values`` over all processes (in place)."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


@dataclass(frozen=True)
class GradientGroups:
    """Who adds up gradients with whom.

    Attributes:
        count: the number of replicas.
        replicas: the processes that hold this stage.
        tied_name: the parameter that the first and the last stage share, or "".
        tied: the processes that hold it.
    """

    count: int
    replicas: Any
    tied_name: str = ""
    tied: Any = None

    @property
    def alone(self) -> bool:
        """Whether there is nobody to add up with."""
        return self.count == 1 and not self.tied_name


def new_group(ranks: Sequence[int]) -> Any:
    """Make a group of processes; every process of the world calls this, whether it belongs to the group or not."""
    return dist.new_group(list(ranks))


def average(tensors: Sequence[Tensor], group: Any, count: int) -> None:
    """Replace each tensor by the sum over ``group`` divided by ``count``, in buckets of one dtype."""
    bucket: list[Tensor] = []
    for index, tensor in enumerate(tensors):
        bucket.append(tensor)
        following = tensors[index + 1] if index + 1 < len(tensors) else None
        full = sum(each.numel() for each in bucket) >= BUCKET_NUMBERS
        if following is None or following.dtype != tensor.dtype or full:
            _average_bucket(bucket, group, count)
            bucket = []


def _average_bucket(bucket: list[Tensor], group: Any, count: int) -> None:
    flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
    dist.all_reduce(flat, group=group)
    flat.div_(count)
    for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
        tensor.copy_(part.view_as(tensor))


def barrier() -> None:
    """Wait until every process is here."""
    if dist.get_world_size() > 1:
        dist.barrier()


def _broadcast_bytes(payload: bytes, source: int, device: torch.device) -> bytes:
    length = torch.tensor([len(payload)], dtype=torch.int64, device=device)
    dist.broadcast(length, source)
    if dist.get_rank() == source:
        buffer = torch.frombuffer(bytearray(payload), dtype=torch.uint8).to(device)
    else:
        buffer = torch.empty(int(length), dtype=torch.uint8, device=device)
    dist.broadcast(buffer, source)
    return buffer.cpu().numpy().tobytes()


def from_main(text: str, world: World) -> str:
    """Return rank 0's ``text`` on every process."""
    if world.size == 1:
        return text
    # One byte more, since an empty tensor cannot travel.
    return _broadcast_bytes(b"+" + text.encode(), 0, world.device)[1:].decode()


def on_main(work: Callable[[], None], world: World) -> None:
    """Run ``work`` on rank 0 while the others wait; if it fails there, every process raises.

    Raises:
        CadapterError: what ``work`` raised, on all processes.
    """
    failure = ""
    error: Exception | None = None
    if world.is_main:
        try:
            work()
        except Exception as raised:
            error, failure = raised, f"{type(raised).__name__}: {raised}"
    failure = from_main(failure, world)
    if error is not None:
        raise error
    if failure:
        raise CadapterError(f"Rank 0 failed.\n{failure}")


def stream_to_main(
    own: Iterator[dict[str, Tensor]],
    sources: Sequence[int],
    world: World,
    write: Callable[[Iterator[dict[str, Tensor]]], None],
) -> None:
    """Have ``write`` called on rank 0 with the parts of all sources, in order, on the CPU, one at a time.

    Parts travel in the safetensors format, so that nothing is unpickled.

    Args:
        own: this process's parts; used only if it is one of ``sources``.
        sources: ranks; rank 0 may be one of them.

    Raises:
        Exception: what ``write`` raised, on rank 0; :class:`CadapterError` of it on the others.
    """
    own = (part for part in own if part)
    if world.rank in sources and not world.is_main:
        for part in own:
            _send(safetensors.torch.save(_on_cpu(part)), world)
        _send(b"", world)

    def work() -> None:
        received = {source: _received(source, world) for source in sources if source != 0}
        parts = (
            part
            for source in sources
            for part in (map(_on_cpu, own) if source == 0 else map(safetensors.torch.load, received[source]))
        )
        try:
            write(parts)
        finally:
            for rest in received.values():  # after an error: nobody is left waiting to be heard
                for _ in rest:
                    pass

    on_main(work, world)


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _send(payload: bytes, world: World) -> None:
    dist.send(torch.tensor([len(payload)], dtype=torch.int64, device=world.device), 0)
    if payload:
        dist.send(torch.frombuffer(bytearray(payload), dtype=torch.uint8).to(world.device), 0)


def _received(source: int, world: World) -> Iterator[bytes]:
    while True:
        length = torch.zeros(1, dtype=torch.int64, device=world.device)
        dist.recv(length, source)
        if not int(length):
            return
        buffer = torch.empty(int(length), dtype=torch.uint8, device=world.device)
        dist.recv(buffer, source)
        yield buffer.cpu().numpy().tobytes()
