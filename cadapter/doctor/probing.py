"""Looking at a machine in a process of its own, so that whatever breaks there is a finding here.

``python -m cadapter.doctor.probing FD`` reads the names of probes from standard input, and writes to the open file FD a
line of JSON for each probe that it begins and for each finding.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import IO, Any

from cadapter.doctor import compute, packages
from cadapter.doctor.findings import Finding, first_line

PATIENCE = 120.0
"""Seconds that one probe may take; importing torch from a slow disk takes some tens."""

COMPUTE: dict[str, tuple[str, Callable[[], Iterator[Finding]]]] = {
    "gloo": (compute.PROCESSES, compute.check_gloo),  # first: it forks, which a process with a GPU should not do
    "gpus": (compute.GPUS, compute.check_gpus),
    "peers": (compute.BETWEEN, compute.check_peers),
    "4 bits": (compute.KERNELS, compute.check_four_bit),
    "attention": (compute.KERNELS, compute.check_attention),
    "torch.compile": (compute.KERNELS, compute.check_compile),
}


def check_packages() -> list[Finding]:
    """Python and every package that cadapter needs, each imported."""
    return [*packages.check_python(), *probed(list(packages.requirements()))]


def check_compute(found: Sequence[Finding]) -> list[Finding]:
    """What computes, given what was found of packages."""
    if any(each.name == "torch" and each.status == "broken" for each in found):
        words, remedy = "not looked at, since torch cannot be imported.", "Mend torch first."
        return [Finding(compute.GPUS, "all", "warning", words, remedy)]
    return probed(list(COMPUTE))


def probed(names: Sequence[str]) -> list[Finding]:
    """Findings of these probes, in other processes: as many as it takes, should one of them die."""
    found: list[Finding] = []
    rest = list(names)
    while rest:
        done, findings = _one_process(rest)
        found += findings
        rest = rest[done:]
    return found


def _one_process(names: Sequence[str]) -> tuple[int, list[Finding]]:
    """How many of the probes are done when the process ends, the last one by its own death perhaps; the findings."""
    reading, writing = os.pipe()
    with tempfile.TemporaryFile("w+") as said, os.fdopen(reading, "rb") as answers:
        process = subprocess.Popen(
            [sys.executable, "-m", "cadapter.doctor.probing", str(writing)],
            stdin=subprocess.PIPE, stdout=said, stderr=said, pass_fds=[writing], text=True,
        )  # fmt: skip
        os.close(writing)
        assert process.stdin is not None
        process.stdin.write(json.dumps(list(names)))
        process.stdin.close()
        lines, in_time = _lines(answers)
        if not in_time:
            process.kill()
        code = process.wait()
        begun = [line["probe"] for line in lines if "probe" in line]
        found = [Finding(**line["finding"]) for line in lines if "finding" in line]
        if not begun:
            found.append(Finding(packages.PART, "python", "broken", f"Python does not start: {_last_line(said)}"))
            return len(names), found
        if not in_time or code != 0:
            found.append(_death(begun[-1], code, in_time))
        return len(begun), found


def _lines(answers: IO[bytes]) -> tuple[list[dict[str, Any]], bool]:
    """All that a process tells until it ends, and whether it never kept silent for too long."""
    text, last = b"", time.monotonic()
    while time.monotonic() - last < PATIENCE:
        ready, _, _ = select.select([answers], [], [], 1.0)
        if not ready:
            continue
        piece = os.read(answers.fileno(), 1 << 16)
        if not piece:
            return [json.loads(line) for line in text.splitlines()], True
        text, last = text + piece, time.monotonic()
    return [json.loads(line) for line in text.splitlines()], False


def _death(probe: str, code: int, in_time: bool) -> Finding:
    part = COMPUTE[probe][0] if probe in COMPUTE else packages.PART
    if not in_time:
        remedy = "Set NCCL_P2P_DISABLE=1." if probe == "peers" else "Try again; if it stays so, install it again."
        return Finding(part, probe, "broken", f"did not answer for {PATIENCE:.0f} seconds.", remedy)
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    return Finding(part, probe, "broken", f"ended the process that looked at it, {how}.", "Install it again.")


def _last_line(said: IO[str]) -> str:
    said.seek(0)
    return (said.read().strip().splitlines() or ["no reason is given"])[-1]


def main(descriptor: int, names: Sequence[str]) -> None:
    """Run probes and tell what they find."""
    needed = packages.requirements()
    with os.fdopen(descriptor, "w") as answers:
        for name in names:
            print(json.dumps({"probe": name}), file=answers, flush=True)
            part, probe = COMPUTE.get(name, (packages.PART, None))
            findings = packages.check_package(name, needed[name]) if probe is None else probe()
            try:
                for finding in findings:
                    print(json.dumps({"finding": asdict(finding)}), file=answers, flush=True)
            except Exception as error:
                failed = Finding(part, name, "broken", first_line(error), "See the packages above.")
                print(json.dumps({"finding": asdict(failed)}), file=answers, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), json.load(sys.stdin))
    os._exit(0)  # at once: what was imported may have threads that do not end
