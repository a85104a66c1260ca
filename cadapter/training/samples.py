"""Prompts continued by the model as it is trained just now, through the pipeline.

A row of a micro-batch is one prompt at one strength, with what has been written after it so far. One pass through the
pipeline gives each row its next token, which the last stage chooses and all processes are told. Whole texts go through
each time: there is no cache of keys and values in a pipeline that is built for training.

Nothing here draws from a generator that training could draw from. A token's chance is a function of the seed, the
prompt and the token's place, so that all strengths, all evaluations and all layouts draw alike.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cadapter.adapters.control import ControlAdapter, ControlledBlock
from cadapter.adapters.strengths import factors_of
from cadapter.classes import NEGATIVE, NEUTRAL, POSITIVE
from cadapter.config import Config
from cadapter.data import load_tokenizer
from cadapter.errors import UsageError
from cadapter.models.generation import encode_prompt, end_tokens_of
from cadapter.models.layers import DecoderLayer, HeadInputs
from cadapter.models.loading import CausalLM
from cadapter.models.loss import logits_of
from cadapter.training.distributed import World, sum_over_world
from cadapter.training.engine import Pipeline, PipelineBatch
from cadapter.training.layout import Layout

LENGTH_STEP = 64
"""Texts are padded to a multiple of this many tokens, so that few different shapes run."""
FILLER = -1
"""Instead of a row's number: nothing is written in this row of a micro-batch."""


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
        max_new_tokens, temperature, seed: as in :class:`cadapter.models.generation.Sampling`.
        ends: the tokens that end a text.
        tokenizer: writes token ids as text.
    """

    prompts: list[str]
    ids: list[list[int]]
    strengths: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    seed: int
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
    return SamplePlan(
        list(config.sample_prompts), ids, strengths, config.sample_max_new_tokens, config.sample_temperature,
        config.seed, frozenset(end_tokens_of(model.checkpoint.directory, model.config, tokenizer)), tokenizer,
    )  # fmt: skip


@dataclass
class _Row:
    """A text that is being written."""

    prompt: int
    strength: int
    ids: list[int]
    done: bool = False


class Sampler:
    """Writes the samples of a run; every process has one and calls it together with the others.

    Args:
        plan: what to write.
        tokens_at_once: about so many tokens go through the pipeline together.
    """

    def __init__(self, plan: SamplePlan, pipeline: Pipeline, layout: Layout, world: World, tokens_at_once: int) -> None:
        self.plan = plan
        self._pipeline = pipeline
        self._layout = layout
        self._world = world
        self._tokens_at_once = tokens_at_once

    def samples(self) -> tuple[list[Sample], str | None]:
        """Write all samples; they are the same on every process. Beside them: why one strength is missing, if it is."""
        with self._inverse() as trouble:
            strengths = [each for each in self.plan.strengths if not (trouble and each == NEGATIVE)]
            rows = [
                _Row(number, strength, list(ids)) for number, ids in enumerate(self.plan.ids) for strength in strengths
            ]
            for place in range(self.plan.max_new_tokens):
                if not self._write_token(rows, place):
                    break
        found = []
        for row in rows:
            new = row.ids[len(self.plan.ids[row.prompt]) :]
            text = self.plan.tokenizer.decode(new, skip_special_tokens=True)
            found.append(Sample(self.plan.prompts[row.prompt], row.strength, text))
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

    def _write_token(self, rows: Sequence[_Row], place: int) -> bool:
        """Write one more token in each row that has not ended; whether any goes on."""
        going = [number for number, row in enumerate(rows) if not row.done]
        if not going:
            return False
        longest = max(len(rows[number].ids) for number in going)
        length = -(-longest // LENGTH_STEP) * LENGTH_STEP
        chosen = torch.zeros(len(rows), dtype=torch.int64, device=self._world.device)

        def choose(outputs: HeadInputs, targets: tuple[Tensor, ...]) -> Tensor:
            numbers, ends = targets
            last = outputs.hidden[torch.arange(len(ends), device=ends.device), ends]
            logits = logits_of(last, outputs.weights[0], outputs.logits)
            for k, number in enumerate(numbers.tolist()):
                if number != FILLER:
                    chosen[number] = self._choose(logits[k], rows[number].prompt, place)
            return logits.new_zeros(())

        batches = self._micro_batches(rows, going, length)
        self._pipeline.evaluate(batches, len(batches), choose)
        for number, token in enumerate(sum_over_world(chosen).tolist()):
            if not rows[number].done:
                rows[number].ids.append(token)
                rows[number].done = token in self.plan.ends
        return True

    def _micro_batches(self, rows: Sequence[_Row], going: list[int], length: int) -> list[PipelineBatch]:
        """The rows that this replica computes, in micro-batches of one shape, as many as on every other replica."""
        own = -(-len(going) // self._layout.replicas)
        size = min(own, max(1, self._tokens_at_once // length))
        count = -(-own // size)
        filled = going + [FILLER] * (self._layout.replicas * count * size - len(going))
        shares = [filled[k :: self._layout.replicas] for k in range(self._layout.replicas)]
        share = shares[self._layout.replica]
        return [_micro_batch(rows, share[k * size : (k + 1) * size], length) for k in range(count)]

    def _choose(self, logits: Tensor, prompt: int, place: int) -> int:
        """The next token: the most probable one, or one drawn for this prompt and place."""
        if self.plan.temperature == 0:
            return int(logits.argmax())
        digest = hashlib.sha256(f"{self.plan.seed}/{prompt}/{place}".encode()).digest()
        chance = int.from_bytes(digest[:7], "big") / 2**56
        steps = torch.softmax(logits.double().cpu() / self.plan.temperature, dim=0).cumsum(0)
        return min(int(torch.searchsorted(steps, chance * steps[-1], right=True)), len(steps) - 1)


def _micro_batch(rows: Sequence[_Row], numbers: Sequence[int], length: int) -> PipelineBatch:
    """Rows ``numbers`` as the pipeline takes them: padded behind, each position of the class of its strength."""
    ids = torch.zeros(len(numbers), length, dtype=torch.int64)
    codes = torch.zeros(len(numbers), length, dtype=torch.int8)
    ends = torch.zeros(len(numbers), dtype=torch.int64)
    for k, number in enumerate(numbers):
        if number != FILLER:
            row = rows[number]
            ids[k, : len(row.ids)] = torch.tensor(row.ids)
            codes[k] = row.strength
            ends[k] = len(row.ids) - 1
    positions = torch.arange(length).expand(len(numbers), length).contiguous()
    no_dropout = torch.zeros(len(numbers), dtype=torch.int64)
    return (ids, codes, no_dropout, positions), (torch.tensor(list(numbers)), ends)
