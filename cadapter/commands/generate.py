"""``cadapter generate``: read what a model writes, with an adapter applied natively at any strength."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cadapter.commands.shared_options import Dtype, TrustOption, trust_words

if TYPE_CHECKING:
    from cadapter.models.checkpoint import Checkpoint
    from cadapter.models.generation import Sampling

EXAMPLES = (
    'cadapter generate base "Once upon a time" --adapter run/final --compare',
    "cadapter generate base --adapter run/final --strength -0.5 --chat < question.txt",
)

COMPARED = (-1.0, 0.0, 1.0)
NARROWEST_FOR_COLUMNS = 90
"""Terminals of fewer characters show compared texts one below the other."""

_SAMPLING = "How tokens are drawn"
_PLACE = "Where and how to compute"


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory or hub id of the base model.")],
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="What the model continues. Default: standard input.", show_default=False),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A control adapter to apply.", show_default=False)
    ] = None,
    strength: Annotated[
        list[float] | None,
        typer.Option(
            metavar="T",
            help="(I + W)^T: 1 as trained, -1 the inverse, 0 the base, 0.5 half-way; repeatable. Default: 1.",
            show_default=False,
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Show strengths -1, 0 and +1, each with the same seed.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Write at most this many tokens.")] = 128,
    chat: Annotated[
        bool, typer.Option("--chat", help="PROMPT is a user's turn: render it with the model's chat template.")
    ] = False,
    temperature: Annotated[
        float,
        typer.Option(metavar="X", help="0 always takes the most probable token.", rich_help_panel=_SAMPLING),
    ] = 0.8,
    top_p: Annotated[
        float,
        typer.Option(
            metavar="P",
            help="Draw from the most probable tokens that together reach this probability.",
            rich_help_panel=_SAMPLING,
        ),
    ] = 1.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the random numbers.", rich_help_panel=_SAMPLING)] = 0,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Of the weights. Default: the model's own.", show_default=False, rich_help_panel=_PLACE),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="cpu, cuda, cuda:1 … Default: cuda where there is a GPU, else cpu.",
            show_default=False,
            rich_help_panel=_PLACE,
        ),
    ] = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Generate text from MODEL, with a control adapter applied natively.

    Nothing is merged: the adapter changes what each block adds, at every position, the prompt's included. A
    beginning-of-sequence token is put before the prompt where the tokenizer has one and does not do so itself.
    """
    from cadapter.errors import UsageError
    from cadapter.models.generation import Sampling
    from cadapter.terminal import note

    if adapter is None and (compare or strength):
        raise UsageError("--strength and --compare are for an adapter.\nGive its directory: --adapter DIR.")
    if compare and strength:
        raise UsageError("--compare shows strengths -1, 0 and +1, and --strength others: give one of the two.")
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    text = _prompt_or_input(prompt)
    strengths = COMPARED if compare else tuple(dict.fromkeys(strength or (1.0,)))
    texts = _continuations(model, text, chat, adapter, strengths, sampling, (dtype, device), trust_remote_code)
    _show(text, texts)
    following = _next_command(model, adapter, strengths, trust_words(trust_remote_code))
    note(f"--- next ---\n{following}")  # a heading, as texts have: not part of one


def _next_command(model: str, adapter: Path | None, strengths: tuple[float, ...], further: list[str]) -> str:
    """After the base its training, after one strength all three, after these a model that has one in its weights.

    After such a model, or one that was fine-tuned: its file for llama.cpp.
    """
    import shlex

    if adapter is None and _is_result(Path(model)):
        return shlex.join(["python", "convert_hf_to_gguf.py", model, "--outfile", f"{Path(model).resolve().name}.gguf"])
    if adapter is None:
        return "cadapter train config.toml"
    if len(strengths) > 1:
        return shlex.join(["cadapter", "merge", model, str(adapter), "merged", *further])
    words = ["cadapter", "generate", model, "Once upon a time", "--adapter", str(adapter), "--compare"]
    return shlex.join([*words, *further])


def _is_result(model: Path) -> bool:
    """Whether a model came out of ``merge`` or of a run, so that there is nothing left to train."""
    from cadapter.convert.merge import is_merged
    from cadapter.training.run_directory import RECORD

    return is_merged(model) or (model.resolve().parent / RECORD).is_file()


