"""Which device a command may compute on."""

from __future__ import annotations

import torch

from cadapter.errors import UsageError


def usable_device(name: str) -> str:
    """Return ``name`` if it is a device that torch can compute on here.

    Raises:
        UsageError: it is not.
    """
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises the latter
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"--device {name} cannot be used here: {reason}\nUse cpu, or cuda where there is a GPU."
        ) from error
    return name


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy ``tensor`` to ``device``; from host memory to a GPU without waiting for what the GPU is doing."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
