"""Kills a training run at random moments, resumes it until it is done, and compares it with one that nobody killed.

    python -m tests.training.soak --kills 50 --in-checkpoint 12 --seed 1

The run has two pipeline stages: a parent (the command), DeepSpeed's launcher and two workers. SIGKILL goes to all of
them at once or to one of them, at a moment drawn from the seed. A run that completes before there were kills enough
is compared, and the next one starts in a fresh directory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from safetensors.torch import load_file
from torch import Tensor

from cadapter.training.schedule import evaluation_steps
from cadapter.training.state import newest_checkpoint
from tests.tiny_project import Project, command, environment, make_model, metrics, texts, write_jsonl

STEPS, EVALUATIONS = 30, 5
KEYS: dict[str, Any] = {
    "kinds": ("positive", "negative", "neutral"), "control_class0_lambda": 0.5, "lora_dropout": 0.1, "lora_rank": 128,
    "max_steps": STEPS, "gradient_accumulation_steps": 4, "eval_fraction": 0.1, "evals_per_run": EVALUATIONS,
    "checkpoint_interval_steps": 1, "pipeline_stages": 2,
}  # fmt: skip
TOKEN = "CADAPTER_TEST_JOB"
"""A variable in the environment of all processes of a job, and of no other."""

PATIENCE = 30.0
"""Seconds that the rest of a job has to end by itself: the deadlines of the workers (2 s and 5 s), the launcher's
polling, and the imports of workers that are just starting on a machine with other work."""
STEPS_AFTER = 2
"""Steps that the rest of a job may still complete: those under way as the signal was sent, and one as it comes."""
LONGEST = 180.0
"""Seconds after which a job that does not reach its moment hangs."""

VICTIMS = {"all": 45, "worker 0": 14, "worker 1": 14, "parent": 14, "launcher": 13}
MOMENTS = {"start-up": 20, "step": 22, "evaluation": 13, "checkpoint": 37, "final": 8}


@dataclass
class Kill:
    """One kill and what followed.

    Attributes:
        run: number of the run, from 1.
        start: how often the run had been started, this time included.
        victim: of :data:`VICTIMS`; all where the one that was drawn did not live yet.
        where: what the run was doing, judged by its directory as the signal was sent.
        step: newest complete checkpoint before the kill.
        inside: a checkpoint's temporary directory was there after the signal was sent.
        torn: one was left behind, half written, when no process was left.
        seconds: until no process was left; None: some had to be killed.
        faults: what was wrong afterwards.
    """

    run: int
    start: int
    victim: str
    where: str
    step: int
    inside: bool
    torn: int = 0
    seconds: float | None = None
    faults: list[str] = field(default_factory=list)


@dataclass
class Comparison:
    """A completed run against the one that was not killed."""

    run: int
    starts: int
    differing_bits: int
    differing_lines: int
    leftovers: int
    faults: list[str]


@dataclass
class Outcome:
    """All that a soak found."""

    kills: list[Kill] = field(default_factory=list)
    runs: list[Comparison] = field(default_factory=list)
    resumes: int = 0
    missed: int = 0

    @property
    def inside(self) -> int:
        """Kills inside a checkpoint write."""
        return sum(kill.inside for kill in self.kills)

    @property
    def faults(self) -> list[str]:
        """Everything that should not have happened."""
        killed = [f"run {kill.run}, start {kill.start}, {kill.victim}: {fault}" for kill in self.kills
                  for fault in kill.faults]  # fmt: skip
        return killed + [f"run {each.run}: {fault}" for each in self.runs for fault in each.faults]


# ---- looking at a run from outside ----------------------------------------------------------------------------------


def half_written(directory: Path, stem: str) -> list[str]:
    """Names of temporary siblings of ``stem``… in a directory."""
    with contextlib.suppress(FileNotFoundError):
        return [name for name in os.listdir(directory) if name.startswith(f".{stem}") and ".partial-" in name]
    return []


def leftovers(directory: Path) -> list[str]:
    """What writes that did not end left anywhere under a directory."""
    names = ("*.partial-*", "*.replaced-*", "*.removed-*")
    return sorted(str(path.relative_to(directory)) for name in names for path in directory.rglob(name))


def newest_step(directory: Path) -> int:
    """Step of the newest checkpoint by name, 0 where there is none."""
    with contextlib.suppress(FileNotFoundError):
        names = [name for name in os.listdir(directory / "checkpoints") if name.startswith("step-")]
        return max((int(name.removeprefix("step-")) for name in names), default=0)
    return 0


def is_evaluating(directory: Path) -> bool:
    """Whether the last thing told is a step after which an evaluation is due."""
    try:
        line = json.loads((directory / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
    except (FileNotFoundError, IndexError, ValueError):
        return False
    return "train/loss" in line and line["step"] in evaluation_steps(EVALUATIONS, STEPS)


def doing(directory: Path, old: set[str], step_at_start: int) -> str:
    """What a run is doing, judged by its directory; ``old`` are temporary directories of earlier starts."""
    if set(half_written(directory / "checkpoints", "step-")) - old:
        return "checkpoint"
    if half_written(directory, "final") or half_written(directory, "best"):
        return "adapter"
    if newest_step(directory) == STEPS:
        return "end"
    if newest_step(directory) == step_at_start:
        return "start-up"
    return "evaluation" if is_evaluating(directory) else "step"


# ---- a job and its processes ----------------------------------------------------------------------------------------


class Job:
    """One start of ``cadapter train`` with two workers; what it prints goes to a file."""

    def __init__(self, config: Path, output: Path, resume: bool) -> None:
        self.token = uuid.uuid4().hex
        self.output = output
        options = ["--resume-from-checkpoint"] if resume else []
        with open(output, "w", encoding="utf-8") as file:
            self.process = psutil.Popen(
                command("train", config, "--num-gpus", 2, *options),
                env=environment(**{TOKEN: self.token}), stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            )  # fmt: skip

    def said(self) -> str:
        return self.output.read_text("utf-8")

    def members(self) -> list[psutil.Process]:
        """All living processes that carry the job's token, whoever their parent is now."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(TOKEN) == self.token and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def victims(self, name: str) -> list[psutil.Process]:
        """The living processes that ``name`` of :data:`VICTIMS` stands for; none where it does not live yet."""
        members = self.members()
        chosen = {"all": members, "parent": [one for one in members if one.pid == self.process.pid]}.get(name)
        if chosen is None:
            chosen = []
            for one in members:
                with contextlib.suppress(psutil.Error):
                    rank = one.environ().get("RANK")
                    is_launcher = rank is None and one.pid != self.process.pid
                    if name == (f"worker {rank}" if rank is not None else "launcher" if is_launcher else ""):
                        chosen.append(one)
        return chosen

    def wait_until(self, ready: Callable[[], bool]) -> bool:
        """Wait for something that happens while the job lives; False if it ended first."""
        deadline = time.monotonic() + LONGEST
        while not ready():
            if self.process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                raise TimeoutError(f"The job hangs:\n{self.said()}")
            time.sleep(0.0005)
        return True

    def wait_for_the_end(self) -> float | None:
        """Seconds until no process was left, or None if some had to be killed."""
        started = time.monotonic()
        while self.process.poll() is None or self.members():
            if time.monotonic() - started > PATIENCE:
                for one in self.members():
                    with contextlib.suppress(psutil.NoSuchProcess):
                        one.kill()
                self.process.wait()
                return None
            time.sleep(0.05)
        return time.monotonic() - started


