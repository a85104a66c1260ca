"""The program ``cadapter``: its commands, the options they share, and what an error looks like."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from cadapter import __version__, terminal
from cadapter.errors import CadapterError, CannotWrite, Stopped
from cadapter.files import at_home

COMMANDS = (
    "prepare",
    "plan",
    "train",
    "eval",
    "generate",
    "inspect-norms",
    "to-mult-lora",
    "to-add-lora",
    "merge",
    "to-gguf",
    "schema",
    "doctor",
)
"""The commands, in the order of the help. Each is the function ``command`` of ``cadapter/commands/NAME.py``, with
``EXAMPLES`` beside it: the command lines that its help ends with."""

PANELS = {
    "Data and training": ("prepare", "plan", "train"),
    "What an adapter does": ("eval", "generate", "inspect-norms"),
    "Conversions": ("to-mult-lora", "to-add-lora", "merge", "to-gguf"),
    "Around it": ("schema", "doctor"),
}
"""Where the help lists the commands."""

EXIT_CODES = {
    0: "done",
    1: "the work failed, or a check that was asked for did not hold",
    2: "wrong usage, a wrong config, or an input that cannot be used; nothing was written",
    129: "the terminal was closed, after saving",
    130: "interrupted",
    143: "terminated, after saving",
}

PUBLISHED_SPELLINGS = ("--num_gpus", "--master_addr", "--resume_from_checkpoint")
"""Options of ``train`` as qlora-pipe-lite spelt them."""

_GLOBAL = "Options of every command"
Quiet = Annotated[
    bool, typer.Option("--quiet", help="Print results, warnings and errors only.", rich_help_panel=_GLOBAL)
]
Debug = Annotated[bool, typer.Option("--debug", help="Show Python's traceback of an error.", rich_help_panel=_GLOBAL)]

_debug = False
_ERRORS_OF_TYPER = (typer.Exit, typer.Abort, typer.BadParameter)
_WRONG_USAGE: type[Exception] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException" and issubclass(kind, Exception)
)
"""What Typer raises of a command line that it cannot read: of click, or of the click that it brings along."""


def _examples(lines: Sequence[str]) -> str:
    """The epilog of a help page: one example a line, with nothing in it taken for markup."""
    # Two newlines: older versions of Typer join lines that only one separates.
    return "\n\n".join(["[bold]Examples[/bold]", *(line.replace("[", "\\[") for line in lines)])


def _exit_codes() -> str:
    return "\n\n".join(["[bold]Exit codes[/bold]", *(f"{code}: {words}" for code, words in EXIT_CODES.items())])


class _Program(TyperGroup):
    """Typer's group of commands, whose errors of usage look like all others."""

    def main(self, args: Any = None, prog_name: Any = None, complete_var: Any = None, *_: Any, **options: Any) -> Any:
        """Run a command line; unless ``standalone_mode=False`` is given, end the process with its exit code."""
        if not options.get("standalone_mode", True):
            return super().main(args, prog_name, complete_var, **options)
        try:
            code = super().main(args, prog_name, complete_var, **{**options, "standalone_mode": False})
        except typer.Abort:
            sys.exit(1)
        except _WRONG_USAGE as error:
            _show_wrong_usage(error)
            sys.exit(2)
        sys.exit(code if isinstance(code, int) else 0)


def _show_wrong_usage(error: Any) -> None:
    """Say what is wrong with a command line, how it is used, and where its help is."""
    if type(error).__name__ == "NoArgsIsHelpError":
        return  # the help was shown
    context = getattr(error, "ctx", None)
    message = error.format_message().strip().replace("Value error, ", "")  # pydantic's word, in some versions of Typer
    lines = [message if message.endswith((".", "?")) else f"{message}."]
    if context is not None:
        lines += [" ".join(context.get_usage().split()), f"See {context.command_path} --help."]
    terminal.error("\n".join(lines))


