"""An adapter read from disk, put to work at any strength: factors into modules, strengths into transforms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from torch import Tensor

from cadapter.adapters.control import ControlAdapter, ControlSettings, Transform
from cadapter.adapters.directory import ControlAdapterFiles
from cadapter.adapters.factors import FORMS, Factors, named
from cadapter.algebra import neumann_remainder
from cadapter.errors import UsageError


def native_settings(files: ControlAdapterFiles) -> ControlSettings:
    """What modules that apply the adapter must know of it."""
    return ControlSettings(files.rank, files.alpha, files.site, files.form)


def load_factors(adapter: ControlAdapter, files: ControlAdapterFiles) -> None:
    """Copy the factors of ``adapter.layer`` from ``files``, which is of the same form, into ``adapter``."""
    for name, tensor in named(files.layers[adapter.layer]).items():
        adapter.get_parameter(name).data.copy_(tensor)


def factors_of(adapter: ControlAdapter) -> Factors:
    """The factors of ``adapter`` as they are now, on the CPU."""
    kind = FORMS[adapter.settings.form]
    return kind(**{each.name: adapter.get_parameter(f"control_{each.name}").detach().cpu() for each in fields(kind)})


def layer_transform(files: ControlAdapterFiles, layer: int, t: float) -> Tensor | None:
    """Return the T of ``(I + W)^t = I + s·B·T·A`` in float32, as :class:`ControlAdapter` takes it.

    Raises:
        UsageError: this power does not exist for the layer, which is named.
    """
    power = files.layers[layer].power(t, files.scale, f"layer {layer}")
    return None if power is None else power.float()


def strength_tables(files: ControlAdapterFiles, strengths: Sequence[float]) -> dict[int, list[Transform]]:
    """Return the transforms of each layer, code k for the k-th strength; strength 0 needs none.

    Raises:
        UsageError: a strength does not exist for a layer, which is named.
    """
    return {
        layer: [(code, layer_transform(files, layer, t)) for code, t in enumerate(strengths) if t != 0]
        for layer in files.layers
    }


def existing_strengths(files: ControlAdapterFiles, strengths: Sequence[float]) -> tuple[list[float], str | None]:
    """Return those of ``strengths`` that exist for every layer, and what is wrong with the first other one."""
    found, wrong = [], None
    for t in strengths:
        try:
            for layer in files.layers:
                if t != 0:
                    layer_transform(files, layer, t)
            found.append(t)
        except UsageError as error:
            wrong = wrong or str(error)
    return found, wrong


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
