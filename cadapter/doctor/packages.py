"""The packages that cadapter needs: installed, in versions that it is made for, and imported from where they are."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cadapter.doctor.findings import Finding, first_line

PART = "Packages"
ROOT = Path(__file__).parents[2]
OLDEST_PYTHON = (3, 10)
MODULES = {"torch-optimi": "optimi"}
"""The modules of packages whose module has another name."""
_NAME = re.compile(r"[A-Za-z0-9._-]+")


def requirements() -> dict[str, str]:
    """The packages that cadapter needs, each as pip takes it ("torch>=2.9"), those of other Pythons left out.

    Raises:
        OSError: neither the installed package nor the project beside this file says it.
    """
    project = ROOT / "pyproject.toml"
    try:
        lines = importlib.metadata.requires("cadapter") or []
    except importlib.metadata.PackageNotFoundError:
        block = project.read_text("utf-8").split("\ndependencies = [")[1].split("\n]")[0]
        lines = re.findall(r'^\s*"([^"]+)"', block, re.MULTILINE)
    found = {}
    for line in lines:
        wanted, _, marker = (part.strip() for part in line.partition(";"))
        name = _NAME.match(wanted)
        if name and "extra" not in marker and not (marker and name[0] == "tomli" and sys.version_info >= (3, 11)):
            found[name[0]] = wanted
    return found


def tested_versions() -> dict[str, str]:
    """The versions that are known to work together, where the project lies beside this file."""
    file = ROOT / "constraints.txt"
    lines = file.read_text("utf-8").splitlines() if file.is_file() else []
    pairs = [line.split(";")[0].strip().partition("==") for line in lines if "==" in line]
    return {name.replace("_", "-").lower(): version for name, _, version in pairs}


def check_python() -> Iterator[Finding]:
    """The version of Python."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info >= OLDEST_PYTHON:
        yield Finding(PART, "python", "ok", f"{version} ({sys.executable})")
    else:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        yield Finding(PART, "python", "broken", f"{version} is too old.", f"Use Python {oldest} or newer.")


def check_package(name: str, wanted: str) -> Iterator[Finding]:
    """Import a package, and compare its version and its place with what is installed."""
    module_name = MODULES.get(name, name)
    install = f"pip install '{wanted}'"
    if name == "torch":
        install += " (the build for your GPU, see pytorch.org)"
    installed = _installed(name)
    if installed is None and importlib.util.find_spec(module_name) is None:
        yield Finding(PART, name, "broken", "is not installed.", install)
        return
    try:
        module = importlib.import_module(module_name)
    except BaseException as error:  # a package does what it likes while it is imported
        where = _place(module_name)
        remedy = f"Install it again: {install}"
        if installed is not None and where is not None and not _belongs(where, installed):
            remedy = f"{where.parent} stands before the installed package: take it out of PYTHONPATH, or rename it."
        yield Finding(PART, name, "broken", f"cannot be imported: {first_line(error)}", remedy)
        return
    version = installed.version if installed else str(getattr(module, "__version__", "of an unknown version"))
    where = _place(module_name)
    if installed is not None and where is not None and not _belongs(where, installed):
        yield Finding(
            PART, name, "warning", f"is imported from {where}, not from where {version} is installed.",
            "Take that place out of PYTHONPATH, or rename it, unless you mean it.",
        )  # fmt: skip
    yield _compare(name, version, wanted, install)


def _compare(name: str, version: str, wanted: str, install: str) -> Finding:
    from packaging.requirements import Requirement
    from packaging.version import InvalidVersion, Version

    try:
        fits = Requirement(wanted).specifier.contains(Version(version), prereleases=True)
    except InvalidVersion:
        return Finding(PART, name, "warning", f"{version}: cannot be compared with {wanted}.", install)
    if not fits:
        return Finding(PART, name, "broken", f"{version}, where {wanted} is needed.", install)
    tested = tested_versions().get(name)
    differs = tested and Version(tested).release[:2] != Version(version).release[:2]
    return Finding(PART, name, "ok", version + (f" (tested with {tested})" if differs else ""))


def _installed(name: str) -> Any:
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _place(module_name: str) -> Path | None:
    """The file that the module is, or would be, imported from."""
    module = sys.modules.get(module_name)
    try:
        spec = module.__spec__ if module is not None else importlib.util.find_spec(module_name)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec is not None and spec.origin else None


def _belongs(file: Path, installed: Any) -> bool:
    """Whether a file lies where a distribution was installed, or the distribution is a project under work."""
    if installed.read_text("direct_url.json"):  # pip install -e, or from a directory
        return True
    return Path(installed.locate_file("")).resolve() in file.resolve().parents