def _continuations(
    model: str,
    prompt: str,
    chat: bool,
    adapter: Path | None,
    strengths: tuple[float, ...],
    sampling: Sampling,
    place: tuple[Dtype | None, str | None],
    trust_remote_code: bool,
) -> dict[str, str]:
    """What the model writes after the prompt at each strength, by heading; without an adapter the base's text."""
    from cadapter.adapters.directory import read_control_adapter
    from cadapter.adapters.strengths import layer_transform, neumann_note
    from cadapter.data import Tokenizer
    from cadapter.models.attach import SteeredModel, check_fit
    from cadapter.models.checkpoint import open_model
    from cadapter.models.generation import continuation, encode_prompt
    from cadapter.terminal import progress, warn

    files = read_control_adapter(adapter) if adapter else None
    checkpoint = open_model(model, trust_remote_code)
    if files is not None:
        check_fit(files, checkpoint)
        # Refuse an impossible strength before any weight is read.
        for layer in files.layers:
            for t in strengths:
                layer_transform(files, layer, t)
    tokenizer = Tokenizer(checkpoint.directory, trust_remote_code).fast
    ids = encode_prompt(tokenizer, prompt, chat)
    causal_lm = _load(checkpoint, *place)
    reach = ids.shape[1] + sampling.max_new_tokens
    for message in (_beyond(causal_lm, reach), files and neumann_note(files, strengths)):
        if message:
            warn(message)
    texts: dict[str, str] = {}
    with progress("generating", total=sampling.max_new_tokens * len(strengths), unit="tokens") as advance:
        if files is None:
            heading = "model" if _is_result(Path(model)) else "base"
            return {heading: continuation(causal_lm, tokenizer, ids, sampling, advance)}
        steered = SteeredModel(causal_lm, files, strengths[0])
        for t in strengths:
            steered.set_strength(t)
            texts[_label(t)] = continuation(causal_lm, tokenizer, ids, sampling, advance)
    return texts


def _prompt_or_input(prompt: str | None) -> str:
    """PROMPT, else all of standard input without its last line break."""
    from cadapter.errors import UsageError

    if prompt is not None:
        return prompt
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError('There is no prompt.\nGive one, cadapter generate MODEL "Once upon a time", or pipe it in.')
    text = sys.stdin.read().removesuffix("\n")
    if not text:
        raise UsageError('There is no prompt: standard input is empty.\nGive "" to begin with nothing.')
    return text


def _load(checkpoint: Checkpoint, dtype: Dtype | None, device: str | None) -> Any:
    import torch
    from transformers.utils import logging

    from cadapter.models.attach import load_causal_lm
    from cadapter.models.device import usable_device
    from cadapter.terminal import progress

    default = "cuda" if torch.cuda.is_available() else "cpu"
    place = usable_device(device) if device else default
    logging.disable_progress_bar()  # ours is shown
    with progress("loading the model"):
        return load_causal_lm(checkpoint, getattr(torch, dtype.value) if dtype else None, place)


def _beyond(model: Any, tokens: int) -> str | None:
    """Say that a text may leave the positions that the model was made for."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is None or tokens <= positions:
        return None
    return f"Prompt and continuation may reach {tokens:,} tokens; the model was made for {positions:,}."


def _label(strength: float) -> str:
    return f"strength {strength:+g}" if strength else "strength 0 (base)"


def _show(prompt: str, texts: dict[str, str]) -> None:
    """Print the continuations under their headings: in columns where there is room, else one below the other.

    A single one is printed bare with ``--quiet``.
    """
    from cadapter.terminal import console, note, table

    note(f"--- prompt ---\n{prompt}")
    screen = console()
    if len(texts) > 1 and screen.is_terminal and screen.width >= NARROWEST_FOR_COLUMNS:
        table("", list(texts), [[text.strip() for text in texts.values()]], align="l" * len(texts))
        return
    for label, text in texts.items():
        heading = f"--- {label} ---"
        if len(texts) > 1:
            print(heading)
        else:
            note(heading)
        print(text)
