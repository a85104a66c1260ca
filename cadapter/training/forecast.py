"""What a run will be, from its config alone: no weight is read, nothing is written, and no GPU is needed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cadapter.config import Config
from cadapter.errors import UsageError
from cadapter.models.checkpoint import resolve_model
from cadapter.models.isolation import check_isolation
from cadapter.models.layers import CarrierFormat
from cadapter.models.loading import DTYPES, CausalLM
from cadapter.models.outline import CONFIG_FILES, open_weightless
from cadapter.planning.memory import RunSizes
from cadapter.training.build import carrier_of, compiles_on
from cadapter.training.modes import mode_of
from cadapter.training.modes.base import Mode
from cadapter.training.sizes import sizes_of

NOWHERE = torch.device("meta")
"""Where the model of a forecast lies."""


@dataclass(frozen=True)
class Outlook:
    """A run as its config describes it, on GPUs: the model without its weights, what is trained, and its sizes."""

    config: Config
    model: CausalLM
    mode: Mode
    sizes: RunSizes


def outlook_of(config: Config, has_neutral: bool | None = None) -> Outlook:
    """Work out the sizes of the run that ``config`` describes, for GPUs.

    Args:
        has_neutral: whether there are texts of class 0; None: as the datasets' own class says.

    Raises:
        UsageError: model and config do not go together.
    """
    if has_neutral is None:
        has_neutral = any(dataset.control_class == 0 or dataset.class_field for dataset in config.datasets)
    attention = None if config.attn_implementation == "auto" else config.attn_implementation
    checkpoint = open_weightless(resolve_model(config.model_dir, CONFIG_FILES))
    model = CausalLM(checkpoint, DTYPES[config.dtype], NOWHERE, attention, config.load_in_4bit)
    if config.document_attention == "isolated":
        check_isolation(model)
    mode = mode_of(config, model)
    carrier: CarrierFormat = carrier_of(config, mode, has_neutral)
    return Outlook(config, model, mode, sizes_of(config, model, mode, carrier, compiles_on("cuda", config, model)))