# ---- comparing ------------------------------------------------------------------------------------------------------


def tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory's files by name."""
    return {name: one for file in sorted(directory.glob("*.safetensors")) for name, one in load_file(file).items()}


def differing_bits(one: Path, other: Path) -> int:
    """Count bits that differ between the tensors of two directories.

    Raises:
        ValueError: there are no tensors, or not the same ones.
    """
    first, second = tensors(one), tensors(other)
    if not first or {name: (t.dtype, t.shape) for name, t in first.items()} != {
        name: (t.dtype, t.shape) for name, t in second.items()
    }:
        raise ValueError(f"{one} and {other} do not hold the same tensors")
    raw = [{name: t.numpy().ravel().view(np.uint8) for name, t in each.items()} for each in (first, second)]
    return sum(int(np.unpackbits(raw[0][name] ^ raw[1][name]).sum()) for name in first)


def without_time(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without what a clock says."""
    clock = ("seconds", "train/tokens_per_second")
    return [{name: value for name, value in line.items() if name not in clock} for line in lines]


def position(checkpoint: Path) -> dict[str, Any]:
    """state.json without what a clock says, and without the config, which keeps more checkpoints of one of the runs."""
    state = json.loads((checkpoint / "state.json").read_text("utf-8"))
    del state["position"]["seconds"], state["settings"]
    return state


class Soak:
    """A project, the run in it that nobody kills, and the runs that are killed."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root = root
        self.draw = random.Random(seed)
        self.outcome = Outcome()
        self.project = Project(root)
        make_model(root / "model", hidden=256)  # with rank 128, a checkpoint takes some 50 ms to write
        for kind in ("positive", "negative", "neutral"):
            write_jsonl(root / f"{kind}.jsonl", texts(kind, 100))
        self._train_without_kills()

    def _train_without_kills(self) -> None:
        config = self.project.write_config("straight", **KEYS, max_checkpoints=STEPS)
        self.straight = self.root / "straight"
        job, started = Job(config, self.root / "straight.txt", resume=False), time.monotonic()
        lives: list[float] = []
        self.start_up = 0.0
        while job.wait_until(lambda: bool(half_written(self.straight / "checkpoints", "step-"))):
            began = time.monotonic()
            self.start_up = self.start_up or began - started
            job.wait_until(lambda: not half_written(self.straight / "checkpoints", "step-"))
            lives.append(time.monotonic() - began)
        if job.process.wait() or newest_step(self.straight) != STEPS or leftovers(self.straight):
            raise RuntimeError(f"The run without kills failed:\n{job.said()}")
        self.life = statistics.median(lives)

    # ---- killing ----------------------------------------------------------------------------------------------------

    def run(self, kills: int, inside: int, moments: list[tuple[str, str]] | None = None) -> Outcome:
        """Kill until there were so many ``kills``, so many of them ``inside`` a checkpoint write.

        With ``moments``, a list of (moment, victim), these come first, one after the other; "checkpoint" is repeated
        until it was hit.
        """
        planned = list(moments or [])
        while planned or len(self.outcome.kills) < kills or self.outcome.inside < inside:
            self._one_run(planned, kills, inside)
        return self.outcome

    def _one_run(self, planned: list[tuple[str, str]], kills: int, inside: int) -> None:
        number, starts, faults = len(self.outcome.runs) + 1, 0, []
        name = f"killed-{number}"
        directory = self.root / name
        config = self.project.write_config(
            name, **KEYS, max_checkpoints=2, cache_dir=str(self.root / f"cache-{number}")
        )
        while True:
            starts += 1
            self.outcome.resumes += starts > 1
            job = Job(config, self.root / f"{name}-{starts}.txt", resume=starts > 1)
            if planned or len(self.outcome.kills) < kills or self.outcome.inside < inside:
                moment, victim = planned[0] if planned else (self._one_of(MOMENTS), self._one_of(VICTIMS))
                kill = self._kill(job, directory, moment, victim, number, starts)
                if planned and kill is not None and (kill.inside or moment != "checkpoint"):
                    planned.pop(0)
                if kill is not None:
                    self.outcome.kills.append(kill)
                    print(row(kill), flush=True)
                    continue
                self.outcome.missed += 1
            job.process.wait()
            if job.process.returncode and "is the end of this run already" not in job.said():
                faults.append(f"start {starts} ended with {job.process.returncode}: {job.said()[-800:]}")
            if job.wait_for_the_end() is None:
                faults.append(f"start {starts} left processes")
            break
        self.outcome.runs.append(self._compared(directory, number, starts, faults))
        print(summary(self.outcome.runs[-1]), flush=True)
        shutil.rmtree(directory)

    def _one_of(self, weights: dict[str, int]) -> str:
        return self.draw.choices(list(weights), list(weights.values()))[0]

    def _reaches(self, job: Job, directory: Path, moment: str, old: set[str]) -> bool:
        """Wait for a moment, or return False if the job ended before."""
        at_start, delay = newest_step(directory), self.draw.random()
        if moment == "start-up":
            end = time.monotonic() + delay * self.start_up
            return job.wait_until(lambda: time.monotonic() > end)
        if moment == "final":
            return job.wait_until(lambda: bool(half_written(directory, "final")) or (directory / "final").is_dir())
        ahead = self.draw.randint(1, 8)
        if not job.wait_until(lambda: newest_step(directory) >= at_start + ahead - 1 and self._steps(job)):
            return False
        if moment == "evaluation":
            reached = job.wait_until(lambda: is_evaluating(directory))
            delay *= 0.3
        elif moment == "checkpoint":
            reached = job.wait_until(lambda: bool(set(half_written(directory / "checkpoints", "step-")) - old))
            delay *= 0.8 * self.life  # sleeping and sending the signal take time, too
        else:
            reached, delay = True, delay * 0.2
        time.sleep(delay)
        return reached

    def _steps(self, job: Job) -> bool:
        """Whether the job has got beyond its start-up: it says so before its first step."""
        return "Loaded this stage's layers" in job.said()

    def _kill(self, job: Job, directory: Path, moment: str, victim: str, run: int, start: int) -> Kill | None:
        """Kill ``victim`` at ``moment`` and look at what is left; None if the job ended before."""
        at_start, old = newest_step(directory), set(half_written(directory / "checkpoints", "step-"))
        chosen: list[psutil.Process] = []
        if moment != "start-up":  # looking for processes takes longer than a checkpoint does
            if not job.wait_until(lambda: self._steps(job)):
                return None
            chosen = job.victims(victim)
        if not self._reaches(job, directory, moment, old):
            return None
        chosen = chosen or job.victims(victim)
        if not chosen:
            victim, chosen = "all", job.victims("all")
        where = doing(directory, old, at_start)
        for one in self.draw.sample(chosen, len(chosen)):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        inside = bool(set(half_written(directory / "checkpoints", "step-")) - old)
        kill = Kill(run, start, victim, "checkpoint" if inside else where, newest_step(directory), inside)
        kill.seconds = job.wait_for_the_end()
        if kill.seconds is None:
            kill.faults.append("processes did not end by themselves")
        if (further := newest_step(directory) - kill.step) > STEPS_AFTER:
            kill.faults.append(f"the others went on for {further} steps")
        kill.torn = len(set(half_written(directory / "checkpoints", "step-")) - old)
        kill.faults += self._faults_of_newest(directory, at_start)
        return kill

    def _faults_of_newest(self, directory: Path, step_before: int) -> list[str]:
        """Compare the newest valid checkpoint with the same step's of the run that nobody killed."""
        checkpoint, remarks = newest_checkpoint(directory / "checkpoints")
        faults = list(remarks)
        step = int(checkpoint.name.removeprefix("step-")) if checkpoint else 0
        if step < step_before:
            faults.append(f"step {step_before} was there at the start, {step} is the newest now")
        if checkpoint is not None:
            expected = self.straight / "checkpoints" / checkpoint.name
            if differing_bits(checkpoint, expected) or position(checkpoint) != position(expected):
                faults.append(f"{checkpoint.name} differs from that of the run that was not killed")
        return faults

    def _compared(self, directory: Path, number: int, starts: int, faults: list[str]) -> Comparison:
        bits = 0
        for part in ("final", "best", f"checkpoints/step-{STEPS:06d}"):
            try:
                bits += differing_bits(directory / part, self.straight / part)
            except (OSError, ValueError) as error:
                faults.append(str(error))
        lines = 0
        for kind in ("train", "eval"):
            one, other = (without_time(metrics(each, kind)) for each in (directory, self.straight))
            lines += sum(a != b for a, b in zip(one, other, strict=False)) + abs(len(one) - len(other))
        if [line["step"] for line in metrics(directory)] != list(range(1, STEPS + 1)):
            faults.append("metrics.jsonl does not hold every step once")
        faults += [f"{bits} bits differ"] * bool(bits) + [f"{lines} lines of metrics.jsonl differ"] * bool(lines)
        left = leftovers(directory)
        return Comparison(number, starts, bits, lines, len(left), faults + [f"left over: {name}" for name in left])


# ---- by hand --------------------------------------------------------------------------------------------------------


def row(kill: Kill) -> str:
    """One line of the table."""
    seconds = "killed" if kill.seconds is None else f"{kill.seconds:.1f} s"
    torn = "torn" if kill.torn else ""
    return (
        f"{kill.run:3} {kill.start:5}  {kill.victim:9} {kill.where:11} {kill.step:4}  "
        f"{'inside' if kill.inside else '':6}  {torn:4}  {seconds:>7}  {'; '.join(kill.faults) or 'ok'}"
    )


def summary(run: Comparison) -> str:
    """One line for a completed run."""
    verdict = "; ".join(run.faults) or "equal to the run that was not killed"
    return f"    run {run.run} completed with start {run.starts}: {run.differing_bits} bits differ; {verdict}"


def report(outcome: Outcome) -> str:
    """The figures."""
    ended = [kill for kill in outcome.kills if kill.seconds is not None]
    others = [(kill.seconds or 0.0) for kill in ended if kill.victim != "all"]
    lines = [
        f"kills {len(outcome.kills)}, inside a checkpoint write {outcome.inside} "
        f"(of which {sum(kill.inside and bool(kill.torn) for kill in outcome.kills)} left one half written)",
        f"resumes {outcome.resumes}, completed runs {len(outcome.runs)}, "
        f"moments missed because the run ended first {outcome.missed}",
        f"differing bits {sum(run.differing_bits for run in outcome.runs)}, "
        f"differing lines of metrics.jsonl {sum(run.differing_lines for run in outcome.runs)}",
        f"kills after which processes were left {len(outcome.kills) - len(ended)}, "
        f"leftovers at the end of runs {sum(run.leftovers for run in outcome.runs)}",
    ]
    if others:
        lines.append(
            f"seconds until the others had ended: median {statistics.median(others):.1f}, most {max(others):.1f}"
        )
    for what, names in (("victim", VICTIMS), ("where", [kill.where for kill in outcome.kills])):
        counts = {name: sum(getattr(kill, what) == name for kill in outcome.kills) for name in dict.fromkeys(names)}
        lines.append(f"{what}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    return "\n".join([*lines, f"faults {len(outcome.faults)}", *(f"  {fault}" for fault in outcome.faults)])


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill a training run at random moments and resume it until done.")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--in-checkpoint", type=int, default=12, help="kills that must fall inside a checkpoint write")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        print("run start  victim    where       step  inside  torn  others  verdict", flush=True)
        outcome = Soak(Path(root), options.seed).run(options.kills, options.in_checkpoint)
    print(report(outcome))
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    sys.exit(main())
