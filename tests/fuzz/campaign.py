"""Fuzz what reads users' files, guided by which of its lines and branches an input reaches. By hand:

    pip install atheris                                  (for the Python of the environment; nothing else needs it)
    python -m tests.fuzz.campaign --runs 20000           every target, 20,000 inputs each
    python -m tests.fuzz.campaign --target jsonl --runs 100000

Each target runs in a process of its own. An input that makes anything but an expected error is a fault: it is kept in
``--faults``, once for each place in the code where it came from, and the campaign goes on. Every 500 inputs all other
files of the target's directory are compared with what they were.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

COMPARED_EVERY = 500
LONGEST = {"tokenizer": 1 << 15}
"""Bytes of an input; 4,096 where nothing else is said."""


def files_in(root: Path, but: str) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file() and path.relative_to(root) != Path(but) and path.resolve() != (root / but).resolve()
    }


class Run:
    """One target's inputs, counted."""

    def __init__(self, name: str, work: Path, faults: Path, call: Callable[[bytes], bool], but: str) -> None:
        self.name, self.work, self.faults, self.but = name, work, faults, but
        self.call = call
        self.before = files_in(work, but)
        self.inputs = self.accepted = self.changed = 0
        self.places: dict[str, int] = {}
        self.begun = time.monotonic()

    def __call__(self, data: bytes) -> None:
        self.inputs += 1
        try:
            self.accepted += self.call(data)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # what libraries in Rust raise when they panic is no Exception
            self._keep(data, error)
        if self.inputs % COMPARED_EVERY == 0:
            self.compare()

    def _keep(self, data: bytes, error: BaseException) -> None:
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if "/cadapter/" in frame.filename]
        place = f"{type(error).__name__} at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else repr(error)[:80]
        self.places[place] = self.places.get(place, 0) + 1
        if self.places[place] == 1:
            stem = f"{self.name}-{hashlib.sha256(place.encode()).hexdigest()[:8]}"
            (self.faults / stem).write_bytes(data)
            (self.faults / f"{stem}.txt").write_text(f"{place}\n{traceback.format_exc()}")

    def compare(self) -> None:
        after = files_in(self.work, self.but)
        self.changed += len(after.items() ^ self.before.items())
        self.before = after

    def result(self) -> dict[str, object]:
        self.compare()
        return {
            "target": self.name, "inputs": self.inputs, "accepted": self.accepted, "faults": self.places,
            "files_changed": self.changed, "seconds": round(time.monotonic() - self.begun, 1),
        }  # fmt: skip


def fuzz(name: str, runs: int, faults: Path, seed: int) -> None:
    """Fuzz one target in this process, and print the result as a line of JSON."""
    import atheris

    with atheris.instrument_imports(include=["cadapter"]):
        from tests.fuzz import targets

    target = targets.TARGETS[name]
    place = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        work, corpus = Path(folder, "work"), Path(folder, "corpus")
        work.mkdir()
        corpus.mkdir()
        os.chdir(work)
        target.lay_out(work)
        for number, data in enumerate(target.seeds):
            (corpus / str(number)).write_bytes(data)
        words = Path(folder, "words")
        words.write_text("".join(f'"{_escaped(word)}"\n' for word in target.words))
        run = Run(name, work, faults, lambda data: targets.call(target, work, data), target.file)
        options = [f"-atheris_runs={runs}", f"-max_len={LONGEST.get(name, 4096)}", f"-seed={seed}"]
        options += [f"-dict={words}"] * bool(target.words)
        atheris.Setup(["fuzz", *options, "-verbosity=0", "-rss_limit_mb=4096", str(corpus)], run, custom_mutator=mutate)
        try:
            atheris.Fuzz()
        except SystemExit:
            pass
        finally:
            print(json.dumps(run.result()), flush=True)


INTERESTING = (
    None, True, False, 0, -1, 1, 0.5, 2**31, 2**63, 10**25, 1e308, float("nan"), float("inf"), "", "x", "../x", "/x/y",
    "\x00", "\ud800", "F32", "F8_E4M3", "I64", [], [0], {}, {"a": 1}, [[]], "é" * 300,
)  # fmt: skip
"""Values that stand in for others."""


def changed_json(data: bytes, draw: random.Random) -> bytes:
    """JSON with one of its values replaced, left out, doubled or moved; a safetensors header counts as JSON.

    Raises:
        ValueError: ``data`` is neither.
    """
    head = int.from_bytes(data[:8], "little")
    if 2 <= head <= len(data) - 8 and data[8:9] == b"{":
        text = changed_json(data[8 : 8 + head], draw)
        return len(text).to_bytes(8, "little") + text + data[8 + head :]
    value = json.loads(data)
    places = list(_places(value, 200))
    for _ in range(draw.choice((1, 1, 2))):
        holder, key = draw.choice(places)
        action = draw.randrange(4)
        with contextlib.suppress(KeyError, IndexError):  # an earlier change took it away
            if action == 0:
                del holder[key]
            elif action == 1 and isinstance(holder, list):
                holder.append(holder[key])
            elif action == 2:
                other, place = draw.choice(places)
                holder[key] = copy.deepcopy(other[place])
            else:
                holder[key] = draw.choice(INTERESTING)
    return json.dumps(value).encode("utf-8", "surrogatepass")


def _places(value: Any, most: int) -> Iterator[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys)[:most]:
        yield value, key
        yield from _places(value[key], most)


def mutate(data: bytes, longest: int, seed: int) -> bytes:
    """Change the meaning of JSON every other time, and bytes otherwise."""
    import atheris

    draw = random.Random(seed)
    if draw.random() < 0.5:
        with contextlib.suppress(ValueError, RecursionError, IndexError):
            found = changed_json(data, draw)
            if len(found) <= longest:
                return found
    return atheris.Mutate(data, longest)


def _escaped(word: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word.encode())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="the only one to fuzz")
    parser.add_argument("--runs", type=int, default=10_000, help="inputs of each target")
    parser.add_argument("--slow-runs", type=int, default=1_000, help="inputs of those that take milliseconds each")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", type=Path, default=Path("faults"), help="where inputs that make faults are kept")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    faults = chosen.faults.absolute()
    faults.mkdir(parents=True, exist_ok=True)
    if chosen.here:
        fuzz(chosen.target, chosen.runs, faults, chosen.seed)
        return 0
    from tests.fuzz.targets import TARGETS

    results = []
    for name in [chosen.target] if chosen.target else TARGETS:
        runs = chosen.slow_runs if TARGETS[name].slow else chosen.runs
        words = ["--here", "--target", name, "--runs", str(runs), "--faults", str(faults), "--seed", str(chosen.seed)]
        done = subprocess.run([sys.executable, "-m", "tests.fuzz.campaign", *words], capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if not lines:
            print(f"{name}: ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}", flush=True)
            results.append({"inputs": 0, "files_changed": 0, "faults": {f"{name} ended early": 1}})
            continue
        results.append(json.loads(lines[-1]))
        print(lines[-1], flush=True)
    inputs, changed = (sum(result[key] for result in results) for key in ("inputs", "files_changed"))
    places = sum(len(result["faults"]) for result in results)
    print(f"{inputs:,} inputs, faults at {places} places, {changed} files changed")
    return 1 if places or changed else 0


if __name__ == "__main__":
    sys.exit(main())
