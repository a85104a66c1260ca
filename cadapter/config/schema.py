"""Every key of a config: type, default, bounds and meaning. What a key may hold is decided here and nowhere else."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from cadapter.classes import CLASS_NAMES
from cadapter.config.layers import parse_ranges
from cadapter.config.rules import conflicts
from cadapter.errors import UsageError


@dataclass(frozen=True)
class Expects:
    """What a key accepts, in words that complete "give …"."""

    text: str


WRONG = "wrong"
"""The type of our own errors among pydantic's."""


def _wrong(text: str) -> PydanticCustomError:
    """An error whose message is ``text``: of a ValueError pydantic would say "Value error, text"."""
    return PydanticCustomError(WRONG, "{text}", {"text": text})


def _check_class(value: int) -> int:
    if value not in CLASS_NAMES:
        raise _wrong("no such class; give 1 (enhance), -1 (suppress) or 0 (neutral)")
    return value


def _check_layers(value: str) -> str:
    try:
        parse_ranges(value)
    except UsageError as error:
        raise _wrong(str(error)) from None
    return value


def _check_partition_method(value: str) -> str:
    if value.startswith("type:"):
        try:
            re.compile(value.removeprefix("type:"))
        except re.error as error:
            raise _wrong(f"no regular expression ({error}); correct what follows type:") from None
    elif value not in ("estimated_size", "uniform", "parameters"):
        raise _wrong('no such method; give "estimated_size", "uniform", "parameters" or "type:REGEX"')
    return value


def _check_any(value: tuple[DatasetConfig, ...]) -> tuple[DatasetConfig, ...]:
    if not value:
        raise _wrong("no data to train on; give at least one [[datasets]] table")
    return value


Text = Annotated[str, Field(min_length=1), Expects("a string that is not empty")]
Place = Annotated[Text, AfterValidator(os.path.expanduser)]
"""A path, in which ~ is the user's home directory."""
Count = Annotated[int, Field(ge=1), Expects("an integer of at least 1")]
CountOrZero = Annotated[int, Field(ge=0), Expects("an integer of at least 0")]
Positive = Annotated[float, Field(gt=0), Expects("a number above 0")]
NotNegative = Annotated[float, Field(ge=0), Expects("a number of at least 0")]
Fraction = Annotated[float, Field(ge=0, lt=1), Expects("a number from 0 to below 1")]
TokenId = Annotated[int, Field(ge=0)]
TextOrTokens = Annotated[
    str | TokenId | list[TokenId] | None, Expects("a string, a token id or a list of token ids ([] for none)")
]

Overlength = Literal["split", "truncate", "drop", "error"]


class Table(BaseModel):
    """A table of the config: immutable, no unknown keys, and no type is taken for another."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class DatasetConfig(Table):
    """One `[[datasets]]` table: files of one kind and the class they are trained as."""

    dataset_path: Place = Field(description="A file, or a glob that names several: .txt, .json, .jsonl, .parquet.")
    control_class: Annotated[int, AfterValidator(_check_class), Expects("1, -1 or 0")] = Field(
        default=1,
        description="1: enhance these texts, -1: suppress them, 0: leave them as they are.",
        json_schema_extra={"enum": [1, -1, 0]},
    )
    text_field: Text = Field(default="text", description="The field of a record that holds its text.")
    messages_field: Text | None = Field(
        default=None,
        description="The field of a record that holds a chat, rendered with the tokenizer's chat template.",
    )
    class_field: Text | None = Field(
        default=None, description="The field of a record that holds its own control class: 1, -1 or 0."
    )
    chosen_field: Text | None = Field(
        default=None, description="The field that holds the text or chat to enhance; goes with rejected_field."
    )
    rejected_field: Text | None = Field(
        default=None, description="The field that holds the text or chat to suppress; goes with chosen_field."
    )
    overlength: Overlength | None = Field(
        default=None, description="What becomes of a record longer than a sequence; default: that of the config."
    )
    max_sequences: Count | None = Field(
        default=None, description="At most this many sequences; default: that of the config."
    )
    max_tokens: Count | None = Field(default=None, description="At most this many tokens.")
    drop_tails: bool | None = Field(
        default=None,
        description="Drop what is left of a document cut by its last full sequence; default: that of the config.",
    )


class ClassWeights(Table):
    """The weight of each class's tokens in the loss."""

    positive: NotNegative = Field(default=1.0, description="Weight of the tokens of class 1.")
    negative: NotNegative = Field(default=1.0, description="Weight of the tokens of class -1.")
    neutral: NotNegative = Field(default=1.0, description="Weight of the tokens of class 0.")


