r"""The same training on several GPUs in every layout: losses, adapters, resuming, a failing rank. By hand, with NCCL.

    python tests/benchmarks/gpu_layouts.py              # all visible GPUs; two or more
    python tests/benchmarks/gpu_layouts.py --only-memory

What the tests prove with processes on the CPU (gloo) is shown here for NCCL: a tiny model in float32 is trained on one
GPU and in layouts of all of them, and the losses must agree to 1e-5 and the adapters to 1e-4. A run is stopped by
SIGTERM, resumed in another layout, and must end at the same losses. A rank that is killed must end the whole run. On
one GPU PyTorch may take less than a step needs there: the run must go on with a slower setting, to the losses of a run
that was given this setting; and where it may take next to nothing, the run must end with an error that says so.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from tests.joined_processes import run_program
from tests.tiny_project import Project, make_project, metrics

LOSS, ADAPTER, STEPS, SEQUENCES = 1e-5, 1e-4, 10, 16
KEYS = {
    "kinds": ("positive", "negative", "neutral"), "control_class0_lambda": 0.5, "max_steps": STEPS,
    "lora_dropout": 0.1, "compile": False, "eval_fraction": 0.1, "evals_per_run": 2,
}  # fmt: skip

LIMITED = """
import os, sys, torch
from cadapter.cli import main
from cadapter.training.rehearsal import Rehearsal
from cadapter.training.trainer import Trainer

attempt, connected, train = Rehearsal._attempt, Rehearsal._connected, Trainer.train
rank = os.environ["RANK"]

def tell(when):
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    outside = total - free - torch.cuda.memory_reserved()
    print(f"    rank {rank}, {when}: {outside >> 20} MiB are taken outside of PyTorch", flush=True)

def telling(self, *step):
    tell("before connecting")
    received = connected(self, *step)
    tell("after connecting")
    return received

def limited(self, *step):
    if rank == "0" and self.keep == "none":
        assert attempt(self, *step) is None
        needed = torch.cuda.max_memory_allocated()
        self.forget()
        allowed = (needed - 2**25) * float(os.environ["SHARE"])
        torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.mem_get_info()[1])
        print(f"    rank 0 needs {needed >> 20} MiB and may have {int(allowed) >> 20}", flush=True)
    return attempt(self, *step)

def trained(self):
    train(self)
    tell("in the end")

Rehearsal._attempt, Rehearsal._connected, Trainer.train = limited, telling, trained
sys.argv = ["cadapter", "train", sys.argv[1]]
main()
"""
"""On rank 0 PyTorch may take SHARE of what a step takes that keeps everything, less 32 MiB."""


def train(config: Path, gpus: int, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the command; prints what it said where it failed."""
    command = [sys.executable, "-m", "cadapter", "train", str(config), "--num-gpus", str(gpus), *options]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 143):
        print(done.stdout[-1500:], done.stderr[-3000:], sep="\n")
    print(f"    {' '.join(command[4:])}: exit code {done.returncode}, {time.monotonic() - started:.0f} s", flush=True)
    return done


