r"""The same training on several GPUs in every layout: losses, adapters, resuming, a failing rank. By hand, with NCCL.

    python tests/benchmarks/gpu_layouts.py              # all visible GPUs; two or more

What the tests prove with processes on the CPU (gloo) is shown here for NCCL: a tiny model in float32 is trained on one
GPU and in layouts of all of them, and the losses must agree to 1e-5 and the adapters to 1e-4. A run is stopped by
SIGTERM, resumed in another layout, and must end at the same losses. A rank that is killed must end the whole run.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from tests.tiny_project import Project, make_project, metrics

LOSS, ADAPTER, STEPS, SEQUENCES = 1e-5, 1e-4, 10, 16
KEYS = {
    "kinds": ("positive", "negative", "neutral"), "control_class0_lambda": 0.5, "max_steps": STEPS,
    "lora_dropout": 0.1, "compile": False, "eval_fraction": 0.1, "evals_per_run": 2,
}  # fmt: skip


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


def main() -> int:
    """Compare all layouts; exit code 1 where something does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count() or 2)
    gpus = parser.parse_args().gpus
    if torch.cuda.is_available():
        print(f"{gpus} × {torch.cuda.get_device_name()}, torch {torch.__version__}, NCCL {torch.cuda.nccl.version()}")
    else:
        print(f"{gpus} processes on the CPU (gloo): this tries the script and says nothing of GPUs")
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    verdicts = {}
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
