"""A model without its weights: the names and shapes of its tensors from its config alone."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from cadapter.errors import UsageError
from cadapter.models.checkpoint import INDEX_NAME, Checkpoint, TensorInfo, load_model_config
from cadapter.models.loading import HEAD, make_skeleton

CONFIG_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
"""What is downloaded of a model on the hub of which no weight is wanted."""


class Outline(Checkpoint):
    """Stands in for the weights of the model in ``directory``, of which only config.json needs to be there.

    Where there is an index of shards, it says whether the head has a weight of its own.

    Raises:
        UsageError: there is no usable config.
    """

    def __init__(self, directory: Path, trust_remote_code: bool = False) -> None:
        self.directory = directory
        self.trust_remote_code = trust_remote_code
        self.config = load_model_config(directory, trust_remote_code)
        self.bytes_read = 0
        self.seconds_reading = 0.0
        self._reader = None
        try:
            skeleton = make_skeleton(self.config, torch.float32)
        except UsageError as error:
            raise UsageError(f"{directory / 'config.json'}: {error}") from error
        shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
        if self.config.tie_word_embeddings and HEAD not in _indexed(directory):
            shapes.pop(HEAD, None)
        self._info = {name: TensorInfo("", shape, "F32") for name, shape in shapes.items()}


def _indexed(directory: Path) -> set[str]:
    """The names in the index of ``directory``'s shards, which need not be there."""
    try:
        return set(json.loads((directory / INDEX_NAME).read_text("utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def open_weightless(directory: Path, trust_remote_code: bool = False) -> Checkpoint:
    """The headers of the weights in ``directory`` where they are there, else what its config says of them.

    Raises:
        UsageError: there is no usable config, or there are weights that cannot be used.
    """
    kind = Checkpoint if any(directory.glob("*.safetensors")) else Outline
    return kind(directory, trust_remote_code)
