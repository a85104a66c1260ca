"""What processes tell each other. Nothing else in cadapter calls a collective; the pipeline engine has its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from cadapter.errors import CadapterError, UsageError

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others; a node that builds a cache alone makes the others wait."""


@dataclass(frozen=True)
class World:
    """The processes of this run and this process among them."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

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
    rank, size = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    os.environ["LOCAL_RANK"] = str(local_rank)
    cuda = torch.cuda.is_available()
    if cuda and local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"Process {local_rank} of this node has no GPU: {torch.cuda.device_count()} are visible.\n"
            "Start as many processes as there are GPUs."
        )
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "nccl" if cuda else "gloo"
    if size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
    else:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise UsageError(f"WORLD_SIZE = {size}, but {' and '.join(missing)} is not set in the environment.")
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=TIMEOUT)
    return World(rank, size, local_rank, device)


def leave_world() -> None:
    """Leave the job, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_world(values: Tensor) -> Tensor:
    """Return the elementwise sum of ``values`` over all processes (in place)."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


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


def gather_tensors(tensors: dict[str, Tensor], sources: Sequence[int], world: World) -> dict[str, Tensor]:
    """Bring the named tensors of the ranks ``sources`` together on rank 0 (CPU); elsewhere return nothing.

    They travel in the safetensors format, so that nothing is unpickled.
    """
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    gathered: dict[str, Tensor] = {}
    for source in sources:
        if world.size == 1:
            return own
        payload = safetensors.torch.save(own) if world.rank == source else b""
        received = _broadcast_bytes(payload, source, world.device)
        if world.is_main:
            gathered.update(own if source == 0 else safetensors.torch.load(received))
    return gathered
