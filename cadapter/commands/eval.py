"""``cadapter eval``: does the adapter steer, and at what cost?"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cadapter.config import Config
    from cadapter.training.evaluation import Evaluation

EXAMPLES = (
    "cadapter eval config.toml",
    "cadapter eval config.toml --adapter run/epoch1 --strength 0.5 --strength -0.5 --json scores.json",
)


def command(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The run's config, a TOML file.")],
    adapter: Annotated[
        Path | None,
        typer.Option(
            help="Adapter directory. Default: of the run's final/, the newest epochN/, the newest checkpoint.",
            show_default=False,
        ),
    ] = None,
    strength: Annotated[
        list[float] | None,
        typer.Option(help="Apply (I + W)^T; can be given repeatedly. Default: 1 and -1.", show_default=False),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE:CLASS",
            help="Evaluate these texts instead of the run's held-out ones; can be given repeatedly.",
        ),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers as JSON.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the config.")
    ] = None,
    num_gpus: Annotated[
        int | None,
        typer.Option(help="Processes: all visible GPUs by default; without GPUs one.", show_default=False),
    ] = None,
) -> None:
    """Score held-out documents with the base model and with the adapter at each strength.

    Every document is scored alone: loss (mean over documents of the mean per token, in nats) with its standard error,
    perplexity, top-1 accuracy, and KL(base || adapted). Strength 1 is class +1, -1 its exact inverse. With documents
    of both classes the contrast of each pair of strengths says whether the adapter tells the classes apart.
    """
    from cadapter.config import load_config
    from cadapter.errors import UsageError
    from cadapter.training.launch import LaunchOptions, relaunched
    from cadapter.training.run_directory import adapter_of_run

    settings = load_config(config, overrides or ())
    texts = tuple(_file_and_class(each) for each in data or ())
    directory = adapter or adapter_of_run(Path(settings.output_dir))
    if json_file and not json_file.absolute().parent.is_dir():
        raise UsageError(f"--json {json_file}: there is no directory {json_file.parent}.")
    code = relaunched(LaunchOptions(num_gpus=num_gpus), settings.pipeline_stages, sys.argv[1:])
    if code is not None:
        raise typer.Exit(code)

    from cadapter.files import write_json
    from cadapter.terminal import note, warn
    from cadapter.training.evaluation import EvalOptions, evaluate

    result = evaluate(settings, EvalOptions(directory, tuple(strength) if strength else None, texts))
    if result is None:
        return
    note(f"Adapter: {directory}")
    if result.note:
        warn(result.note)
    _show(result)
    if json_file:
        records = [score.to_json() for score in result.scores] + [pair.to_json() for pair in result.contrasts]
        write_json(json_file, records)
        note(f"Written: {json_file}")
    note(f"Next: {_next(settings, directory)}")


def _next(settings: Config, directory: Path) -> str:
    """What to do with what was evaluated."""
    from cadapter.adapters.directory import CONFIG_NAME, kind_of

    chat = " --chat" if settings.has_chats else ""
    if not (directory / CONFIG_NAME).is_file():
        return f"cadapter generate {directory} PROMPT{chat}"
    if kind_of(directory) == "control":
        return f"cadapter generate {settings.model_dir} PROMPT --adapter {directory} --compare{chat}"
    return f"cadapter merge {settings.model_dir} {directory} OUTPUT"


def _file_and_class(text: str) -> tuple[str, int]:
    from cadapter.errors import UsageError

    path, _, number = text.rpartition(":")
    if not path or number not in ("1", "+1", "-1", "0"):
        raise UsageError(f"--data {text}: give FILE:CLASS with class 1, -1 or 0, such as --data good.jsonl:1.")
    return path, int(number)


def _with_error(value: float, error: float) -> str:
    """A mean with its standard error, which a single document does not have."""
    return f"{value:.4f}" if math.isnan(error) else f"{value:.4f} ± {error:.4f}"


def _show(result: Evaluation) -> None:
    from cadapter.terminal import note, table

    rows = [
        [
            score.dataset,
            f"{score.control_class:+d}" if score.control_class else "0",
            "base" if score.strength == 0 else f"{score.strength:+g}",
            _with_error(score.loss, score.loss_se),
            f"{score.perplexity:.3f}",
            f"{100 * score.top1_accuracy:.2f} %",
            f"{score.kl:.5f}",
            f"{score.documents:,}",
            f"{score.tokens:,}",
        ]
        for score in result.scores
    ]
    columns = [
        "dataset",
        "class",
        "strength",
        "loss, nats",
        "perplexity",
        "top-1",
        "KL from base",
        "documents",
        "tokens",
    ]
    table("Loss by dataset and strength", columns, rows)
    for pair in result.contrasts:
        note(
            f"Contrast at ±{pair.strengths[0]:g}: {_with_error(pair.contrast, pair.contrast_se)} nats per token; "
            f"{100 * pair.sign_share:.1f} % of documents are told by their lower loss (chance: 50 %)."
        )
    if result.skipped:
        note(f"{result.skipped} documents hold no token to score and are left out.")
