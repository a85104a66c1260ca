"""What NCCL has to be told of some graphics cards before it starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

SWITCHES = ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE")


def nccl_settings(gpus: Iterable[str], environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that GPUs of these names need, less those that ``environ`` sets already.

    GeForce RTX 40 cards have no peer-to-peer transfers, and NCCL hangs when it tries them (NVIDIA/nccl-tests#117).
    """
    if not any("RTX 40" in name for name in gpus):
        return {}
    return {name: "1" for name in SWITCHES if name not in environ}
