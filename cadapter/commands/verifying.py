"""``--verify`` of the converting commands: what it needs beforehand, and what it prints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from cadapter.convert.fidelity import Adapters, Fidelity
    from cadapter.convert.plan import Plan
    from cadapter.models.checkpoint import Checkpoint

PANEL = "How close it is"
VerifyOption = Annotated[
    bool,
    typer.Option(
        "--verify",
        help="Run base, adapter and result on the same text and say how far apart they are.",
        rich_help_panel=PANEL,
    ),
]
TextOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="For --verify: a plain text, or .jsonl, .json or .parquet with the field text. The first 2,048 tokens, in "
        "rows of 256, are used. Default: a built-in text.",
        show_default=False,
        rich_help_panel=PANEL,
    ),
]


def rows_for(base: Checkpoint | None, verify: bool, text: Path | None) -> list[Tensor]:
    """The text to compare on, read before anything is written; empty without ``--verify``.

    Raises:
        UsageError: options that do not go together, no base, no tokenizer, or a text that cannot be used.
    """
    from cadapter.convert.probe import probe_rows
    from cadapter.errors import UsageError

    if not verify:
        if text is not None:
            raise UsageError("--text is the text for --verify: give both, or leave it out.")
        return []
    if base is None:
        raise UsageError("--verify runs the base model, and the adapter names none that is here.\nGive it with --base.")
    return probe_rows(base, text)


def show_fidelity(
    base: Checkpoint,
    adapters: Adapters | Plan,
    converted: Checkpoint,
    rows: list[Tensor],
    judge: Callable[[Fidelity], tuple[bool, str]],
    device: str | None = None,
) -> None:
    """Compare, and print the table and what it means; does nothing without ``rows``.

    Raises:
        CheckFailed: a conversion that should be exact is not.
    """
    if not rows:
        return
    import torch

    from cadapter.convert.fidelity import verify
    from cadapter.errors import CheckFailed
    from cadapter.terminal import note, progress, table

    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with progress("comparing", total=base.config.num_hidden_layers, unit="layers") as advance:
        found = verify(base, adapters, converted, rows, place, advance)
    good, words = judge(found)
    table(
        f"KL divergence a token over {found.tokens:,} tokens, in nats",
        ("", "mean", "largest", "same top-1"),
        [
            ("adapter from the base", *_numbers(found.effect_mean, found.effect_max, found.effect_top1)),
            ("result from the adapter", *_numbers(found.kl_mean, found.kl_max, found.top1_agreement)),
        ],
        align="lrrr",
        footer=words if good else "",
    )
    if isinstance(adapters, dict):
        note(
            "A LoRA's change is worked out for this as merging does it, in float32: the comparison shows what storing "
            "the weights lost, and not that peft applies the LoRA in the same way."
        )
    if not good:
        raise CheckFailed(words)


def _numbers(mean: float, largest: float, top1: float) -> tuple[str, str, str]:
    from cadapter.terminal import significant

    return significant(mean, 3), significant(largest, 3), f"{top1:.2%}"
