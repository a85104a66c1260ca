"""Which device a command may compute on."""

from __future__ import annotations

import resource
from functools import cache

import torch

from cadapter.errors import UsageError

GIB = 2**30


def usable_device(name: str, called: str = "--device") -> str:
    """Return ``name`` if it is a device that torch can compute on here; ``called``: what the user named it with.

    Raises:
        UsageError: it is not.
    """
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises the latter
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"{called} {name} cannot be used here: {reason}\nUse cpu, or cuda where there is a GPU."
        ) from error
    return name


def peak_memory(device: torch.device) -> int:
    """The largest number of bytes that this process has had: of the GPU's memory, on the CPU of the host's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_in_words(peak: float, device: torch.device) -> str:
    """``peak`` bytes beside what there is on a GPU, for whoever watches."""
    if device.type == "cuda":
        return f"{peak / GIB:.1f} of {torch.cuda.get_device_properties(device).total_memory / GIB:.1f} GiB"
    return f"{peak / GIB:.2f} GiB"


@cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    """The stream of a GPU's copies from host memory."""
    return torch.cuda.Stream(device)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy ``tensor`` to ``device``; from host memory to a GPU while the GPU computes what came before."""
    if tensor.device.type != "cpu" or device.type != "cuda":
        return tensor.to(device)
    computing, copies = torch.cuda.current_stream(device), _copies(device)
    with torch.cuda.stream(copies):
        sent = tensor.pin_memory().to(device, non_blocking=True)
    computing.wait_stream(copies)
    sent.record_stream(computing)
    return sent
