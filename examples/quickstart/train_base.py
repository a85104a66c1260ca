"""Train the quickstart's base model: a byte-level BPE tokenizer and a tiny Llama, both from nothing.

The directory written is like any model's from the hub: config.json, a tokenizer and safetensors shards. It is trained
in plain PyTorch, since it stands for the model that a user already has; training adapters is what cadapter is for.

Does nothing when the directory was already made from the same corpus by the same version of this script.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>")
PAD, BOS, EOS = range(3)
VOCABULARY = 2048
SEQUENCE = 256
LONGEST = 1024
BATCH = 4
PEAK_LR = 3e-3
STAMP = "made-from.txt"


def read_texts(path: Path) -> list[str]:
    """The texts of a JSONL file."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; it adds no special token of its own accord."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    pad, bos, eos = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, model_max_length=LONGEST
    )


def new_model() -> LlamaForCausalLM:
    """A Llama with random weights, small enough for a laptop."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LONGEST,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config)


def sequences_of(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """All texts, each between BOS and EOS, as one stream cut into rows [n, SEQUENCE]."""
    ids = [token for text in tokenizer(texts)["input_ids"] for token in (BOS, *text, EOS)]
    rows = len(ids) // SEQUENCE
    return torch.tensor(ids[: rows * SEQUENCE]).view(rows, SEQUENCE)


def train(model: LlamaForCausalLM, rows: torch.Tensor, held_out: torch.Tensor, epochs: int) -> None:
    """AdamW with warm-up and cosine decay; prints the loss in nats per token."""
    steps = epochs * (len(rows) // BATCH)
    optimiser = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    warmup = max(1, steps // 20)

    def lr_factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lr_factor)
    started = time.monotonic()
    step = 0
    for _ in range(epochs):
        order = torch.randperm(len(rows))
        for first in range(0, len(rows) - BATCH + 1, BATCH):
            batch = rows[order[first : first + BATCH]]
            loss = model(batch, labels=batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
            step += 1
            if step % 200 == 0 or step == steps:
                seconds = time.monotonic() - started
                print(f"  step {step:>5} of {steps}   loss {loss.item():.3f}   {seconds:>4.0f} s", flush=True)
    print(f"  loss on held-out text: {held_out_loss(model, held_out):.3f} nats per token")


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, rows: torch.Tensor) -> float:
    """Mean loss over rows that were not trained on, in nats per token."""
    losses = [model(batch, labels=batch, use_cache=False).loss.item() * len(batch) for batch in rows.split(BATCH)]
    return sum(losses) / len(rows)


def fingerprint(corpus: Path, epochs: int) -> str:
    """Changes with whatever the model is made from: this script, the corpus and the options."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    digest.update(corpus.read_bytes())
    digest.update(f"epochs {epochs}".encode())
    return digest.hexdigest()


def main() -> None:
    """Read the options; train and write the model unless it is there already."""
    parser = argparse.ArgumentParser(description="Train the quickstart's tokenizer and base model.")
    parser.add_argument("corpus", type=Path, help='JSONL file of {"text": …}')
    parser.add_argument("output_dir", type=Path, help="directory of the model; replaced when it is out of date")
    parser.add_argument("--epochs", type=int, default=4, help="passes over the corpus (default: 4)")
    options = parser.parse_args()
    if not options.corpus.is_file():
        parser.error(f"{options.corpus}: no such file; make_corpus.py writes it")

    made_from = fingerprint(options.corpus, options.epochs)
    stamp = options.output_dir / STAMP
    if stamp.is_file() and stamp.read_text() == made_from:
        print(f"  {options.output_dir} is up to date")
        return

    logging.disable_progress_bar()
    torch.manual_seed(1)
    texts = read_texts(options.corpus)
    tokenizer = train_tokenizer(texts)
    rows = sequences_of(texts, tokenizer)
    held_out = len(rows) // 50 + 1
    model = new_model()
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"  {len(texts)} texts, {rows.numel()} tokens; {millions:.2f} million parameters")
    train(model, rows[held_out:], rows[:held_out], options.epochs)

    temporary = options.output_dir.with_name(options.output_dir.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary, max_shard_size="2MB")
    tokenizer.save_pretrained(temporary)
    (temporary / STAMP).write_text(made_from)
    shutil.rmtree(options.output_dir, ignore_errors=True)
    temporary.rename(options.output_dir)


if __name__ == "__main__":
    main()
