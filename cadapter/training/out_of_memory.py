"""What is said where GPU memory runs out: which of a run's settings would take less than those that it has."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Iterator

import torch

from cadapter.config import Config
from cadapter.errors import CadapterError
from cadapter.planning.fitting import changes
from cadapter.training.distributed import World
from cadapter.training.held_out import splits_documents
from cadapter.training.modes.base import Mode
from cadapter.training.sizes import situation_of

BESIDE_OTHERS = "Does another program use the GPU? `nvidia-smi` shows it."
LARGER = "Nothing in the config would take less: a larger GPU is needed."
_PLAN = "`cadapter plan CONFIG --gpu-memory GIB` says which of these fits."

KEPT = "activation_checkpointing"
WEIGHTS = ("load_in_4bit", "pipeline_stages", "dtype")
"""The settings on which it depends how much the weights of the base take."""
_IN_WORDS = {
    "micro_batch_size": "a smaller micro_batch_size",
    "gradient_dtype": 'gradient_dtype = "bfloat16"',
    "load_in_4bit": "load_in_4bit = true",
    "layers_to_transform": "fewer layers in layers_to_transform",
    "sequence_len": "a shorter sequence_len",
    "lora_rank": "a lower lora_rank",
    "dtype": 'dtype = "bfloat16"',
}


def out_of_memory(error: torch.OutOfMemoryError, phase: str, advice: str = BESIDE_OTHERS) -> CadapterError:
    """What a user is told of ``error``, which came in this phase of a run."""
    told = CadapterError(f"GPU memory ran out, {phase}: {what_was_asked(error)}.\n{advice}")
    told.__cause__ = error
    return told


def what_was_asked(error: Exception) -> str:
    """How much memory, as torch's OutOfMemoryError says."""
    asked = re.search(r"Tried to allocate [\d.]+ \w+", str(error))
    return asked[0] if asked else type(error).__name__


@contextlib.contextmanager
def advising(world: World, advice: Callable[[], str]) -> Iterator[None]:
    """Where GPU memory runs out in the block, say so with this advice.

    Raises:
        CadapterError: it ran out.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise out_of_memory(error, world.watch.own.phase, advice()) from error


def training_advice(
    config: Config, mode: Mode, processes: int, kept: str | int | None, only: Collection[str] | None = None
) -> str:
    """Which settings would make a run take less memory.

    Args:
        config, mode: of the run.
        processes: on which it runs.
        kept: what its blocks keep now, which "auto" may have chosen; None: that does not matter.
        only: the keys that matter; None: all.
    """
    found = [words for key, words in _less(config, mode, processes, kept).items() if only is None or key in only]
    return f"Less is taken with {_either(found)}.\n{_PLAN}" if found else LARGER


def evaluation_advice(config: Config, mode: Mode, processes: int, strengths: int) -> str:
    """Which settings would make an evaluation of so many strengths, the base among them, take less memory."""
    fewer = ["fewer strengths (--strength)"] if mode.name == "control" and strengths > 2 else []
    less = _less(config, mode, processes, None)
    shorter = ["sequence_len"] if splits_documents(config) else []  # or else other documents would be held out
    found = [*fewer, *(less[key] for key in (*shorter, *WEIGHTS) if key in less)]
    return f"Less is taken with {_either(found)}." if found else LARGER


def _less(config: Config, mode: Mode, processes: int, kept: str | int | None) -> dict[str, str]:
    """Changes that take less memory, by key, in words."""
    if kept is None:
        kept = "offload"  # beyond which there is nothing
    elif isinstance(kept, int):
        kept = "full" if kept == 1 else "selective"  # keeping half of everything may be no less than every second block
    found = changes(situation_of(config, mode, processes, kept))
    words: dict[str, str] = {}
    levels = [f'"{settings[KEPT]}"' for settings in found if KEPT in settings]
    if levels:
        words[KEPT] = f"{KEPT} = {_either(levels)}"
    for settings in found:
        key = next(iter(settings))
        if key == "pipeline_stages":
            stages = settings[key]
            words.setdefault(key, f"{key} = {stages}" + (f" on {stages} GPUs" if processes % stages else ""))
        elif key != KEPT:
            words[key] = _IN_WORDS[key]
    if mode.name != "full" and config.lora_rank > 1:
        words["lora_rank"] = _IN_WORDS["lora_rank"]
    if config.dtype == "float32":
        words["dtype"] = _IN_WORDS["dtype"]
    return words


def _either(words: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
