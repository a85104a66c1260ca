"""``cadapter doctor`` on this machine as it is, and with things that are really broken."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cadapter.config.toml import parse_toml
from cadapter.doctor import packages, probing
from cadapter.doctor.places import check_place
from tests.tiny_project import command, environment

ROOT = Path(__file__).parents[2]


def doctor(*arguments: object, before: Path | None = None, files: int | None = None, **changes: str):
    """Run the command with a directory before all others on PYTHONPATH, and so many open files allowed."""
    if before is not None:
        changes["PYTHONPATH"] = f"{before}{os.pathsep}{os.environ.get('PYTHONPATH', ROOT)}"
    limit = None if files is None else lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    return subprocess.run(
        command("doctor", *arguments), capture_output=True, text=True, timeout=300, preexec_fn=limit,
        env=environment(**changes),
    )  # fmt: skip


def findings(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, str]]:
    """By name, the last where a name is there twice."""
    return {each["name"]: each for each in json.loads(done.stdout)["findings"]}


def module(directory: Path, name: str, source: str) -> None:
    (directory / name).mkdir(parents=True)
    (directory / name / "__init__.py").write_text(source)


@pytest.mark.processes
def test_a_machine_where_all_is_well(tmp_path: Path) -> None:
    done = doctor("--json", tmp_path / "doctor.json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads((tmp_path / "doctor.json").read_text())
    assert found["broken"] == 0
    assert f"\nWritten: {tmp_path / 'doctor.json'}\n" in done.stdout
    names = [each["name"] for each in found["findings"]]
    assert {"python", "torch", "deepspeed", "gloo", "4 bits on cpu", "attention", "hub cache", "open files"} <= {*names}
    for each in found["findings"]:
        line = rf"^  {each['status']:<8} {re.escape(each['name'])} +{re.escape(each['text'].splitlines()[0])}$"
        assert re.search(line, done.stdout, re.MULTILINE), each
        assert bool(each["remedy"]) == (each["status"] != "ok")
        assert not each["remedy"] or f"-> {each['remedy']}" in done.stdout
    assert done.stdout.splitlines()[-1] == "Next: cadapter prepare config.toml"


@pytest.mark.processes
def test_what_is_broken_is_a_line_with_a_remedy_and_the_rest_is_looked_at(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    module(broken, "peft", "raise RuntimeError('no such symbol\\nin line 3')")
    module(broken, "gguf", "import os; os.kill(os.getpid(), 11)")
    module(broken, "tensorboard", "import sys; print('noise'); sys.exit(3)")
    module(broken, "optimi", "")
    module(broken, "bitsandbytes", "from bitsandbytes import functional")
    (broken / "bitsandbytes" / "functional.py").write_text(
        "def quantize_4bit(weight, **options): return weight, None\ndef dequantize_4bit(packed, state): return packed\n"
    )
    config = tmp_path / "config.toml"
    config.write_text("model_dir = 'nowhere'\nlr = 'fast'\n")
    done = doctor(
        config, "--json", "-", before=broken, files=200, HF_HOME="/proc/no-such", GLOO_SOCKET_IFNAME="no_such0"
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert re.fullmatch(r"error: \d+ of \d+ things are broken\.\n {7}Do what stands behind -> above\.\n", done.stderr)
    found = findings(done)
    expected = {
        "peft": ("broken", "RuntimeError: no such symbol", f"{broken}.*PYTHONPATH"),
        "gguf": ("broken", "SIGSEGV", "Install it again"),
        "tensorboard": ("broken", "SystemExit: 3", "PYTHONPATH"),
        "4 bits on cpu": ("broken", "this is no nf4", "Install bitsandbytes again"),
        "gloo": ("broken", "cannot work together", "GLOO_SOCKET_IFNAME"),
        "hub cache": ("warning", "/proc/no-such/hub cannot be written", "HF_HOME"),
        "open files": ("warning", "may open 200", "ulimit -n"),
        str(config): ("broken", "config.toml:2: lr = \"fast\"", "Correct the config"),
        "matplotlib": ("ok", r"\d", ""),
        "attention": ("ok", "", ""),
    }  # fmt: skip
    for name, (status, text, remedy) in expected.items():
        assert found[name]["status"] == status, found[name]
        assert re.search(text, found[name]["text"]), found[name]
        assert re.search(remedy, found[name]["remedy"]), found[name]
    twice = [each for each in json.loads(done.stdout)["findings"] if each["name"] == "torch-optimi"]
    assert twice[0]["status"] == "warning"
    assert "is imported from" in twice[0]["text"]


@pytest.mark.processes
def test_without_torch_the_rest_is_still_looked_at(tmp_path: Path) -> None:
    module(tmp_path, "torch", "raise OSError('libcudart.so.13: cannot open shared object file')")
    done = doctor("--json", "-", before=tmp_path)
    found = findings(done)
    assert done.returncode == 1
    assert "libcudart.so.13" in found["torch"]["text"]
    assert found["all"]["remedy"] == "Mend torch first."
    assert found["rich"]["status"] == "ok"
    assert found["open files"]["status"] == "ok"


def test_a_package_that_is_not_there_or_too_old_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = tmp_path / "cadapter-9.9.dist-info"
    metadata.mkdir()
    lines = ["Metadata-Version: 2.1", "Name: cadapter", "Version: 9.9"]
    lines += [f"Requires-Dist: {each}" for each in ("no-such-package>=1", "rich>=99", 'old>=1; extra == "test"')]
    (metadata / "METADATA").write_text("\n".join(lines) + "\n")
    told = "print([(f.name, f.status, f.text, f.remedy) for f in check_packages()])"
    program = f"from cadapter.doctor.probing import check_packages; {told}"
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', ROOT)}")
    # Elsewhere: a checkout that is installed holds metadata of its own.
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    _, missing, old = eval(done.stdout)
    assert missing == ("no-such-package", "broken", "is not installed.", "pip install 'no-such-package>=1'")
    assert old[:2] == ("rich", "broken")
    assert re.fullmatch(r"[\d.]+, where rich>=99 is needed\.", old[2])


def test_the_requirements_are_those_of_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = parse_toml((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    expected = {re.match(r"[\w-]+", each)[0] for each in wanted if "python_version" not in each}
    assert set(packages.requirements()) == expected
    monkeypatch.setattr(packages.importlib.metadata, "requires", _not_installed)
    assert packages.requirements() == {
        name: each for each in wanted for name in expected if re.match(rf"{name}[<>=]", each)
    }
    assert packages.tested_versions()["torch-optimi"] in (ROOT / "constraints.txt").read_text()


def _not_installed(name: str) -> None:
    raise packages.importlib.metadata.PackageNotFoundError(name)


def test_a_package_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module(tmp_path, "gguf", "import time; time.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', ROOT)}")
    monkeypatch.setattr(probing, "PATIENCE", 3.0)
    hanging, fine = probing.probed(["gguf", "rich"])
    assert (hanging.name, hanging.status) == ("gguf", "broken")
    assert "did not answer" in hanging.text
    assert (fine.name, fine.status) == ("rich", "ok")


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built for GPUs here")
def test_a_gpu_that_torch_does_not_see_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: a card'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    [found] = probing.probed(["gpus"])
    assert (found.status, found.text) == ("broken", "This machine has an NVIDIA GPU, and torch was built without CUDA.")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    [found] = probing.probed(["gpus"])
    assert found.status == "ok"


def test_links_are_counted_from_the_matrix() -> None:
    from cadapter.doctor.compute import _links

    matrix = (
        "\tGPU0\tGPU1\tGPU2\tCPU Affinity\tNUMA Affinity\nGPU0\t X \tNV18\tSYS\t0-31\t0\n"
        "GPU1\tNV18\t X \tSYS\t0-31\t0\nGPU2\tSYS\tSYS\t X \t32-63\t1\n\nLegend:\n\n  X    = Self\n"
    )
    assert _links(matrix) == "NV18 (1 pair), SYS (2 pairs)"
    assert _links("") == ""


def test_places(tmp_path: Path) -> None:
    assert check_place("here", tmp_path / "new" / "deeper").status in ("ok", "warning")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    assert "is no directory" in check_place("file", tmp_path / "file" / "run").text
    assert check_place("proc", Path("/proc/run")).status == "broken"


@pytest.mark.processes
def test_a_report_that_cannot_be_written_is_refused_before_anything_is_tried(tmp_path: Path) -> None:
    done = doctor("--json", tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path} is a directory.\n       Give the name of a file.\n"
    assert done.stdout == ""
