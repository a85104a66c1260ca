"""Text that a model writes at each strength, after the beginnings of documents that it was not trained on.

What is measured on it:

* repetition of a text of n tokens: 1 − (different 4-grams) / (n − 3), the share of its 4-grams that it had before;
* EOS rate: the share of texts that the model ended by itself.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cadapter.adapters.directory import CONFIG_NAME, kind_of, read_control_adapter
from cadapter.config import Config
from cadapter.data import HeldOutDocument, load_tokenizer
from cadapter.models.attach import SteeredModel, load_causal_lm
from cadapter.models.checkpoint import Checkpoint, resolve_model
from cadapter.models.generation import Continuation, Sampling, continuations
from cadapter.models.loading import DTYPES
from cadapter.terminal import progress
from cadapter.training.scores import standard_error

PROMPT_TOKENS = 24
"""How much of a document is given, its prefix included."""
GRAM = 4


@dataclass(frozen=True)
class Prompt:
    """The beginning of a document: ``ids`` [P]; ``following`` is what the document goes on with."""

    dataset: str
    control_class: int
    ids: np.ndarray
    following: list[int]


@dataclass(frozen=True)
class Sample:
    """One text at one strength; ``tokens`` without the one that ended it. ``repetition`` is NaN for fewer than four."""

    text: str
    tokens: int
    ended: bool
    repetition: float


@dataclass(frozen=True)
class Sampled:
    """What was written.

    Attributes:
        prompts: the text of each prompt, with its dataset and class.
        samples: by strength, one for each prompt.
        new_tokens: how many tokens were written at most.
        documents_repetition: repetition of as many tokens of the documents themselves, for comparison.
    """

    prompts: list[tuple[str, str, int]]
    samples: dict[float, list[Sample]]
    new_tokens: int
    documents_repetition: float

    def repetition(self, strength: float) -> tuple[float, float]:
        """Mean over texts and its standard error."""
        values = np.array([sample.repetition for sample in self.samples[strength]])
        values = values[~np.isnan(values)]
        return (float(values.mean()) if len(values) else float("nan")), standard_error(values)

    def eos_rate(self, strength: float) -> float:
        """Share of texts that the model ended."""
        return float(np.mean([sample.ended for sample in self.samples[strength]]))


def repetition(ids: Sequence[int]) -> float:
    """Return the share of 4-grams of ``ids`` that occurred before in it; NaN where there is none."""
    grams = [tuple(ids[at : at + GRAM]) for at in range(len(ids) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else float("nan")


def prompts_of(documents: Sequence[HeldOutDocument], count: int) -> list[Prompt]:
    """Return the beginnings of ``count`` documents, from all datasets in turn; all have the same number of tokens."""
    length = PROMPT_TOKENS
    if not any(len(document.ids) > length for document in documents):
        length = max(1, max(len(document.ids) for document in documents) // 2)
    groups: dict[tuple[str, int], list[HeldOutDocument]] = {}
    for document in documents:
        if len(document.ids) > length:
            groups.setdefault((document.dataset, document.control_class), []).append(document)
    in_turn = [document for turn in zip_longest(*groups.values()) for document in turn if document is not None]
    return [
        Prompt(each.dataset, each.control_class, each.ids[:length], each.ids[length:].tolist())
        for each in in_turn[:count]
    ]


def reason_not_to_sample(config: Config, stages: int) -> str | None:
    """Return why no text can be sampled here; None where it can."""
    if stages > 1:
        return f"the model is spread over {stages} pipeline stages, and text is written by one process (--num-gpus 1)"
    if config.load_in_4bit:
        return "the base is in 4 bits"
    return None


def sample(
    config: Config,
    subject: Path,
    strengths: Sequence[float],
    prompts: Sequence[Prompt],
    sampling: Sampling,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Sampled:
    """Let ``subject``, an adapter or a model that was trained from the base, go on from ``prompts`` at each strength.

    Every strength draws from the same random numbers. ``advance`` is called with 1 after each token of all texts.

    Raises:
        CadapterError: the model cannot be loaded on this device as a whole.
    """
    gc.collect()  # the pipeline that scored is gone; its memory shall be, too
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    tokenizer = load_tokenizer(config).fast
    ids = torch.from_numpy(np.stack([prompt.ids for prompt in prompts]).astype(np.int64))
    samples = {}
    for strength, model in _turned(config, subject, strengths):
        written = continuations(model, tokenizer, ids, sampling, advance)
        samples[strength] = [_sample(tokenizer, each) for each in written]
    own = np.array([repetition(prompt.following[: sampling.max_new_tokens]) for prompt in prompts])
    return Sampled(
        prompts=[
            (tokenizer.decode(prompt.ids, skip_special_tokens=True), prompt.dataset, prompt.control_class)
            for prompt in prompts
        ],
        samples=samples,
        new_tokens=sampling.max_new_tokens,
        documents_repetition=float(own[~np.isnan(own)].mean()) if not np.isnan(own).all() else float("nan"),
    )


def _sample(tokenizer: Any, written: Continuation) -> Sample:
    text = tokenizer.decode(written.ids, skip_special_tokens=True)
    own = written.ids[:-1] if written.ended else written.ids
    return Sample(text, len(own), written.ended, repetition(own))


def _turned(config: Config, subject: Path, strengths: Sequence[float]) -> Iterator[tuple[float, Any]]:
    """The model at each strength: 0 is the base."""
    from transformers.utils import logging

    base = resolve_model(config.model_dir)

    def load(directory: Path) -> Any:
        place = "cuda" if torch.cuda.is_available() else "cpu"
        logging.disable_progress_bar()  # ours is shown
        with progress("loading the model"):
            return load_causal_lm(Checkpoint(directory, config.trust_remote_code), DTYPES[config.dtype], place)

    if not (subject / CONFIG_NAME).is_file():  # a fine-tuned model
        for strength in strengths:
            yield strength, load(subject if strength else base)
    elif kind_of(subject) == "control":
        steered = SteeredModel(load(base), read_control_adapter(subject))
        for strength in strengths:
            steered.set_strength(strength)
            yield strength, steered.model
    else:
        from peft import PeftModel

        adapted = PeftModel.from_pretrained(load(base), subject).eval()
        for strength in strengths:
            with nullcontext() if strength else adapted.disable_adapter():
                yield strength, adapted
