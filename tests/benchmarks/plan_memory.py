r"""The memory that a plan predicts beside what training takes: the real command on a random model, setting by setting.

    python -m tests.benchmarks.plan_memory --shape 8b                  # one GPU with 40 GiB or more free
    python -m tests.benchmarks.plan_memory --shape 8b --only control "4 bits" --keep-in /tmp/plan
    python -m tests.benchmarks.plan_memory --shape 1b --only full-tuning
    python -m tests.benchmarks.plan_memory --shape tiny                # a laptop's CPU
    python -m tests.benchmarks.plan_memory --list

For each setting: the parts of the prediction, the predicted peak, the measured one (PyTorch's own count of what it had
allocated, ``torch.cuda.max_memory_allocated``), and how far they are apart. ``--only`` takes the settings whose names
contain one of the words. On a CPU what is measured is how far the process's resident memory rose above what it was
before the model was loaded; that is blurred by whatever else the process does, and says that the script works.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from tests.benchmarks.train_speed import SHAPES, make_model, make_tokenizer, write_config, write_texts

GIB = 2**30
LORA = ["use_control_adapters=false", "datasets.1.control_class=1"]
LORA_64 = [*LORA, "lora_rank=64", "lora_weight_decay=10"]
FULL = [*LORA, "full_fine_tune=true", "lora_weight_decay=0", "lr=1e-6"]
BITS = "load_in_4bit=true"


def keep(what: str) -> str:
    return f'activation_checkpointing="{what}"'


SETTINGS: dict[str, list[str]] = {
    "control, none": [keep("none")],
    "control, selective": [keep("selective")],
    "control, every 2nd layer": ["activation_checkpointing=2"],
    "control, full": [keep("full")],
    "control, offload": [keep("offload")],
    "control, none, not compiled": [keep("none"), "compile=false"],
    "control, full, not compiled": [keep("full"), "compile=false"],
    "control in 4 bits, none": [BITS, keep("none")],
    "control in 4 bits, full": [BITS, keep("full")],
    "control at writes, none": ['control_site="writes"', keep("none")],
    "control on the upper half, none": ["layers_to_transform=UPPER", keep("none")],
    "control, 2 rows, selective": ["micro_batch_size=2", keep("selective")],
    "isolated documents, none": ['document_attention="isolated"', keep("none")],
    "isolated documents by a mask, none": [
        'document_attention="isolated"',
        'attn_implementation="sdpa"',
        keep("none"),
    ],
    "lora, none": [*LORA_64, keep("none")],
    "lora, selective": [*LORA_64, keep("selective")],
    "lora, full": [*LORA_64, keep("full")],
    "lora on writers, none": [*LORA_64, 'target_modules=["o_proj", "down_proj"]', keep("none")],
    "lora in 4 bits, none": [*LORA_64, BITS, keep("none")],
    "lora in 4 bits, full": [*LORA_64, BITS, keep("full")],
    "full-tuning, none": [*FULL, keep("none")],
    "full-tuning, full, bfloat16 gradients": [*FULL, keep("full"), 'gradient_dtype="bfloat16"'],
}
"""What is set besides the config of ``train_speed``; full fine-tuning of the 8B shape does not fit 80 GB."""
NEEDS_MORE = ("full-tuning",)

WORKER = """
import atexit, resource, sys
import torch
from cadapter.cli import main
import cadapter.training.run as run

build = run.build_run

