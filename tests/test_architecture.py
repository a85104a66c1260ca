"""The shape of the package: imports point down, no cycles, small files and functions.

The layers, lowest first; a module imports from its own layer's row only where the row is a team, and from any row
below. The map of the code in docs/development.md says the same in words.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "cadapter"

LAYERS = (
    {"errors", "classes"},
    {""},  # cadapter/__init__.py
    {"terminal"},
    {"files"},
    {"algebra", "config"},
    {"adapters", "data", "models"},
    {"planning"},
    {"convert", "training"},
    {"steering", "written"},
    {"api", "doctor"},
    {"commands"},
    {"cli"},
    {"__main__"},
)
TEAMS = ({"adapters", "data", "models"},)
LIGHT = {"", "doctor", "errors", "classes", "files", "terminal", "config", "commands", "cli", "__main__"}
"""Parts that answer before torch could have been imported: what they import at the top of a module is light."""
HEAVY = {"torch", "transformers", "deepspeed", "accelerate", "peft", "bitsandbytes", "optimi", "pyarrow", "safetensors",
         "numpy", "tensorboard", "rich", "gguf"}  # fmt: skip

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80


def modules_of(package: Path) -> dict[str, ast.Module]:
    """The parsed modules of ``package`` by their dotted names below it."""
    found = {}
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(file.read_text(encoding="utf-8"), str(file))
    return found


def imported_names(name: str, tree: ast.AST, is_package: bool) -> Iterator[str]:
    """Absolute dotted names that ``tree`` imports, ``from a import b`` as ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = ["cadapter", *(name.split(".") if name else [])]
                parents = here[: len(here) - node.level + is_package]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def arrows_of(modules: dict[str, ast.Module]) -> dict[str, set[str]]:
    """For each module the modules of the package that it imports."""
    packages = {name.rpartition(".")[0] for name in modules} | {""}
    arrows = {}
    for name, tree in modules.items():
        targets = set()
        # The face of the package names parts of the API for type checkers alone.
        read = top_level(tree) if name == "" else tree
        for imported in imported_names(name, read, name in packages):
            root, _, inner = imported.partition(".")
            if root != "cadapter":
                continue
            while inner not in modules:  # the end of the name is a function or a class
                inner = inner.rpartition(".")[0]
            targets.add(inner)
        arrows[name] = targets - {name}
    return arrows


def part(module: str) -> str:
    return module.partition(".")[0]


def rank(module: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if part(module) in layer)


def is_allowed(source: str, target: str) -> bool:
    if part(source) == part(target):
        return True
    if any({part(source), part(target)} <= team for team in TEAMS):
        return True
    return rank(target) < rank(source)


def wrong_arrows(modules: dict[str, ast.Module]) -> list[str]:
    return [
        f"{source} imports {target}"
        for source, targets in arrows_of(modules).items()
        for target in sorted(targets)
        if not is_allowed(source, target)
    ]


def cycle(modules: dict[str, ast.Module]) -> list[str]:
    try:
        TopologicalSorter(arrows_of(modules)).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def long_functions(modules: dict[str, ast.Module]) -> list[str]:
    """Functions whose body, docstring included, is too long; parameters, a command's table of options, do not count."""
    return [
        f"{name}.{node.name}: {length} lines"
        for name, tree in modules.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (length := (node.end_lineno or 0) - node.body[0].lineno + 1) > MAX_FUNCTION_LINES
    ]


def top_level(tree: ast.Module) -> ast.Module:
    """``tree`` without what runs only later (functions) and without what only type checkers read."""
    kept: list[ast.stmt] = []
    for node in tree.body:
        for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not for_types and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            kept.append(node)
    return ast.Module(kept, [])


@pytest.fixture(scope="module")
def modules() -> dict[str, ast.Module]:
    found = modules_of(PACKAGE)
    assert len(found) > 15
    return found


def test_every_part_has_a_layer(modules: dict[str, ast.Module]) -> None:
    assert {part(module) for module in modules} <= set().union(*LAYERS)


def test_arrows_point_down(modules: dict[str, ast.Module]) -> None:
    assert wrong_arrows(modules) == []


def test_no_cycles(modules: dict[str, ast.Module]) -> None:
    assert cycle(modules) == []


def test_the_mathematics_stands_alone(modules: dict[str, ast.Module]) -> None:
    assert arrows_of(modules)["algebra"] <= {"errors"}


