"""A picture of an adapter's norms: what `inspect-norms --plot` writes."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

from cadapter.algebra import Health

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INCHES = (12.0, 4.8)
DOTS_PER_INCH = 120
SMALLEST_SHOWN = 1e-6
"""Singular values are drawn down to this part of the largest: what is below is rounding."""

SERIES = (
    ("‖W‖_F", "frobenius", "o-"),
    ("‖W‖₂", "spectral", "s-"),
    ("ρ(W)", "radius", "^-"),
    ("σ_min(I + W)", "sigma_min", "v--"),
)


def norms_picture(title: str, measured: Mapping[int, Health]) -> bytes:
    """A PNG: norms by layer on the left, the singular values of every layer's W on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    by_layer, spectra = figure.subplots(1, 2)
    figure.suptitle(title)
    layers = list(measured)
    for label, name, style in SERIES:
        by_layer.plot(layers, [getattr(found, name) for found in measured.values()], style, label=label, markersize=4)
    by_layer.set(xlabel="layer", title="norms")
    by_layer.set_ylim(bottom=0)
    by_layer.xaxis.get_major_locator().set_params(integer=True)
    by_layer.grid(alpha=0.3)
    by_layer.legend()
    _draw_spectra(figure, spectra, measured)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _draw_spectra(figure: Figure, axes: Axes, measured: Mapping[int, Health]) -> None:
    """One line of singular values a layer, coloured by its depth."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    largest = max(found.spectral for found in measured.values())
    depth, colours = Normalize(min(measured), max(measured)), colormaps["viridis"]
    for layer, found in measured.items():
        shown = [value for value in found.singular_values if value > SMALLEST_SHOWN * largest]
        axes.plot(range(1, len(shown) + 1), shown, ".-", color=colours(float(depth(layer))), linewidth=1)
    axes.set(xlabel="index", title="singular values of W")
    if largest > 0:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    figure.colorbar(ScalarMappable(depth, colours), ax=axes, label="layer")