class Config(Table):
    """A run: the model, what is trained, on which texts and how."""

    model_dir: Place = Field(description="The base model: a local directory, or a hub id when the hub can be reached.")
    output_dir: Place = Field(description="The run's directory.")
    seed: Annotated[int, Field(ge=0, lt=2**32), Expects("an integer from 0 to 4294967295")] = Field(
        default=42, description="Decides data order, the split and initial values."
    )

    full_fine_tune: bool = Field(
        default=False, description="Train the model's own weights, in `dtype`; there is no weight decay."
    )
    use_control_adapters: bool = Field(
        default=False, description="Train Control Adapters; with neither this nor full_fine_tune: LoRA."
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="Type of the base model's weights and of fully fine-tuned weights."
    )
    init_from: Place | None = Field(
        default=None, description="An adapter directory whose weights start this run, with a fresh optimiser."
    )
    load_in_4bit: bool = Field(
        default=False, description="Hold the blocks of the base model in bitsandbytes nf4 (QLoRA, Control Adapters)."
    )

    lora_rank: Count = Field(default=16, description="Rank r of the adapters.")
    lora_alpha: Positive | None = Field(
        default=None, description="The scale is lora_alpha / lora_rank; default: sqrt(rank)."
    )
    lora_dropout: Fraction = Field(default=0.0, description="Share of the adapters' input that is dropped in training.")
    lora_weight_decay: NotNegative = Field(
        default=0.0, description="λ of the composite weight decay λ·½‖W‖_F²; what counts is lr·λ, around 1e-2."
    )
    lora_weight_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description='Type of the adapters\' weights; "bfloat16" saves memory and turns decay off.'
    )
    target_modules: Annotated[list[Text] | None, Expects("a list of module names")] = Field(
        default=None,
        description="The modules that are trained, by their names or ends of these; "
        "default: LoRA every linear layer, full fine-tuning everything.",
    )
    layers_to_transform: Annotated[
        Annotated[str, AfterValidator(_check_layers)] | None, Expects('a string such as "16:31" or "0:10,20:25,30"')
    ] = Field(
        default=None, description='Adapted layers: "16:31", "0:10,20:25,30"; inclusive, first layer 0; default: all.'
    )

    control_class0_lambda: NotNegative = Field(default=0.0, description="Weight λ₀ of the neutral examples' loss.")
    control_inverse: Literal["exact", "neumann"] = Field(
        default="exact", description='How class -1 inverts I + W: "exact", or a truncated Neumann series.'
    )
    control_neumann_order: Count = Field(default=2, description='Order of the series with control_inverse = "neumann".')
    control_form: Literal["general", "symmetric"] = Field(
        default="general", description='"general", W = s·B·A, or "symmetric", W = Q·diag(exp(S) - 1)·Qᵀ.'
    )
    control_gamma: Annotated[float, Field(gt=0, le=0.5), Expects("a number above 0, at most 0.5")] = Field(
        default=0.5, description="Symmetric form: the step γ of the orthonormalisation."
    )
    control_site: Literal["block", "mlp", "writes"] = Field(
        default="block",
        description="Acts on the whole block's output, the MLP's, or the attention's and the MLP's each.",
    )

    lr: Positive = Field(description="Learning rate.")
    beta1: Fraction = Field(default=0.9, description="Adam's β1.")
    beta2: Fraction = Field(default=0.99, description="Adam's β2.")
    eps: Positive = Field(default=1e-6, description="Adam's ε.")
    lr_schedule: Literal["rms_ratio", "constant", "linear", "cosine"] = Field(
        default="rms_ratio", description='How lr changes; "rms_ratio": lr·sqrt((1-β2^t)/(1+β2^t)), t from 1.'
    )
    warmup_steps: CountOrZero = Field(default=0, description="Steps over which lr rises linearly.")
    gradient_clipping: NotNegative = Field(
        default=1.0, description="Limit of the gradient norm over all stages; 0: none."
    )
    gradient_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Type in which gradients of full fine-tuning accumulate."
    )
    class_weights: Annotated[ClassWeights, Expects("a table such as { positive = 1.0, negative = 0.5 }")] = Field(
        default=ClassWeights(), description="Weight of each class's tokens in the loss."
    )

    epochs: Count = Field(default=1, description="How often the data is gone through.")
    max_steps: Count | None = Field(default=None, description="Stop after this many optimiser steps.")
    sequence_len: Annotated[int, Field(ge=64, multiple_of=64), Expects("a positive multiple of 64")] = Field(
        description="Tokens in a packed sequence."
    )
    micro_batch_size: Count = Field(default=1, description="Sequences in a forward pass.")
    gradient_accumulation_steps: Count = Field(
        default=1, description="Effective batch: micro_batch_size × this × data-parallel ranks."
    )
    eval_gradient_accumulation_steps: Count | None = Field(
        default=None, description="The same for evaluations; default: gradient_accumulation_steps."
    )
    pipeline_stages: Count = Field(
        default=1, description="Stages the model is cut into; divides the number of processes."
    )
    partition_method: Annotated[
        str,
        AfterValidator(_check_partition_method),
        Expects('"estimated_size", "uniform", "parameters" or "type:REGEX"'),
    ] = Field(default="estimated_size", description="How layers are shared out over the stages.")
    use_column_major_topology: bool = Field(
        default=False, description="Pipeline neighbours on the same node, data-parallel across nodes."
    )
    activation_checkpointing: Annotated[
        Literal["auto", "none", "full", "selective", "offload"] | Count,
        Expects('"auto", "none", "full", "selective", "offload" or an integer of at least 1'),
    ] = Field(
        default="auto",
        description="What the backward pass computes again to save memory: nothing, what is cheap for its size "
        '("selective"), every layer ("full"), every layer with their inputs in host memory ("offload"), or every Nth '
        'layer; "auto": the fastest that fits the GPU.',
    )
    attn_implementation: Literal[
        "auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"
    ] = Field(
        default="auto",
        description='Which attention of transformers; "auto": sdpa, or what the family needs. Of sdpa\'s kernels, and '
        "on a GPU for isolated documents flex_attention, the fastest is found by trying each.",
    )
    document_attention: Literal["packed", "isolated"] = Field(
        default="packed", description='"isolated": tokens see only their own document.'
    )
    compile: Annotated[Literal["auto"] | bool, Expects('"auto", true or false')] = Field(
        default="auto", description='torch.compile of the decoder layers and the loss; "auto": on GPUs.'
    )

    eval_fraction: Fraction = Field(
        default=0.01, description="Share of each dataset's documents held out for evaluation; 0: no evaluation."
    )
    evals_per_run: Count = Field(
        default=11,
        description="One before the first step, one after the last, the rest evenly spaced; 1: only after the last.",
    )
    early_stopping_patience: Count | None = Field(
        default=None,
        description="Stop after so many evaluations in a row whose loss is not the lowest so far; default: never.",
    )
    sample_prompts: Annotated[list[Text], Expects("a list of strings that are not empty")] = Field(
        default=[],
        description="At every evaluation each is continued at strengths -1, 0 and +1 (LoRA and full fine-tuning: as "
        "trained).",
    )
    sample_max_new_tokens: Count = Field(default=64, description="Length of these continuations, at most.")
    sample_temperature: NotNegative = Field(
        default=0.0, description="Logits are divided by it; 0 takes the most probable token each time."
    )
    sample_chat: bool | None = Field(
        default=None,
        description="Whether a prompt is a user's turn, rendered with the chat template; default: where a dataset has "
        "messages_field.",
    )
    max_skipped_steps: CountOrZero = Field(
        default=10,
        description="A step whose gradient is not finite is skipped; after more than so many the run ends.",
    )
    checkpoint_interval_hours: Positive = Field(default=1.0, description="Hours between checkpoints.")
    checkpoint_interval_steps: Count | None = Field(
        default=None, description="Steps between checkpoints, besides time."
    )
    max_checkpoints: Count = Field(default=3, description="How many checkpoints are kept.")

    cache_dir: Place | None = Field(
        default=None, description="Where prepared data is kept; default: beside the first dataset."
    )
    sequence_prefix: TextOrTokens = Field(
        default=None, description="Begins each sequence; default: the tokenizer's BOS if it has one."
    )
    document_prefix: TextOrTokens = Field(
        default=None,
        description='Begins each document; default: nothing; with document_attention = "isolated": sequence_prefix.',
    )
    document_suffix: TextOrTokens = Field(
        default=None, description="Ends each document; default: the tokenizer's EOS if it has one."
    )
    mask_tokens: Annotated[
        bool | TokenId | list[TokenId] | None, Expects("true, false, a token id or a list of token ids")
    ] = Field(default=None, description="Tokens that are not trained; true: all special tokens.")
    mix_datasets: bool = Field(default=False, description="May a sequence hold documents of several datasets?")
    drop_tails: bool = Field(
        default=False,
        description="Drop what is left of a document cut by its last full sequence; default of every dataset.",
    )
    max_sequences: Count | None = Field(default=None, description="At most this many sequences of each dataset.")
    overlength: Overlength | None = Field(
        default=None,
        description='What becomes of a record longer than a sequence; all but "split" keep records whole; '
        'default: "split" for plain text, "drop" for chats and pairs.',
    )
    trust_remote_code: bool = Field(
        default=False,
        description="Run Python code that the model's directory brings, where it is needed: it can do all you can.",
    )
    datasets: Annotated[
        tuple[DatasetConfig, ...],
        Field(strict=False),
        AfterValidator(_check_any),
        Expects("at least one [[datasets]] table"),
    ] = Field(description="The texts, one table for each kind.")

    @property
    def has_chats(self) -> bool:
        """Whether texts are chats, as far as the config says."""
        return any(dataset.messages_field is not None for dataset in self.datasets)

    @property
    def alpha(self) -> float:
        """lora_alpha, or its default sqrt(rank); the adapters' scale is s = alpha / rank. Symmetric: rank, no scale."""
        if self.use_control_adapters and self.control_form == "symmetric":
            return float(self.lora_rank)
        return math.sqrt(self.lora_rank) if self.lora_alpha is None else self.lora_alpha

    @model_validator(mode="after")
    def _no_conflicts(self) -> Config:
        found = conflicts(self)
        if found:
            raise _wrong("\n".join(f"{problem.key}: {problem.text}" for problem in found))
        return self
