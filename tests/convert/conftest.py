"""Tiny random models and control adapters for the conversions' tests."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cadapter.adapters.directory import (
    ControlAdapterFiles,
    control_card,
    read_control_adapter,
    write_control_adapter,
)
from cadapter.adapters.factors import LowRank, Symmetric
from cadapter.adapters.layer_facts import describe_layers
from cadapter.models.attach import SteeredModel, load_causal_lm
from cadapter.models.checkpoint import Checkpoint
from cadapter.models.loading import family_for
from tests.tiny_models import LAYERS, VOCAB, make_model, save_model

CHANGED = {
    "llama-deep": ("llama", {"num_hidden_layers": LAYERS + 1}),
    "llama-narrow": ("llama", {"hidden_size": 16}),
}
"""Models besides those of ``tests/tiny_models.py``: another one's name, and what differs."""


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory):
    """A function that saves the tiny model ``name`` once and returns its directory.

    It is in several shards, experts one by one as on the hub; ``fused``: in one file, experts fused as in memory.
    """
    root = tmp_path_factory.mktemp("models")

    def make(name: str, dtype: torch.dtype = torch.float32, fused: bool = False) -> Path:
        directory = root / f"{name}-{str(dtype).rpartition('.')[2]}{'-fused' * fused}"
        if not directory.exists():
            original, changes = CHANGED.get(name, (name, {}))
            if fused:
                make_model(original, dtype, **changes).save_pretrained(directory, save_original_format=False)
            else:
                save_model(original, directory, dtype, **changes)
        return directory

    return make


@pytest.fixture
def make_adapter(tmp_path):
    """A function that writes a random control adapter for a model directory and returns the adapter's directory."""

    def make(
        base: Path, name: str = "adapter", site: str = "writes", spectral: float = 0.5, rank: int = 4,
        layers: tuple[int, ...] = tuple(range(LAYERS)), seed: int = 0, inverse: str = "exact",
        form: str = "general", **changes,
    ) -> Path:  # fmt: skip
        checkpoint = Checkpoint(base)
        hidden = checkpoint.config.hidden_size
        generator = torch.Generator().manual_seed(seed)
        factors, scale = {}, 1 / math.sqrt(rank)
        for layer in layers:
            A = torch.randn(rank, hidden, generator=generator)
            B = torch.randn(hidden, rank, generator=generator)
            factors[layer] = LowRank(A, B * spectral / torch.linalg.matrix_norm(scale * B @ A, 2))
            if form == "symmetric":  # the largest |e^S − 1| is ``spectral``
                S = torch.linspace(-1, 1, rank) * math.log1p(spectral)
                factors[layer] = Symmetric(torch.linalg.qr(B).Q, S)
        adapter = ControlAdapterFiles(
            path=tmp_path / name,
            rank=rank,
            alpha=rank if form == "symmetric" else math.sqrt(rank),
            layers=factors,
            site=site,
            inverse=inverse,
            base_model_type=checkpoint.config.model_type,
            base_model_name_or_path=str(base),
            facts=describe_layers(checkpoint, family_for(checkpoint), layers),
        )
        for key, value in changes.items():
            setattr(adapter, key, value)
        adapter.path.mkdir()
        write_control_adapter(adapter.path, adapter, control_card(adapter))
        return adapter.path

    return make


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    """Two sequences of token ids, [2, 24]: three windows long."""
    return torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(11))


def logits_of(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the model in ``directory`` as Hugging Face computes them in float32; all of its tensors are found."""
    model, found = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )  # eager: the one that every family has
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    with torch.no_grad():
        return model.eval()(input_ids=tokens, use_cache=False).logits


@pytest.fixture(scope="session")
def logits():
    """The function :func:`logits_of`."""
    return logits_of


def steered_logits(base: Path, adapter: Path, tokens: torch.Tensor, strengths: list[float]) -> list[torch.Tensor]:
    """Logits of the model in ``base`` in float32, with the adapter applied natively at each of ``strengths``."""
    model = load_causal_lm(Checkpoint(base), torch.float32, "cpu")
    steered, found = SteeredModel(model, read_control_adapter(adapter)), []
    for strength in strengths:
        steered.set_strength(strength)
        with torch.no_grad():
            found.append(model(input_ids=tokens, use_cache=False).logits)
    return found


@pytest.fixture(scope="session")
def native_logits():
    """The function :func:`steered_logits`."""
    return steered_logits