def keys_of(stages: int, gpus: int) -> dict[str, int]:
    """A layout of ``gpus`` processes with the same sequences a step."""
    return {"pipeline_stages": stages, "gradient_accumulation_steps": SEQUENCES // (gpus // stages)}


def difference(one: Path, other: Path) -> tuple[float, float]:
    """The largest relative difference of losses and of an adapter's tensors."""
    losses = max(
        abs(a[name] - b[name]) / abs(a[name])
        for a, b in zip(metrics(one), metrics(other), strict=True)
        for name in ("train/loss", "train/loss_pos", "train/loss_neg", "train/loss_neutral")
        if a.get(name)
    )
    first, second = (load_file(each / "final" / "adapter_model.safetensors") for each in (one, other))
    adapters = max(float((first[name] - second[name]).norm() / first[name].norm()) for name in first)
    return losses, adapters


def stopped_and_resumed(project: Project, gpus: int, reference: Path) -> bool:
    """SIGTERM in the middle on all GPUs, resumed as one process."""
    config = project.write_config("stopped", **KEYS, **keys_of(gpus, gpus))
    command = [sys.executable, "-m", "cadapter", "train", str(config), "--num-gpus", str(gpus)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = project.root / "stopped" / "metrics.jsonl"
    while process.poll() is None and (not lines.is_file() or len(lines.read_text().splitlines()) < 3):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    code = process.wait()
    done = len(metrics(project.root / "stopped"))
    print(f"    SIGTERM after {done} steps: exit code {code}", flush=True)
    config = project.write_config("stopped", **KEYS, **keys_of(1, 1))
    again = train(config, 1, "--resume-from-checkpoint")
    losses, adapters = difference(reference, project.root / "stopped")
    print(f"    losses differ by {losses:.1e}, adapters by {adapters:.1e}")
    return code == 143 and again.returncode == 0 and 0 < done < STEPS and losses < LOSS and adapters < ADAPTER


def one_rank_is_killed(project: Project, gpus: int) -> bool:
    """SIGKILL to one worker: the command must end soon, with an error, and leave no process."""
    import psutil

    config = project.write_config("killed", **{**KEYS, **keys_of(gpus, gpus), "max_steps": 5000, "epochs": 500})
    command = [sys.executable, "-m", "cadapter", "train", str(config), "--num-gpus", str(gpus)]
    with tempfile.TemporaryFile("w+") as said:
        process = psutil.Popen(command, stdout=said, stderr=said)
        lines = project.root / "killed" / "metrics.jsonl"
        while process.poll() is None and (not lines.is_file() or len(lines.read_text().splitlines()) < 3):
            time.sleep(0.05)
        workers = [one for one in process.children(recursive=True) if one.environ().get("RANK") == str(gpus - 1)]
        workers[0].kill()
        started = time.monotonic()
        everyone = process.children(recursive=True)
        code = process.wait(timeout=120)
        seconds = time.monotonic() - started
        left = [one for one in everyone if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
        said.seek(0)
        errors = [line for line in said.read().splitlines() if line.startswith("error")]
    print(
        f"    one rank killed: exit code {code} after {seconds:.1f} s, {len(left)} processes left, said: {errors[:2]}"
    )
    return code not in (0, 143) and not left


def one_gpu_is_full(folder: Path, gpus: int) -> bool:
    """Rank 0 can have less memory than it needs to keep everything, then less than it needs at all."""
    project = make_project(folder, documents=2000)
    shape = {"sequence_len": 256, "micro_batch_size": 64, "gradient_accumulation_steps": 4, "pipeline_stages": gpus}
    keys = {**KEYS, **shape, "max_steps": 3}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus))))
    kept: list[str] = []
    for name, share in (("limited", 1.0), ("starved", 0.2)):
        codes, said, seconds = run_program(
            LIMITED, gpus, project.write_config(name, **keys), SHARE=str(share), CUDA_VISIBLE_DEVICES=visible
        )
        told = [line for line in said.splitlines() if re.search("memory ran out|rank 0 needs|outside of PyTorch", line)]
        print(f"    {name}: exit codes {codes}, {seconds:.0f} s", *told, sep="\n", flush=True)
        if name == "limited":
            kept = re.findall(r"going on with activation_checkpointing = '(\w+)'", said)
            if codes != [0] * gpus or not kept:
                print(said[-3000:])
                return False
    plain = project.write_config("given", **keys, activation_checkpointing=kept[-1])
    train(plain, gpus)
    losses, adapters = difference(project.root / "limited", project.root / "given")
    print(f"    {kept[-1]} instead of none: losses differ by {losses:.1e}, adapters by {adapters:.1e}", flush=True)
    ended = codes == [1] * gpus and said.count("error: GPU memory ran out, rehearsal of a step") == 1
    return ended and losses < LOSS and adapters < ADAPTER


def main() -> int:
    """Compare all layouts; exit code 1 where something does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--only-memory", action="store_true", help="only the GPU whose memory is too small")
    options = parser.parse_args()
    gpus = options.gpus
    if torch.cuda.is_available():
        print(f"{gpus} × {torch.cuda.get_device_name()}, torch {torch.__version__}, NCCL {torch.cuda.nccl.version()}")
    else:
        print(f"{gpus} processes on the CPU (gloo): this tries the script and says nothing of GPUs")
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    verdicts = {}
    if torch.cuda.is_available():
        with tempfile.TemporaryDirectory() as folder:
            verdicts["one GPU too small"] = one_gpu_is_full(Path(folder), gpus)
    if options.only_memory:
        print(json.dumps(verdicts))
        return 0 if verdicts and all(verdicts.values()) else 1
    with tempfile.TemporaryDirectory() as folder:
        project = make_project(Path(folder))
        train(project.write_config("one", **KEYS, **keys_of(1, 1)), 1)
        layouts = [(stages, gpus) for stages in range(1, gpus + 1) if gpus % stages == 0]
        for stages, count in layouts:
            name = f"{stages} stages × {count // stages} replicas"
            train(project.write_config(f"layout-{stages}", **KEYS, **keys_of(stages, count)), count)
            losses, adapters = difference(project.root / "one", project.root / f"layout-{stages}")
            print(f"    losses differ by {losses:.1e}, adapters by {adapters:.1e}", flush=True)
            verdicts[name] = losses < LOSS and adapters < ADAPTER
        verdicts["stopped and resumed"] = stopped_and_resumed(project, gpus, project.root / "one")
        verdicts["one rank killed"] = one_rank_is_killed(project, gpus)
    print(json.dumps(verdicts))
    return 0 if all(verdicts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
