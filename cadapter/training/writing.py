"""Texts continued through the pipeline, many at once, each at a strength of its own.

A row of a micro-batch is one text with what has been written after it so far. One pass through the pipeline gives each
row its next token, which the last stage chooses and all processes are told. Where blocks keep the keys and values of
earlier tokens, only the last token of each text goes through; else whole texts do, each time.

Nothing here draws from a generator that training could draw from. A token's chance is a function of the seed, the
prompt and the token's place, so that all strengths, all evaluations and all layouts draw alike.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import torch
from torch import Tensor

from cadapter.models.cached import CachedFrame
from cadapter.models.layers import DecoderLayer, HeadInputs
from cadapter.models.loss import logits_of
from cadapter.training.distributed import World, sum_over_world
from cadapter.training.engine import Pipeline, PipelineBatch
from cadapter.training.layout import Layout

LENGTH_STEP = 64
"""Texts are padded to a multiple of this many tokens, so that few different shapes run."""
CACHED_TOKENS = 8192
"""Texts that are written together, with their keys and values kept, have about so many tokens in all."""
FILLER = -1
"""Instead of a text's number: nothing is written in this row of a micro-batch."""


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn.

    Attributes:
        max_new_tokens: at most so many; the model may end sooner.
        temperature: logits are divided by it; 0 always takes the most probable token.
        seed: of the random numbers.
    """

    max_new_tokens: int
    temperature: float
    seed: int


@dataclass
class Text:
    """A text that is being written.

    Attributes:
        prompt: its prompt's number: texts with the same draw alike.
        code: what the rows' codes are in every position, which says at what strength it is written.
        ids: the prompt's token ids.
        ends: the tokens that end it.
        written: the token ids after the prompt; the one that ended the text included.
        ended: whether the model ended it.
    """

    prompt: int
    code: int
    ids: Sequence[int]
    ends: frozenset[int]
    written: list[int] = field(default_factory=list)
    ended: bool = False

    @property
    def length(self) -> int:
        """How many tokens there are so far."""
        return len(self.ids) + len(self.written)


class Writer:
    """Writes texts; every process has one and calls it together with the others.

    Args:
        tokens_at_once: about so many tokens go through the pipeline together.
        parts: into how many equal parts the pipeline's layers divide the rows of a micro-batch, a text of code k being
            in part k (see :mod:`cadapter.training.paired`); 1: a row's code alone says how it is treated.
        cached: what this stage's blocks are called with while they keep keys and values; then all prompts must have
            the same number of tokens. None: whole texts go through for each token.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        layout: Layout,
        world: World,
        tokens_at_once: int,
        parts: int = 1,
        cached: CachedFrame | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._layout = layout
        self._world = world
        self._tokens_at_once = tokens_at_once
        self._parts = parts
        self._cached = cached

    def write(self, texts: Sequence[Text], drawing: Drawing, advance: Callable[[int], None] = lambda n: None) -> None:
        """Continue each text, which is the same on every process afterwards; ``advance`` is told how many have a token
        more."""
        with self._keeping():
            for group in self._groups(texts, drawing):
                self._write_group(texts, group, drawing, advance)

    @contextlib.contextmanager
    def _keeping(self) -> Iterator[None]:
        """Let this stage's blocks keep keys and values, if they can."""
        layers = [layer for layer in self._pipeline.layers() if self._cached and isinstance(layer, DecoderLayer)]
        before = [layer.frame for layer in layers]
        try:
            for layer in layers:
                layer.frame = self._cached or layer.frame
            yield
        finally:
            for layer, frame in zip(layers, before, strict=True):
                layer.frame = frame
            if self._cached is not None:
                self._cached.clear()

    def _groups(self, texts: Sequence[Text], drawing: Drawing) -> list[list[int]]:
        """The numbers of the texts that are written together."""
        everything = range(len(texts))
        if self._cached is None:
            return [list(everything)]
        longest = max(text.length for text in texts) + drawing.max_new_tokens
        columns = self._columns(texts, everything)
        count = self._layout.replicas * max(1, CACHED_TOKENS // (longest * self._parts))
        runs = [columns[at : at + count] for at in range(0, len(columns), count)]
        return [[number for column in run for number in column if number != FILLER] for run in runs]

    def _write_group(
        self, texts: Sequence[Text], group: list[int], drawing: Drawing, advance: Callable[[int], None]
    ) -> None:
        if self._cached is not None:
            self._cached.clear()
        for place in range(drawing.max_new_tokens):
            going = [number for number in group if not texts[number].ended]
            if not going:
                break
            # Rows with a cache stay where they are, also those of texts that have ended.
            tokens = self._next_tokens(texts, group if self._cached else going, drawing, place)
            for number in going:
                texts[number].written.append(tokens[number])
                texts[number].ended = tokens[number] in texts[number].ends
            advance(len(going))

    def _next_tokens(self, texts: Sequence[Text], rows: Sequence[int], drawing: Drawing, place: int) -> list[int]:
        """One more token for each of the texts ``rows``, by the number of the text."""
        chosen = torch.zeros(len(texts), dtype=torch.int64, device=self._world.device)

        def choose(outputs: HeadInputs, targets: tuple[Tensor, ...]) -> Tensor:
            numbers, ends = targets
            last = outputs.hidden[torch.arange(len(ends), device=ends.device), ends]
            shares = zip(last.chunk(len(outputs.weights)), outputs.weights, strict=True)
            logits = torch.cat([logits_of(share, weight, outputs.logits) for share, weight in shares])
            prompts = [texts[number].prompt for number in numbers.tolist()]  # a filler's is any
            tokens, is_text = _choose(logits, drawing, prompts, place), numbers != FILLER
            chosen[numbers[is_text]] = tokens[is_text]
            return last.new_zeros((), dtype=torch.float32)

        start = self._cached.tokens if self._cached else 0
        length = max(texts[number].length for number in rows) - start
        if self._cached is None:
            length = -(-length // LENGTH_STEP) * LENGTH_STEP
        batches = self._micro_batches(texts, rows, start, length)
        self._pipeline.evaluate(batches, len(batches), choose)
        if self._cached is not None:
            self._cached.passed(length)
        return sum_over_world(chosen).tolist()

    def _columns(self, texts: Sequence[Text], rows: Iterable[int]) -> list[tuple[int, ...]]:
        """Texts that must share a micro-batch: one of each part."""
        if self._parts == 1:
            return [(number,) for number in rows]
        by_part = [[number for number in rows if texts[number].code == part] for part in range(self._parts)]
        return list(zip_longest(*by_part, fillvalue=FILLER))

    def _micro_batches(
        self, texts: Sequence[Text], rows: Sequence[int], start: int, length: int
    ) -> list[PipelineBatch]:
        """The rows that this replica computes, in micro-batches of one shape, as many as on every other replica."""
        columns = self._columns(texts, rows)
        own = -(-len(columns) // self._layout.replicas)
        size = min(own, max(1, self._tokens_at_once // (length * self._parts)))
        if self._cached is not None:
            size = own  # one micro-batch, to which the cache belongs
        count = -(-own // size)
        nothing = (FILLER,) * self._parts
        columns += [nothing] * (self._layout.replicas * count * size - len(columns))
        share = columns[self._layout.replica :: self._layout.replicas]
        return [_micro_batch(texts, _by_part(share[k * size : (k + 1) * size]), start, length) for k in range(count)]


def _by_part(columns: Iterable[tuple[int, ...]]) -> list[int]:
    """All rows of the first part, then all of the next."""
    return [number for part in zip(*columns, strict=True) for number in part]


def _micro_batch(texts: Sequence[Text], numbers: Sequence[int], start: int, length: int) -> PipelineBatch:
    """``length`` tokens from ``start`` of texts ``numbers`` as the pipeline takes them.

    They are padded behind; each position has the code of its text.
    """
    ids = torch.zeros(len(numbers), length, dtype=torch.int64)
    codes = torch.zeros(len(numbers), length, dtype=torch.int8)
    ends = torch.zeros(len(numbers), dtype=torch.int64)
    for k, number in enumerate(numbers):
        if number != FILLER:
            text = texts[number]
            tokens = [*text.ids, *text.written][start : start + length]
            ids[k, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
            codes[k] = text.code
            ends[k] = max(len(tokens), 1) - 1  # there is none of a text that has ended
    positions = torch.arange(start, start + length).expand(len(numbers), length).contiguous()
    no_dropout = torch.zeros(len(numbers), dtype=torch.int64)
    return (ids, codes, no_dropout, positions), (torch.tensor(list(numbers)), ends)


def _choose(logits: Tensor, drawing: Drawing, prompts: Sequence[int], place: int) -> Tensor:
    """The next token of each row of ``logits`` [rows, V]: the most probable, or one drawn for its prompt and place."""
    if drawing.temperature == 0:
        return logits.argmax(dim=1)
    chances = torch.tensor([_chance(drawing.seed, prompt, place) for prompt in prompts], dtype=torch.float64)
    steps = torch.softmax(logits.double() / drawing.temperature, dim=1).cumsum(dim=1)
    sought = chances.to(steps.device).unsqueeze(1) * steps[:, -1:]
    return torch.searchsorted(steps, sought, right=True).squeeze(1).clamp(max=steps.shape[1] - 1)


def _chance(seed: int, prompt: int, place: int) -> float:
    """A number from 0 to below 1."""
    digest = hashlib.sha256(f"{seed}/{prompt}/{place}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56
