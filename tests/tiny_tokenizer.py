"""A real byte-level BPE tokenizer of a few hundred tokens, made in a moment."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "A control adapter learns one operator and its inverse.",
    "What the block adds to the residual stream is turned a little.",
    "It was the best of films, it was the worst of films.",
]
PAD, BOS, EOS, USER = "<|pad|>", "<|bos|>", "<|eos|>", "<|user|>"
"""Special tokens; in this order their ids are 0 to 3."""


def make_tokenizer(
    directory: Path, bos: str | None = BOS, eos: str | None = EOS, pad: str | None = PAD
) -> PreTrainedTokenizerFast:
    """Save a tokenizer of at most 320 tokens in ``directory`` (made if need be) and return it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[PAD, BOS, EOS, USER],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=bos, eos_token=eos, pad_token=pad)
    tokenizer.save_pretrained(directory)
    return tokenizer
