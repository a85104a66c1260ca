"""What processes tell each other. Nothing else in cadapter calls a collective; the pipeline engine has its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from cadapter.errors import CadapterError, UsageError
from cadapter.terminal import note
from cadapter.training.nccl import nccl_settings
from cadapter.training.watch import Watch, limit_seconds

TIMEOUT = timedelta(hours=25)
"""How long a collective waits. A job in which nothing moves ends before, and says where it stands: see ``watch``."""
BUCKET_NUMBERS = 1 << 26
"""How many numbers of gradients are added up at once: 256 MiB in float32."""


@dataclass(frozen=True)
class World:
    """The processes of this run and this process among them.

    Attributes:
        store: through which they find each other.
        watch: where this process is, and where the others are.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    store: dist.Store
    watch: Watch = field(default_factory=Watch)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which decides, prints and writes."""
        return self.rank == 0


def join_world() -> World:
    """Join the job that the environment describes (RANK, WORLD_SIZE, LOCAL_RANK), or make a world of one process.

    CUDA processes talk through NCCL, others through gloo.

    Raises:
        UsageError: the environment describes a job incompletely, or there are fewer GPUs than local processes.
        CadapterError: the others do not come.
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
    limit = limit_seconds()
    if size > 1:
        try:
            store, rank, size = next(dist.rendezvous("env://", rank, size, timeout=timedelta(seconds=limit)))
        except dist.DistError as error:
            where = f"{os.environ['MASTER_ADDR']}, port {os.environ['MASTER_PORT']}"
            raise CadapterError(
                f"Rank {rank} of {size}, start-up: the processes did not all meet at {where} within "
                f"{limit / 60:g} minutes.\n{str(error).splitlines()[0]}"
            ) from error
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT, device_id=device_id)
    return World(rank, size, local_rank, device, store, Watch(rank, size, store, limit))


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
            world.watch.moved()
        _send(b"", world)

    def work() -> None:
        received = {source: _received(source, world) for source in sources if source != 0}
        parts = _noticed(
            world,
            (
                part
                for source in sources
                for part in (map(_on_cpu, own) if source == 0 else map(safetensors.torch.load, received[source]))
            ),
        )
        try:
            write(parts)
        finally:
            for rest in received.values():  # after an error: nobody is left waiting to be heard
                for _ in rest:
                    pass

    on_main(work, world)


def _noticed(world: World, parts: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """``parts``, each of which is a sign that the work moves on."""
    for part in parts:
        world.watch.moved()
        yield part


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
