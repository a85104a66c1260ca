"""Prompts continued by the model as it is trained just now, through the pipeline.

They leave no trace in what is trained: see :mod:`cadapter.training.writing`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from cadapter.adapters.control import ControlAdapter, ControlledBlock
from cadapter.adapters.strengths import factors_of
from cadapter.classes import NEGATIVE, NEUTRAL, POSITIVE
from cadapter.config import Config
from cadapter.data import load_tokenizer
from cadapter.errors import UsageError
from cadapter.models.generation import encode_prompt, end_tokens_of
from cadapter.models.layers import DecoderLayer
from cadapter.models.loading import CausalLM
from cadapter.training.distributed import World, sum_over_world
from cadapter.training.engine import Pipeline
from cadapter.training.layout import Layout
from cadapter.training.writing import Drawing, Text, Writer


@dataclass(frozen=True)
class Sample:
    """What was written after ``prompt`` at strength −1, 0 or +1."""

    prompt: str
    strength: int
    text: str


@dataclass(frozen=True)
class SamplePlan:
    """What is to be written, known before any weight is read.

    Attributes:
        prompts: as the user wrote them.
        ids: their token ids.
        strengths: each prompt is continued at each of these.
        drawing: how.
        ends: the tokens that end a text.
        tokenizer: writes token ids as text.
    """

    prompts: list[str]
    ids: list[list[int]]
    strengths: tuple[int, ...]
    drawing: Drawing
    ends: frozenset[int]
    tokenizer: Any = field(repr=False)


def plan_samples(config: Config, model: CausalLM) -> SamplePlan | None:
    """Read the prompts of a config; None where it has none.

    Raises:
        UsageError: a prompt has no tokens, or is too long, or the tokenizer has no chat template.
    """
    if not config.sample_prompts:
        return None
    tokenizer = load_tokenizer(config).fast
    chat = config.has_chats if config.sample_chat is None else config.sample_chat
    ids = [encode_prompt(tokenizer, prompt, chat)[0].tolist() for prompt in config.sample_prompts]
    for number, each in enumerate(ids):
        if len(each) + config.sample_max_new_tokens > config.sequence_len:
            raise UsageError(
                f"sample_prompts.{number}: its {len(each)} tokens and the {config.sample_max_new_tokens} of "
                f"sample_max_new_tokens do not fit into sequence_len = {config.sequence_len}.\n"
                "Shorten the prompt, or set a smaller sample_max_new_tokens."
            )
    strengths = (NEGATIVE, NEUTRAL, POSITIVE) if config.use_control_adapters else (POSITIVE,)
    drawing = Drawing(config.sample_max_new_tokens, config.sample_temperature, config.seed)
    ends = frozenset(end_tokens_of(model.checkpoint.directory, model.config, tokenizer))
    return SamplePlan(list(config.sample_prompts), ids, strengths, drawing, ends, tokenizer)


class Sampler:
    """Writes the samples of a run; every process has one and calls it together with the others.

    Args:
        plan: what to write.
        tokens_at_once: about so many tokens go through the pipeline together.
    """

    def __init__(self, plan: SamplePlan, pipeline: Pipeline, layout: Layout, world: World, tokens_at_once: int) -> None:
        self.plan = plan
        self._pipeline = pipeline
        self._world = world
        self._writer = Writer(pipeline, layout, world, tokens_at_once)

    def samples(self) -> tuple[list[Sample], str | None]:
        """Write all samples; they are the same on every process. Beside them: why one strength is missing, if it is."""
        plan = self.plan
        with self._inverse() as trouble:
            strengths = [each for each in plan.strengths if not (trouble and each == NEGATIVE)]
            texts = [
                Text(number, strength, ids, plan.ends) for number, ids in enumerate(plan.ids) for strength in strengths
            ]
            self._writer.write(texts, plan.drawing)
        found = [
            Sample(plan.prompts[each.prompt], each.code, plan.tokenizer.decode(each.written, skip_special_tokens=True))
            for each in texts
        ]
        return found, trouble

    @contextlib.contextmanager
    def _inverse(self) -> Iterator[str | None]:
        """Use the exact inverse for strength −1, as everywhere outside training; say why where there is none."""
        wrapped: list[tuple[DecoderLayer, ControlAdapter]] = [
            (layer, layer.block.adapter)
            for layer in self._pipeline.layers()
            if isinstance(layer, DecoderLayer) and isinstance(layer.block, ControlledBlock)
        ]
        trouble = ""
        try:
            for layer, adapter in wrapped:
                factors, device = factors_of(adapter), next(adapter.parameters()).device
                turned = []
                for t in (POSITIVE, NEGATIVE):
                    power = factors.power(t, adapter.settings.scale, f"layer {layer.index}")
                    turned.append((t, None if power is None else power.float().to(device)))
                layer.set_transforms(turned)
        except UsageError as error:
            trouble = str(error).splitlines()[0]
        missing = sum_over_world(torch.tensor([bool(trouble)], dtype=torch.int64, device=self._world.device))
        try:
            yield (trouble or "an inverse of another stage does not exist") if int(missing) else None
        finally:
            for layer, _ in wrapped:
                layer.set_transforms(None)
