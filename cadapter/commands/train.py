"""``cadapter train``: train a Control Adapter as a config says, on one process or on many."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cadapter.commands.shared_options import OverridesOption

EXAMPLES = (
    "cadapter train config.toml --dry-run",
    "cadapter train config.toml --num-gpus 2 --set pipeline_stages=2",
)

_PROCESSES = "Processes"
_NODES = "Several nodes"


def command(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="The run's config, a TOML file.", show_default=False)
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume-from-checkpoint", help="Continue from the newest checkpoint of output_dir that is whole."
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the run that output_dir holds.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and show layout, steps and memory; train nothing.")
    ] = False,
    overrides: OverridesOption = None,
    num_gpus: Annotated[
        int | None,
        typer.Option(
            help="Processes on each machine: all visible GPUs by default; without GPUs one.",
            show_default=False,
            rich_help_panel=_PROCESSES,
        ),
    ] = None,
    master_port: Annotated[
        int | None,
        typer.Option(
            help="Port of the first process. Default: a free one; on several machines 29500.",
            show_default=False,
            rich_help_panel=_PROCESSES,
        ),
    ] = None,
    num_nodes: Annotated[
        int | None, typer.Option(help="Number of machines.", show_default=False, rich_help_panel=_NODES)
    ] = None,
    hostfile: Annotated[
        Path | None,
        typer.Option(
            help="File of lines 'HOST slots=N', one for each machine; they are reached through ssh.",
            show_default=False,
            rich_help_panel=_NODES,
        ),
    ] = None,
    master_addr: Annotated[
        str | None, typer.Option(help="Address of the first machine.", show_default=False, rich_help_panel=_NODES)
    ] = None,
    node_rank: Annotated[
        int | None,
        typer.Option(
            help="Which machine this is, from 0: start its part only. Give the command on each machine.",
            show_default=False,
            rich_help_panel=_NODES,
        ),
    ] = None,
    no_ssh: Annotated[
        bool,
        typer.Option(
            "--no-ssh",
            help="Start this machine's part only, found by its name in the hostfile.",
            rich_help_panel=_NODES,
        ),
    ] = False,
    launcher: Annotated[
        str | None,
        typer.Option(
            help="How DeepSpeed's runner reaches the machines of a hostfile: pdsh.",
            show_default=False,
            rich_help_panel=_NODES,
        ),
    ] = None,
    config_option: Annotated[Path | None, typer.Option("--config", hidden=True)] = None,
) -> None:
    """Train a Control Adapter as CONFIG says.

    On several GPUs the command starts itself again under DeepSpeed's launcher; started by torchrun, srun or mpirun it
    joins that job. SIGTERM, SIGHUP or Ctrl-C, on any machine, saves a checkpoint and stops; --resume-from-checkpoint
    continues exactly there.
    """
    from cadapter.config import load_config
    from cadapter.errors import UsageError
    from cadapter.terminal import go_on_unread
    from cadapter.training.launch import LaunchOptions, relaunched

    source = config or config_option
    if source is None:
        raise UsageError("train needs a config.\nGive its path: cadapter train config.toml")
    settings = load_config(source, overrides or ())
    if not dry_run:
        go_on_unread()  # metrics.jsonl keeps the log
    options = LaunchOptions(num_gpus, num_nodes, hostfile, master_addr, master_port, node_rank, no_ssh, launcher)
    code = relaunched(options, settings.pipeline_stages, sys.argv[1:], Path(settings.output_dir))
    if code is not None:
        raise typer.Exit(code)

    from cadapter.training.run import TrainOptions, train

    train(settings, source, TrainOptions(resume, force, dry_run, tuple(overrides or ())))