def noted(*args, **kwargs):
    if not torch.cuda.is_available():
        print("BEFORE", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return build(*args, **kwargs)

def tell():
    if torch.cuda.is_available():
        print("PEAK", torch.cuda.max_memory_allocated())
    else:
        print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    sys.stdout.flush()

run.build_run = noted
train = run.train

def told(*args, **kwargs):
    train(*args, **kwargs)
    tell()

run.train = told
main()
"""
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29519"}


def predicted(directory: Path, overrides: list[str]) -> tuple[dict[str, float], float]:
    """The parts of the plan, and its peak, in bytes."""
    from dataclasses import replace

    from cadapter.config import load_config
    from cadapter.planning.memory import stage_memory
    from cadapter.training.forecast import outlook_of
    from cadapter.training.recompute import decide

    config = load_config(directory / "config.toml", overrides)
    sizes = outlook_of(config).sizes
    if not torch.cuda.is_available():
        sizes = replace(sizes, compiled=config.compile is True)
    keep_of = decide(config.activation_checkpointing, lambda _: 0.0, None).block
    memory = stage_memory(sizes, [0, len(sizes.layer_bytes)], 0, keep_of)
    return memory.parts(), memory.total


def measured(directory: Path, overrides: list[str]) -> float | None:
    """Bytes at the peak of a run; None, with what was printed, where it failed."""
    options = [part for value in overrides for part in ("--set", value)]
    command = [sys.executable, "-c", WORKER, "train", str(directory / "config.toml"), "--force", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **ALONE})
    numbers = dict(line.split() for line in done.stdout.splitlines() if line.startswith(("PEAK ", "BEFORE ")))
    if done.returncode or "PEAK" not in numbers:
        print(done.stdout[-1500:], done.stderr[-1500:], sep="\n")
        return None
    return float(numbers["PEAK"]) - float(numbers.get("BEFORE", 0))


def make(directory: Path, options: argparse.Namespace) -> None:
    """Model, texts and config, unless an earlier run has left them."""
    shape = SHAPES[options.shape]
    if not (directory / "model" / "config.json").exists():
        (directory / "model").mkdir(parents=True)
        words = make_tokenizer(directory / "model")
        make_model(directory / "model", shape)
        tokens = 2 * options.steps * options.accumulation * int(str(shape["sequence_len"]))
        for name in ("positive", "negative"):
            write_texts(directory / f"{name}.jsonl", words, tokens)
    write_config(directory, shape, options)


def compare(directory: Path, name: str, layers: int, file: list[dict[str, object]]) -> None:
    """Print one setting's line."""
    upper = f'"{layers // 2}:{layers - 1}"'
    overrides = [value.replace("UPPER", upper) for value in SETTINGS[name]]
    parts, expected = predicted(directory, overrides)
    found = measured(directory, overrides)
    ratio = "failed" if found is None else f"{expected / found - 1:+7.1%}"
    shown = "-" if found is None else f"{found / GIB:8.3f}"
    words = ", ".join(f"{part} {size / GIB:.2f}" for part, size in parts.items())
    print(f"{name:<40} {expected / GIB:8.3f} {shown:>8} {ratio:>8}   {words}", flush=True)
    file.append({"setting": name, "predicted": expected, "measured": found, "parts": parts})


def main() -> None:
    """Make everything, then predict and measure each setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--accumulation", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="the settings whose names contain one of these")
    parser.add_argument("--keep-in", type=Path, metavar="DIR", help="make the model here, or take it from here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers, too")
    parser.add_argument("--list", action="store_true", help="name the settings")
    options = parser.parse_args()
    default = [name for name in SETTINGS if options.shape != "8b" or not name.startswith(NEEDS_MORE)]
    names = default if not options.only else [name for name in SETTINGS if any(word in name for word in options.only)]
    if options.list:
        print("\n".join(names))
        return
    on_gpu = torch.cuda.is_available()
    numbers: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        directory = options.keep_in or Path(folder)
        make(directory, options)
        device = torch.cuda.get_device_name() if on_gpu else "CPU (resident memory, rough)"
        print(f"{device}, torch {torch.__version__}, shape {options.shape}, {options.steps} steps; GiB")
        print(f"{'setting':<40} predicted measured     off   parts of the prediction")
        layers = int(str(SHAPES[options.shape]["num_hidden_layers"]))
        for name in names:
            compare(directory, name, layers, numbers)
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    off = [abs(each["predicted"] / each["measured"] - 1) for each in numbers if each["measured"]]  # type: ignore[operator]
    print(f"{len(off)} of {len(numbers)} settings measured; the largest difference {max(off, default=0):.1%}")


if __name__ == "__main__":
    main()
