"""``cadapter eval``: does the adapter steer, at which strength, and at what cost?"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cadapter.commands.shared_options import OverridesOption, trust_words

if TYPE_CHECKING:
    from cadapter.config import Config
    from cadapter.steering.report import Report
    from cadapter.training.evaluation import Evaluation

EXAMPLES = (
    "cadapter eval config.toml",
    "cadapter eval config.toml --html report.html --neutral neutral.jsonl",
    "cadapter eval config.toml --strength -1:1:0.5 --data good.jsonl:1 --json scores.json",
)

SAMPLES, SAMPLE_TOKENS, SAMPLE_TEMPERATURE = 8, 64, 0.8
"""How many texts a steering report holds for each strength, of how many tokens, and how these are drawn."""
SAMPLE_SEED = 0

_TEXTS = "Which texts"
_REPORT = "The report"


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
        list[str] | None,
        typer.Option(
            metavar="T|FROM:TO:STEP",
            help="Apply (I + W)^T; can be given repeatedly. Default: 1 and -1, or a sweep.",
            show_default=False,
        ),
    ] = None,
    sweep: Annotated[
        bool,
        typer.Option(
            "--sweep", help="A steering report: strengths -2 to 2 in steps of 0.5 unless named, and sampled texts."
        ),
    ] = False,
    overrides: OverridesOption = None,
    num_gpus: Annotated[
        int | None,
        typer.Option(help="Processes: all visible GPUs by default; without GPUs one.", show_default=False),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE:CLASS",
            help="Evaluate these texts instead of the run's held-out ones; can be given repeatedly.",
            rich_help_panel=_TEXTS,
        ),
    ] = None,
    neutral: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Texts that the adapter should leave alone, beside the others: KL on them is the cost of a strength. "
            "Default: those of class 0.",
            show_default=False,
            rich_help_panel=_TEXTS,
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write a page with curves, norms and sampled texts, over an older file; means --sweep.",
            show_default=False,
            rich_help_panel=_REPORT,
        ),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="Write the numbers as JSON, over an older file; - prints them instead of the tables.",
            show_default=False,
            rich_help_panel=_REPORT,
        ),
    ] = None,
    kl_budget: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="The best strength is that of the largest contrast with a KL on neutral text of at most X nats a "
            "token. Default: 0.1.",
            show_default=False,
            rich_help_panel=_REPORT,
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help=f"Sample N texts a strength, from the beginnings of scored documents. Default: {SAMPLES} with "
            "--sweep, else none.",
            min=0,
            show_default=False,
            rich_help_panel=_REPORT,
        ),
    ] = None,
    sample_tokens: Annotated[
        int, typer.Option(metavar="N", help="Length of a sampled text.", min=1, rich_help_panel=_REPORT)
    ] = SAMPLE_TOKENS,
    sample_temperature: Annotated[
        float, typer.Option(metavar="X", help="0 always takes the most probable token.", rich_help_panel=_REPORT)
    ] = SAMPLE_TEMPERATURE,
) -> None:
    """Score held-out documents with the base model and with the adapter at each strength.

    Every document is scored alone: loss (mean over documents of the mean per token, in nats) and perplexity with
    standard errors, top-1 accuracy, agreement with the base's most probable token, and KL(base || adapted). Strength 1
    is class +1, -1 its exact inverse. With documents of both classes the contrast of each pair of strengths says
    whether the adapter tells the classes apart, and the strength with the best contrast within a KL budget is named.

    --sweep and --html compare more strengths and sample texts: how much they repeat themselves, and how many end.
    """
    from cadapter.config import load_config
    from cadapter.errors import UsageError
    from cadapter.files import STANDARD_OUTPUT, check_report
    from cadapter.steering.sweep import strengths_of
    from cadapter.terminal import set_quiet
    from cadapter.training.launch import LaunchOptions, relaunched
    from cadapter.training.run_directory import adapter_of_run

    settings = load_config(config, overrides or ())
    texts = tuple(_file_and_class(each) for each in data or ())
    strengths = strengths_of(strength) if strength else None
    if kl_budget is not None and not (math.isfinite(kl_budget) and kl_budget > 0):
        raise UsageError(f"--kl-budget {kl_budget:g}: give a number above 0.")
    if not (math.isfinite(sample_temperature) and sample_temperature >= 0):
        raise UsageError(
            f"--sample-temperature {sample_temperature:g}: give 0 (the most probable token) or a number above."
        )
    directory = adapter or adapter_of_run(Path(settings.output_dir))
    for file in (html, json_file):
        check_report(file)
    if json_file == STANDARD_OUTPUT:
        set_quiet(True)  # nothing else may stand beside the numbers
    code = relaunched(LaunchOptions(num_gpus=num_gpus), settings.pipeline_stages, sys.argv[1:])
    if code is not None:
        raise typer.Exit(code)

    from cadapter.terminal import warn
    from cadapter.training.evaluation import EvalOptions, evaluate
    from cadapter.training.writing import Drawing

    sweep = sweep or html is not None
    count = samples if samples is not None else SAMPLES if sweep else 0
    drawing = Drawing(sample_tokens, sample_temperature, SAMPLE_SEED)
    result = evaluate(settings, EvalOptions(directory, strengths, sweep, texts, neutral, count, drawing))
    if result is None:
        return
    for said in result.notes:
        warn(said)
    _tell(_report(config, settings, directory, result, sweep, kl_budget), json_file, html)
    _note_next(settings, directory)


def _report(
    config: Path,
    settings: Config,
    directory: Path,
    result: Evaluation,
    sweep: bool,
    kl_budget: float | None,
) -> Report:
    from cadapter.adapters.directory import CONFIG_NAME, kind_of, read_control_adapter
    from cadapter.convert.norms import measure, verdict
    from cadapter.data import load_tokenizer
    from cadapter.steering.choosing import KL_BUDGET, choose
    from cadapter.steering.report import Report, remarks_of, single_classes
    from cadapter.steering.sampling import sampled

    is_control = (directory / CONFIG_NAME).is_file() and kind_of(directory) == "control"
    files = read_control_adapter(directory) if sweep and is_control else None
    norms = measure(files) if files else {}
    budget, single = kl_budget or KL_BUDGET, single_classes(result.documents)
    continued = result.continuations
    return Report(
        config=config,
        base=settings.model_dir,
        subject=directory,
        evaluation=result,
        choice=choose(result.contrasts, result.leans, result.costs, budget, single) if is_control else None,
        sampled=sampled(continued, load_tokenizer(settings).fast) if continued else None,
        adapter=files,
        norms=norms,
        verdict=tuple(verdict(files, norms)) if files else (),
        remarks=tuple(remarks_of(result)),
    )


def _tell(report: Report, json_file: Path | None, html: Path | None) -> None:
    from cadapter.files import STANDARD_OUTPUT, write_json_report, write_report
    from cadapter.steering.page import page
    from cadapter.steering.report import as_json
    from cadapter.steering.tables import show
    from cadapter.terminal import note

    if json_file != STANDARD_OUTPUT:
        note(f"Adapter: {report.subject}")
        show(report)
    if json_file is not None:
        write_json_report(json_file, as_json(report))
    if html is not None:
        write_report(html, page(report))


def _note_next(settings: Config, directory: Path) -> None:
    """Say what to do with what was evaluated."""
    import shlex

    from cadapter.adapters.directory import CONFIG_NAME, kind_of
    from cadapter.terminal import note

    subject, chat = str(directory), ["--chat"] if settings.has_chats else []
    if not (directory / CONFIG_NAME).is_file():
        words = ["generate", subject, "PROMPT", *chat]
    elif kind_of(directory) == "control":
        words = ["generate", settings.model_dir, "PROMPT", "--adapter", subject, "--compare", *chat]
    else:
        words = ["merge", settings.model_dir, subject, "OUTPUT"]
    note(f"Next: {shlex.join(['cadapter', *words, *trust_words(settings.trust_remote_code)])}")


def _file_and_class(text: str) -> tuple[str, int]:
    from cadapter.errors import UsageError

    path, _, number = text.rpartition(":")
    if not path or number not in ("1", "+1", "-1", "0"):
        raise UsageError(f"--data {text}: give FILE:CLASS with class 1, -1 or 0, such as --data good.jsonl:1.")
    return path, int(number)
