"""Text from a causal LM: a prompt to token ids, and Hugging Face's ``generate`` with plain sampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cadapter.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        max_new_tokens: at most so many; the model may end sooner.
        temperature: logits are divided by it; 0 always takes the most probable token.
        top_p: draw from the smallest set of tokens with at least this probability; 1: from all.
        seed: of the random numbers.

    Raises:
        UsageError: a value outside its range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.8
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"--max-new-tokens {self.max_new_tokens}: give at least 1.")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"--temperature {self.temperature:g}: give 0 (the most probable token) or above.")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p {self.top_p:g}: give a number above 0 and at most 1.")


def encode_prompt(tokenizer: Any, prompt: str, chat: bool = False) -> Tensor:
    """Return the token ids of a prompt, [1, T].

    The tokenizer does with the text what it does by default. Where it has a beginning-of-sequence token (BOS) and
    adds none, BOS is put in front, since models are trained to see it there. With ``chat`` the prompt is the user's
    turn, rendered with the tokenizer's chat template up to where the assistant's begins; a template says itself
    whether BOS comes first, so nothing is added.

    Raises:
        UsageError: no chat template, one that fails, or a prompt of no tokens.
    """
    if chat:
        ids = tokenizer(_chat_text(tokenizer, prompt), add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(prompt)["input_ids"]
        bos = tokenizer.bos_token_id
        if bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
    if not ids:
        raise UsageError("The prompt is empty, and this model's tokenizer has no token that begins a text.")
    return torch.tensor([ids])


def _chat_text(tokenizer: Any, prompt: str) -> str:
    if not tokenizer.chat_template:
        raise UsageError(
            f"{tokenizer.name_or_path}: the tokenizer has no chat template.\n"
            "Leave --chat out (in a config: sample_chat), or use the model's instruction-tuned version."
        )
    turns = [{"role": "user", "content": prompt}]
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program, and fails as it likes
        raise UsageError(f"{tokenizer.name_or_path}: its chat template fails: {error}") from error


class _Counter:
    """What ``generate`` hands its tokens to as they come; it only counts them."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance
        self._prompt_seen = False

    def put(self, _tokens: Tensor) -> None:
        """``generate`` calls this with the prompt first, then with every token."""
        if self._prompt_seen:
            self._advance(1)
        self._prompt_seen = True

    def end(self) -> None:
        """``generate`` calls this at the end."""


def continuation(
    model: Any, tokenizer: Any, ids: Tensor, sampling: Sampling, advance: Callable[[int], None] = lambda tokens: None
) -> str:
    """Return what ``model`` writes after ``ids`` [1, T], without special tokens.

    Only ``sampling`` decides: defaults that a model brings along (top-k, penalties) are left aside, except for which
    tokens end a text. The same seed gives the same text on the same machine.

    Args:
        advance: called with 1 after each token.
    """
    from transformers import GenerationConfig

    ends = _end_tokens(model.generation_config.eos_token_id, tokenizer)
    random = sampling.temperature > 0
    chosen: dict[str, Any] = {"do_sample": False}
    if random:
        chosen = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    plain = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,  # there is nothing to fill; without a value generate complains
        **chosen,
    )
    model.generation_config = plain  # what is not set in the one passed is taken from here
    torch.manual_seed(sampling.seed)
    ids = ids.to(model.device)
    with torch.inference_mode():
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=plain, streamer=_Counter(advance)
        )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def end_tokens_of(directory: Path, config: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a text of the model in ``directory``, which need not be loaded."""
    from transformers import GenerationConfig

    try:
        ends = GenerationConfig.from_pretrained(directory, local_files_only=True).eos_token_id
    except OSError:  # it has none of its own
        ends = config.eos_token_id
    return _end_tokens(ends, tokenizer)


def _end_tokens(ends: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a text: ``ends``, what the model's generation config says, else the tokenizer's EOS."""
    if ends is None:
        ends = tokenizer.eos_token_id
    if ends is None:
        return []
    return list(ends) if isinstance(ends, (list, tuple)) else [int(ends)]
