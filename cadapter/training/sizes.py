"""The sizes of a run, on which its memory, traffic and time depend: from its config, its model and what is trained."""

from __future__ import annotations

from dataclasses import replace

from cadapter.config import Config
from cadapter.models.layers import CarrierFormat
from cadapter.models.loading import FLEX_ATTENTION, NORM_PREFIX, CausalLM
from cadapter.planning.blocks import Block, block_shape
from cadapter.planning.fitting import Situation
from cadapter.planning.memory import RunSizes
from cadapter.training.modes.base import Mode


def weighs_neutral(config: Config) -> bool:
    """Whether texts of class 0 have a loss."""
    return config.control_class0_lambda * config.class_weights.neutral > 0


def carrier_of(config: Config, mode: Mode, has_neutral: bool) -> CarrierFormat:
    """What travels through the pipeline of a run, with or without texts of class 0."""
    return CarrierFormat(
        penalty=mode.name == "control" and weighs_neutral(config) and has_neutral,
        dropout=mode.name != "full" and config.lora_dropout > 0,
        positions=config.document_attention == "isolated",
    )


def compiles_on(device: str, config: Config, model: CausalLM) -> bool:
    """Whether decoder blocks and the loss are compiled on a kind of device, "cuda" or "cpu", wherever the model is."""
    if config.compile != "auto":
        return bool(config.compile)
    # Experts in 4 bits are unpacked by Python code that is no function of tensors.
    return device == "cuda" and not (model.four_bit and model.has_experts)


def sizes_of(config: Config, model: CausalLM, mode: Mode, carrier: CarrierFormat, compiled: bool) -> RunSizes:
    """The sizes of the run that trains ``model`` by ``mode``; no weight is read.

    Args:
        carrier: what travels from stage to stage.
        compiled: whether blocks are compiled.
    """
    embedding, *blocks, head = model.layer_bytes()
    norm = model.dtype.itemsize * model.weights.numbers(NORM_PREFIX)
    trainable = mode.trainable()
    # Where FlexAttention can be had, it is the fastest for isolated documents, and needs no mask.
    by_blocks = config.attn_implementation == "auto" and compiled and model.takes_block_masks
    masked = carrier.positions and not by_blocks and model.attention != FLEX_ATTENTION
    return RunSizes(
        kind=mode.name,
        layer_bytes=(embedding if trainable[0] or model.tied else 0, *blocks, head + norm),
        trainable=tuple(trainable),
        per_number=mode.per_trained,
        blocks=tuple(_block(model, mode, index, carrier, masked) for index in range(model.layer_count)),
        hidden=model.hidden_size,
        vocabulary=head // (model.dtype.itemsize * model.hidden_size),
        number_bytes=model.dtype.itemsize,
        tokens=config.sequence_len,
        rows=config.micro_batch_size,
        accumulation=config.gradient_accumulation_steps,
        compiled=compiled,
        four_bit=model.four_bit,
        tied=model.tied,
        penalty=carrier.penalty,
        dropout=carrier.dropout,
        positions=carrier.positions,
    )


def situation_of(config: Config, mode: Mode, processes: int, kept: str | int) -> Situation:
    """What of a run on so many processes, whose blocks keep this, can be changed for memory's sake."""
    return Situation(
        kind=mode.name,
        checkpointing=kept,
        four_bit=config.load_in_4bit,
        rows=config.micro_batch_size,
        accumulation=config.gradient_accumulation_steps,
        stages=config.pipeline_stages,
        replicas=processes // config.pipeline_stages,
        tokens=config.sequence_len,
        wide_gradients=config.gradient_dtype == "float32" != config.dtype,
        layers=len(mode.trainable()) - 2,  # beside embedding and head
        chosen=tuple(mode.layers),
    )


def _block(model: CausalLM, mode: Mode, index: int, carrier: CarrierFormat, masked: bool) -> Block:
    change = mode.change(index)
    if carrier.penalty:  # the neutral loss has a float32 Δh of its own
        change = replace(change, masked=change.masked + change.deltas)
    shape = block_shape(model.skeleton_block(index), model.config)
    return Block(replace(shape, masked=masked), change)
