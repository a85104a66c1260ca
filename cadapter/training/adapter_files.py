"""Writing the adapter of a run as a directory of its own: after epochs, as the best, at the end, in checkpoints."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from cadapter.adapters.control import ControlAdapter, ControlSettings
from cadapter.adapters.directory import (
    ControlAdapterFiles,
    LayerFacts,
    LowRank,
    control_card,
    read_control_adapter,
    write_control_adapter,
)
from cadapter.errors import UsageError
from cadapter.files import new_directory


class AdapterWriter:
    """Writes adapter directories of one run.

    Args:
        settings: of the adapters.
        layers: the adapted layers.
        base: the base model as the config names it, and its type.
        facts: what conversions must know of each layer.
    """

    def __init__(
        self, settings: ControlSettings, layers: list[int], base: tuple[str, str], facts: dict[int, LayerFacts]
    ) -> None:
        self._settings = settings
        self._layers = layers
        self._base = base
        self._facts = facts

    def fill(self, directory: Path, tensors: dict[str, Tensor]) -> None:
        """Write the adapter with these parameters (by name, see ``TrainedControlAdapters``) into ``directory``."""
        factors = {
            layer: LowRank(tensors[f"layers.{layer}.control_A"], tensors[f"layers.{layer}.control_B"])
            for layer in self._layers
        }
        name, model_type = self._base
        adapter = ControlAdapterFiles(
            path=directory,
            rank=self._settings.rank,
            alpha=self._settings.alpha,
            layers=factors,
            site=self._settings.site,
            inverse=self._settings.inverse,
            neumann_order=self._settings.neumann_order,
            base_model_type=model_type,
            base_model_name_or_path=name,
            facts=self._facts,
        )
        write_control_adapter(directory, adapter, control_card(adapter))

    def write(self, target: Path, tensors: dict[str, Tensor]) -> None:
        """Write the adapter as directory ``target``, replacing an earlier one whole."""
        with new_directory(target, force=True) as temporary:
            self.fill(temporary, tensors)


def load_into(adapters: list[ControlAdapter], directory: Path) -> None:
    """Take over the factors that ``directory`` holds for these adapters.

    Raises:
        UsageError: a layer is missing or has another rank or hidden size.
    """
    files = read_control_adapter(directory)
    for adapter in adapters:
        factors = files.layers.get(adapter.layer)
        if factors is None or factors.A.shape != adapter.control_A.shape:
            raise UsageError(f"{directory} does not hold layer {adapter.layer} at this run's rank and hidden size.")
        adapter.control_A.data.copy_(factors.A)
        adapter.control_B.data.copy_(factors.B)
