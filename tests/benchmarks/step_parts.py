r"""What a step of `cadapter train` consists of: one process, one loaded model, several settings, parts of a step.

    python -m tests.benchmarks.step_parts --shape 8b --settings none selective full offload      # one GPU
    python -m tests.benchmarks.step_parts --shape 8b --set load_in_4bit=true --settings none full
    python -m tests.benchmarks.step_parts --shape tiny --set compile=true --settings none plain:none --steps 3

A setting is a value of `activation_checkpointing` ("none", "2", …), with "plain:" before it where nothing is to be
compiled. For each it prints tokens per second of the whole training loop (median of the steps after the first two), the
peak of memory, where the host's time goes, and on a GPU where a profiled step's time goes: products, attention, fused
elementwise work, copies, idle. The first step of a setting compiles; its length is printed apart. Numbers of different
machines do not compare.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.train_speed import SHAPES, make_model, make_tokenizer, write_config, write_texts

ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
WARM_UP = 2
GIB = 2**30
KINDS = (
    ("attention", ("sdpa", "fmha", "flash", "dot_do_o", "convert_dq")),
    ("products", ("nvjet", "gemm", "cutlass", "splitk")),
    ("dequantising", ("dequant", "_unpack")),
    ("fused elementwise", ("triton",)),
    ("copies", ("memcpy", "memset")),
)
"""Kinds of kernels, by parts of their names; the first that fits."""


class Notes:
    """Stands in for the reporter: keeps the numbers of each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def phase(self, text: str) -> None:
        """What the trainer is at is of no interest here."""

    def training_step(self, _step: int, _epoch: int, _tokens: int, _seconds: float, values: Any, *_more: Any) -> None:
        self.steps.append(values)