app = typer.Typer(
    name="cadapter",
    cls=_Program,
    help="Train, measure and convert Control Adapters: one low-rank adapter that enhances and suppresses.",
    epilog=_examples(["cadapter train config.toml", "cadapter eval config.toml"]) + "\n\n" + _exit_codes(),
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    pretty_exceptions_show_locals=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"cadapter {__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    quiet: Quiet = False,
    debug: Debug = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    global _debug
    _debug = debug
    terminal.set_quiet(quiet)


@contextmanager
def _errors_as_exit_codes() -> Iterator[None]:
    """Turn what a command raises into a few plain lines and an exit code; a traceback appears only with --debug."""
    try:
        yield
    except (BrokenPipeError, *_ERRORS_OF_TYPER):
        raise  # Typer's own business
    except CadapterError as error:
        _show_traceback()
        if isinstance(error, Stopped):
            print(error, file=sys.stderr)
        else:
            terminal.error(str(error))
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        _show_traceback()
        print("interrupted", file=sys.stderr)
        raise typer.Exit(130) from None
    except OSError as error:
        if error.filename is None or error.strerror is None:
            raise _internal(error) from None
        _show_traceback()  # a name that is too long, or what this user may not read
        terminal.error(f"{error.filename}: {error.strerror}.")
        raise typer.Exit(1) from None
    except Exception as error:
        raise (_out_of_memory(error) if type(error).__name__ == "OutOfMemoryError" else _internal(error)) from None


def _out_of_memory(error: Exception) -> typer.Exit:
    """Tell of a GPU that is too small; ``error`` is torch's."""
    from cadapter.training.out_of_memory import BESIDE_OTHERS, what_was_asked

    _show_traceback()
    elsewhere = "With --device cpu, where a command has it, none is used."
    terminal.error(f"GPU memory ran out: {what_was_asked(error)}.\n{BESIDE_OTHERS} {elsewhere}")
    return typer.Exit(1)


def _internal(error: Exception) -> typer.Exit:
    """Tell of an error that is nobody's mistake but ours."""
    _show_traceback()
    hint = "" if _debug else "\nRun again with --debug for the traceback, and report it."
    terminal.error(f"internal error: {type(error).__name__}: {error}{hint}")
    return typer.Exit(1)


def _show_traceback() -> None:
    if _debug:
        import traceback

        traceback.print_exc()


def _guarded(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` with ``--quiet`` and ``--debug`` after its own options, and with its errors as exit codes.

    In paths, ~ is the user's home directory, also where no shell has seen to it.
    """

    @functools.wraps(command)
    def run(*arguments: Any, quiet: bool, debug: bool, **options: Any) -> None:
        global _debug
        _debug = _debug or debug
        if quiet:
            terminal.set_quiet(True)
        with _errors_as_exit_codes():
            command(*arguments, **{name: _at_home(value) for name, value in options.items()})

    signature = inspect.signature(command, eval_str=True)
    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for name, annotation in (("quiet", Quiet), ("debug", Debug))
    ]
    parameters = [*signature.parameters.values(), *shared]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # Typer reads it
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _at_home(value: Any) -> Any:
    return at_home(value) if isinstance(value, Path) else value


def register(name: str, command: Callable[..., None], examples: Sequence[str]) -> None:
    """Add ``command`` to the program as ``cadapter NAME``; its docstring, a paragraph at a time, is its help."""
    paragraphs = (inspect.getdoc(command) or "").split("\n\n")
    text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    panel = next((title for title, names in PANELS.items() if name in names), None)
    app.command(name, help=text, epilog=_examples(examples), rich_help_panel=panel)(_guarded(command))


for _name in COMMANDS:
    _module = importlib.import_module(f"cadapter.commands.{_name.replace('-', '_')}")
    register(_name, _module.command, _module.EXAMPLES)


def _as_spelt_here(arguments: Sequence[str]) -> list[str]:
    """``arguments`` with the options of ``train`` that were published with underscores in the spelling used here."""
    spelt = list(arguments)
    if "train" in spelt:
        for place, word in enumerate(spelt):
            name, *value = word.split("=", 1)
            if name in PUBLISHED_SPELLINGS:
                spelt[place] = "=".join([name.replace("_", "-"), *value])
    return spelt


def main() -> NoReturn:
    """Run the program with the arguments of the process, and end the process."""
    sys.argv[1:] = _as_spelt_here(sys.argv[1:])
    terminal.own_streams()
    code: str | int | None = 0
    try:
        app(prog_name="cadapter")
    except SystemExit as end:
        code = end.code
    except CannotWrite as error:  # the help, for instance, which Typer prints
        terminal.error(str(error))
        code = error.exit_code
    code = _flushed() or code
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "torch" in sys.modules:
        _end_at_once(code)
    sys.exit(code)


def _flushed() -> int:
    """Write out what is left, and return the exit code that this alone would have."""
    code = 0
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:  # whoever read it has gone, which is no fault
            pass
        except CannotWrite as error:
            code = error.exit_code
            terminal.error(str(error))
    return code


def _end_at_once(code: str | int | None) -> NoReturn:
    """End one of several processes without Python's own way of shutting down.

    Threads of torch's gloo groups (torch 2.13), which nothing stops, may want the interpreter's lock just then, and
    the process aborts after all is done.
    """
    os._exit(code if isinstance(code, int) else int(code is not None))
