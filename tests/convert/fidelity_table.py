"""How exact each family's conversions are: the table in docs/conversions.md.

    python -m tests.convert.fidelity_table

For every family a tiny random model in float32 and a random adapter with ‖W‖₂ = 0.3 in every layer, at strength 1; the
text is the one that --verify brings along.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from cadapter.adapters.directory import ControlAdapterFiles, control_card, read_control_adapter, write_control_adapter
from cadapter.adapters.factors import LowRank
from cadapter.adapters.layer_facts import describe_layers
from cadapter.convert.add_lora import to_add_lora
from cadapter.convert.fidelity import ChangedCheckpoint, Fidelity, verify
from cadapter.convert.operators import Dial
from cadapter.convert.plan import make_recipe
from cadapter.convert.probe import probe_rows
from cadapter.errors import UsageError
from cadapter.models.checkpoint import Checkpoint
from cadapter.models.families import FAMILIES
from cadapter.models.loading import family_for
from tests.steered_models import TOKENIZED
from tests.tiny_models import LAYERS, save_model
from tests.tiny_tokenizer import make_tokenizer

RANK, SPECTRAL = 4, 0.3
SITES = ("writes", "mlp", "block")
HEADER = (
    "| family | writes: additive LoRA | writes: merged | mlp: merged | block: merged | … of its effect | same top-1 |\n"
    "|---|---|---|---|---|---|---|"
)


def write_adapter(base: Path, directory: Path, site: str) -> Path:
    """A random adapter for every layer of the base."""
    checkpoint, generator = Checkpoint(base), torch.Generator().manual_seed(0)
    hidden, factors, scale = checkpoint.config.hidden_size, {}, RANK**-0.5
    for layer in range(LAYERS):
        A, B = torch.randn(RANK, hidden, generator=generator), torch.randn(hidden, RANK, generator=generator)
        factors[layer] = LowRank(A, B * SPECTRAL / torch.linalg.matrix_norm(scale * B @ A, 2))
    facts = describe_layers(checkpoint, family_for(checkpoint), range(LAYERS))
    files = ControlAdapterFiles(
        directory, RANK, RANK**0.5, factors, site=site, facts=facts, base_model_type=checkpoint.config.model_type
    )
    directory.mkdir()
    write_control_adapter(directory, files, control_card(files))
    return directory


def merged(base: Path, adapter: Path) -> Fidelity:
    """The adapter against what a merge of it computes."""
    recipe = make_recipe(Checkpoint(base), adapter, Dial())
    return verify(
        Checkpoint(base), recipe.adapters, ChangedCheckpoint(Checkpoint(base), recipe.plan), _rows(base), "cpu"
    )


def additive(base: Path, adapter: Path, lora: Path) -> Fidelity | None:
    """The adapter against its additive LoRA; None where peft could not carry it."""
    files = read_control_adapter(adapter)
    try:
        to_add_lora(Checkpoint(base), str(base), files, lora, Dial())
    except UsageError:
        return None
    converted = ChangedCheckpoint(Checkpoint(base), make_recipe(Checkpoint(base), lora, Dial()).plan)
    return verify(Checkpoint(base), [(files, Dial())], converted, _rows(base), "cpu")


def _rows(base: Path) -> list[torch.Tensor]:
    return probe_rows(Checkpoint(base), None)[:2]


def measured(family: str, directory: Path) -> tuple[Fidelity | None, dict[str, Fidelity]]:
    """The additive LoRA at site "writes", and merging at each site."""
    base = directory / "base"
    save_model(family, base, torch.float32, **TOKENIZED)
    make_tokenizer(base)
    adapters = {site: write_adapter(base, directory / site, site) for site in SITES}
    return additive(base, adapters["writes"], directory / "lora"), {
        site: merged(base, adapter) for site, adapter in adapters.items()
    }


def row(family: str, lora: Fidelity | None, sites: dict[str, Fidelity]) -> str:
    """One line of the table: KL a token in nats."""
    block = sites["block"]
    cells = [
        f"`{family}`",
        "by merging only" if lora is None else _shown(lora),
        _shown(sites["writes"]),
        _shown(sites["mlp"]),
        _shown(block),
        "" if block.within_rounding else f"{block.share:.1%}",
        f"{block.top1_agreement:.0%}",
    ]
    return f"| {' | '.join(cells)} |"


def _shown(found: Fidelity) -> str:
    return f"exact ({found.kl_mean:.0e})" if found.within_rounding else f"{found.kl_mean:.1e}"


def main() -> None:
    print(HEADER)
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as directory:
            print(row(family, *measured(family, Path(directory))), flush=True)


if __name__ == "__main__":
    main()
