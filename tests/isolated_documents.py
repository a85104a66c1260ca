"""Rows of several documents each, as isolated attention gets them: positions begin again with every document.

Run by several processes that have joined a job (:func:`main`), they go through a real pipeline.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from cadapter.models.layers import CarrierFormat
from cadapter.training.distributed import World
from cadapter.training.engine import Pipeline
from cadapter.training.layout import Layout, stage_bounds
from cadapter.training.losses import LossSettings
from cadapter.training.modes.control import adapters_of
from tests.models.parity_worker import RecordedLoss
from tests.tiny_models import VOCAB
from tests.tiny_pipeline import SETTINGS, builder, random_classes, random_tokens, randomise

TOKENS = 40
CUTS = ((0, 13, 29, 36), (0, 22, 36), (0, 11, 36))
"""Where the documents of each row begin; the last is padding. Most are longer than the models' windows."""
CARRIER = CarrierFormat(penalty=True, positions=True)


def positions() -> Tensor:
    """[B, T]."""
    stops = [[*row[1:], TOKENS] for row in CUTS]
    return torch.stack(
        [
            torch.cat([torch.arange(b - a) for a, b in zip(row, end, strict=True)])
            for row, end in zip(CUTS, stops, strict=True)
        ]
    )


def documents() -> list[tuple[int, int, int]]:
    """(row, begin, stop) of each document but the padding."""
    return [(row, a, b) for row, cuts in enumerate(CUTS) for a, b in pairwise(cuts)]


def rows(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids, padding as zeros, and classes, [B, T] each."""
    ids, classes = random_tokens(len(CUTS), TOKENS, VOCAB, seed), random_classes(len(CUTS), TOKENS, seed + 1)
    for row, cuts in enumerate(CUTS):
        ids[row, cuts[-1] :] = 0
        classes[row, cuts[-1] :] = 2
    return ids, classes


def with_others_changed(kept: int) -> tuple[Tensor, Tensor]:
    """:func:`rows`, but in each row every document except number ``kept`` has other tokens and classes."""
    (ids, classes), (others, other_classes) = rows(), rows(seed=7)
    for row, begin, stop in documents():
        if begin != CUTS[row][kept]:
            ids[row, begin:stop], classes[row, begin:stop] = others[row, begin:stop], other_classes[row, begin:stop]
    return ids, classes


def main(world: World, directories: list[str], output: str) -> None:
    """Save the logits that a pipeline of as many stages as there are processes gives, for each model in turn."""
    layout = Layout.of(world.size, world.size, world.rank)
    for number, directory in enumerate(directories):
        loss = RecordedLoss(LossSettings())
        stages = builder(Path(directory), SETTINGS, carrier=CARRIER, recompute_every=1)
        bounds = stage_bounds("uniform", layout.stages, stages.model.layer_bytes(), stages.mode.trainable())
        batches = [rows(), with_others_changed(0), with_others_changed(1)]
        pipeline = Pipeline(stages.builders(), bounds, layout, loss, len(CUTS), len(batches))
        randomise(adapters_of(pipeline.layers()))
        nothing = torch.zeros(len(CUTS), dtype=torch.int64)
        micro_batches = [
            ((ids, classes, nothing, positions()), (torch.where(classes == 2, -100, ids), torch.ones(2)))
            for ids, classes in batches
        ]
        pipeline.evaluate(micro_batches, len(batches))
        found = loss.take("evaluated")
        pipeline.train(micro_batches)  # several micro-batches are on their way at once, and blocks are computed again
        found |= loss.take("trained")
        for layer in pipeline.layers():
            for name, parameter in layer.named_parameters():
                if parameter.grad is not None:
                    found[f"gradient.{stages_name(layer, name)}"] = parameter.grad.clone()
        save_file(found, Path(output) / f"{world.size}.{number}.{world.rank}.safetensors")


def stages_name(layer: torch.nn.Module, name: str) -> str:
    """The name of a parameter in the whole model."""
    return f"{getattr(layer, 'index', 'end')}.{name}"