def kind_of(kernel: str) -> str:
    return next((kind for kind, parts in KINDS if any(part in kernel.lower() for part in parts)), "other")


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def print_parts(trainer: Any, micro_batches: int) -> None:
    """Profile one step and print the milliseconds of a micro-batch by kind of kernel."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        trainer._step()
        synchronise()
    kernels = [event for event in profiled.events() if str(event.device_type).endswith("CUDA")]
    spans = sorted((event.time_range.start, event.time_range.end) for event in kernels)
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    parts: Counter[str] = Counter()
    for event in kernels:
        parts[kind_of(event.name)] += event.time_range.end - event.time_range.start
    per_batch = {kind: total / 1000 / micro_batches for kind, total in parts.most_common()}
    idle = (reached - spans[0][0] - busy) / 1000 / micro_batches
    print(
        "    ms a micro-batch: "
        + ", ".join(f"{kind} {ms:.1f}" for kind, ms in per_batch.items())
        + f", idle {idle:.1f}"
    )


class HostTimes:
    """Where the host's time goes in a step; what it does before it waits for the GPU hides behind the GPU's work."""

    def __init__(self, trainer: Any) -> None:
        self.seconds: Counter[str] = Counter()
        run = trainer.run
        for owner, name in (
            (run.pipeline, "train"), (trainer, "_flush"), (trainer, "_micro_batches"), (trainer, "_agree"),
            (run.optimiser, "step"), (run.trained, "after_step"),
        ):  # fmt: skip
            self._time(owner, name)

    def _time(self, owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - started

        setattr(owner, name, timed)

    def in_words(self, steps: int) -> str:
        return ", ".join(f"{name} {total / steps * 1000:.0f}" for name, total in self.seconds.most_common())


def measure(trainer: Any, notes: Notes, name: str, options: argparse.Namespace) -> None:
    """Take the steps of one setting and print its numbers."""
    config = trainer.run.config
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    notes.steps.clear()
    seconds = []
    host = None
    for step in range(WARM_UP + options.steps):
        if step == WARM_UP:
            host = HostTimes(trainer)
        started = time.perf_counter()
        trainer._step()
        seconds.append(time.perf_counter() - started)
    synchronise()
    trainer._flush()
    tokens = config.gradient_accumulation_steps * config.micro_batch_size * config.sequence_len
    rates = [tokens / each for each in seconds[WARM_UP:]]
    peak = torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else 0
    print(
        f"{name:<16} {statistics.median(rates):8,.0f} tokens/s (lowest {min(rates):,.0f}, highest {max(rates):,.0f}), "
        f"peak {peak:.2f} GiB, first step {seconds[0]:.1f} s, loss {notes.steps[0]['train/loss']:.4f} to "
        f"{notes.steps[-1]['train/loss']:.4f}",
        flush=True,
    )
    assert host is not None
    print(f"    ms of the host a step: {host.in_words(options.steps)}")
    if torch.cuda.is_available():
        print_parts(trainer, config.gradient_accumulation_steps)


def run(directory: Path, options: argparse.Namespace) -> None:
    """Load the model as the command does, then measure each setting."""
    from cadapter.config.loading import load_config
    from cadapter.models.layers import DecoderLayer, HeadLayer, run_norm
    from cadapter.models.loss import PLAIN_OPERATIONS
    from cadapter.training.build import build_run, plan_run
    from cadapter.training.failures import joined_world
    from cadapter.training.run import prepare_for_speed
    from cadapter.training.run_directory import RunDirectory
    from cadapter.training.signals import StopSignals
    from cadapter.training.trainer import Trainer

    os.environ.update(ALONE)
    with joined_world() as world, contextlib.ExitStack() as stack:
        plan = plan_run(load_config(directory / "config.toml", options.set), world)
        started = time.perf_counter()
        made = build_run(plan, world, RunDirectory(directory / "run"), None)
        synchronise()
        loaded = time.perf_counter() - started
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        print(f"--- {device}, torch {torch.__version__}, {', '.join(options.set) or 'Control Adapters'}")
        print(f"loaded in {loaded:.1f} s, of which reading {plan.model.checkpoint.seconds_reading:.1f} s")
        prepare_for_speed(plan, world, stack)
        notes = Notes()
        layers = [layer for layer in made.pipeline.layers() if isinstance(layer, DecoderLayer)]
        (head,) = (layer for layer in made.pipeline.layers() if isinstance(layer, HeadLayer))
        compiled = plan.builder.runner._compiled, made.loss._operations, head.run
        for setting in options.settings:
            is_plain, keep = setting.startswith("plain:"), setting.removeprefix("plain:")
            plan.builder.runner._compiled, made.loss._operations, head.run = (
                (None, PLAIN_OPERATIONS, run_norm) if is_plain else compiled
            )
            for layer in layers:
                every = int(keep) if keep.isdigit() else 1
                layer.keep = "none" if layer.index % every else "full" if keep.isdigit() else keep
            measure(Trainer(made, notes, StopSignals()), notes, setting, options)  # type: ignore[arg-type]


def main() -> None:
    """Make model and texts (or take those of an earlier run), and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--settings", nargs="+", default=["none", "selective", "full", "offload"])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--accumulation", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--keep-in", type=Path, metavar="DIR", help="make the model here, or take it from here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = options.keep_in or Path(folder)
        if not (directory / "model" / "config.json").exists():
            (directory / "model").mkdir(parents=True)
            shape = SHAPES[options.shape]
            words = make_tokenizer(directory / "model")
            make_model(directory / "model", shape)
            tokens = (WARM_UP + options.steps + 2) * options.accumulation * int(str(shape["sequence_len"]))
            for name in ("positive", "negative"):
                write_texts(directory / f"{name}.jsonl", words, tokens // 2)
        options.steps, steps = 10**6, options.steps  # as many as the epochs have
        write_config(directory, SHAPES[options.shape], options)
        options.steps = steps
        options.set.append("epochs=1000")
        run(directory, options)


if __name__ == "__main__":
    main()
