"""An adapter read from disk, put to work at any strength: factors into modules, strengths into [r, r] matrices."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cadapter.adapters.control import ControlAdapter, Transform
from cadapter.adapters.directory import ControlAdapterFiles
from cadapter.algebra import core, neumann_remainder, strength_transform


def load_factors(adapter: ControlAdapter, files: ControlAdapterFiles) -> None:
    """Copy A and B of ``adapter.layer`` from ``files`` into ``adapter``."""
    factors = files.layers[adapter.layer]
    adapter.control_A.data.copy_(factors.A)
    adapter.control_B.data.copy_(factors.B)


def layer_transform(files: ControlAdapterFiles, layer: int, t: float) -> Tensor | None:
    """Return the matrix f_t(M) [r, r] of ``(I + W)^t = I + s·B·f_t(M)·A`` in float32; None is the identity (t = 1).

    Raises:
        UsageError: this power does not exist for the layer, which is named.
    """
    if t == 1:
        return None
    factors = files.layers[layer]
    middle = core(factors.A.double(), factors.B.double(), files.scale)
    return strength_transform(middle, t, f"layer {layer}").float()


def strength_table(files: ControlAdapterFiles, layer: int, strengths: Sequence[float]) -> list[Transform]:
    """Return the [r, r] transforms of one layer, code k for the k-th strength; strength 0 needs none.

    Raises:
        UsageError: a strength does not exist for this layer, which is named.
    """
    return [(code, layer_transform(files, layer, t)) for code, t in enumerate(strengths) if t != 0]


def neumann_note(files: ControlAdapterFiles, strengths: Sequence[float]) -> str | None:
    """Say how far the exact inverse is from what an adapter was trained with; None where there is nothing to say.

    That is where the inverse is not used, and for adapters that were trained with it.
    """
    if files.inverse != "neumann" or all(t >= 0 for t in strengths):
        return None
    order = files.neumann_order
    remainder = max(neumann_remainder(f.A, f.B, files.scale, order) for f in files.layers.values())
    return (
        f"The adapter was trained with the Neumann series of order {order}; negative strengths use the exact inverse, "
        f"from which the series differs by at most {remainder:.2g} (spectral norm)."
    )