def test_deepspeed_stays_behind_one_door(modules: dict[str, ast.Module]) -> None:
    doors = [
        name
        for name, tree in modules.items()
        if any(imported.partition(".")[0] == "deepspeed" for imported in imported_names(name, tree, False))
    ]
    assert set(doors) <= {"training.engine"}


def test_the_ways_to_train_stay_behind_one_protocol(modules: dict[str, ast.Module]) -> None:
    """The loop, its pipeline, checkpoints and reports know no mode by name, and the modes nothing of the loop."""
    arrows, protocol = arrows_of(modules), "training.modes.base"
    modes = {name for name in modules if name.startswith("training.modes.")} - {protocol}
    assert len(modes) > 1
    assert {name for name, targets in arrows.items() if targets & modes} <= {"training.modes", "training.subjects"}
    for mode in (*modes, protocol):
        assert {target for target in arrows[mode] if part(target) == "training"} <= {protocol, "training.state"}


def test_nothing_heavy_at_the_top_of_light_parts(modules: dict[str, ast.Module]) -> None:
    heavy = [
        f"{name} imports {imported}"
        for name, tree in modules.items()
        if part(name) in LIGHT
        for imported in imported_names(name, top_level(tree), False)
        if imported.partition(".")[0] in HEAVY
    ]
    assert heavy == []


def test_commands_import_their_work_in_their_bodies(modules: dict[str, ast.Module]) -> None:
    commands = {name: top_level(tree) for name, tree in modules.items() if part(name) == "commands"}
    early = [
        f"{name} imports {imported}"
        for name, tree in commands.items()
        for imported in imported_names(name, tree, False)
        if imported.startswith(("cadapter.", "pydantic")) and rank(imported.removeprefix("cadapter.")) > 1
        if not imported.startswith("cadapter.commands")
    ]
    assert early == []


def test_files_and_functions_are_small(modules: dict[str, ast.Module]) -> None:
    lengths = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in PACKAGE.rglob("*.py")}
    assert {file.name: length for file, length in lengths.items() if length > MAX_FILE_LINES} == {}
    assert long_functions(modules) == []


@pytest.mark.parametrize(
    ("files", "wrong", "in_cycle"),
    [
        (
            {"convert/a.py": "from cadapter.training import b", "training/b.py": ""},
            "convert.a imports training.b",
            False,
        ),
        ({"training/b.py": "from ..convert import a", "convert/a.py": ""}, "training.b imports convert.a", False),
        ({"data/x.py": "def f(): import cadapter.training", "training/b.py": ""}, "data.x imports training", False),
        (
            {"training/modes/a.py": "from cadapter.convert.b import f", "convert/b.py": ""},
            "training.modes.a imports convert.b",
            False,
        ),
        ({"training/modes/a.py": "from .. import b", "training/b.py": "from .modes import a"}, "", True),
        ({"errors.py": "from cadapter import files", "files.py": ""}, "errors imports files", False),
        ({"algebra.py": "from .config import Config", "config/a.py": ""}, "algebra imports config", False),
        ({"commands/c.py": "from cadapter.cli import app", "cli.py": ""}, "commands.c imports cli", False),
        ({"models/m.py": "from cadapter.data.d import f", "data/d.py": "from cadapter.models import m"}, "", True),
        ({"config/a.py": "from . import b", "config/b.py": "from .a import f"}, "", True),
        (
            {"config/__init__.py": "from .a import f", "config/a.py": "import cadapter.errors", "errors.py": ""},
            "",
            False,
        ),
        ({"training/a.py": "from cadapter.models.m import f\nimport torch", "models/m.py": ""}, "", False),
    ],
)
def test_these_checks_find_what_they_look_for(
    tmp_path: Path, files: dict[str, str], wrong: str, in_cycle: bool
) -> None:
    (tmp_path / "__init__.py").touch()
    for file, source in files.items():
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        for parent in Path(file).parents:
            (tmp_path / parent / "__init__.py").touch()
        path.write_text(source, encoding="utf-8")
    modules = modules_of(tmp_path)
    assert wrong_arrows(modules) == ([wrong] if wrong else [])
    assert bool(cycle(modules)) == in_cycle


def test_long_functions_are_found() -> None:
    source = "class A:\n    def f(self):\n" + "        pass\n" * 81
    assert long_functions({"m": ast.parse(source)}) == ["m.f: 81 lines"]
