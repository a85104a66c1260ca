"""The documentation is true: its command lines run, its map leaves nothing out, its reference is the schema.

Every line of a ``sh`` block runs, in order, in a tiny project whose files have the names that the documentation uses.
What cannot run here says why at its end: ``# needs several GPUs``. ``python -m tests.test_readme`` renews the generated
parts.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cadapter.cli import COMMANDS, app
from cadapter.config import ClassWeights, Config, DatasetConfig, load_config
from cadapter.config.wording import reference_table

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
CONFIGURATION = ROOT / "docs" / "configuration.md"
DEVELOPMENT = ROOT / "docs" / "development.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").rglob("*.md"))]
TUTORIAL = ROOT / "docs" / "tutorial.md"
REVIEWS = ROOT / "examples" / "reviews"
COMMAND_PAGES = ROOT / "docs" / "commands"
PAGES = [
    *DOCUMENTS,
    ROOT / "CHANGELOG.md",
    REVIEWS / "README.md",
    ROOT / "examples" / "configs" / "README.md",
]

SKIPPED = {
    "multi-node.md": {"several GPUs": 3, "several nodes": 4},
    "tutorial.md": {"a real model and llama.cpp": 1, "llama.cpp": 1},
}
"""How many lines of a document do not run here, by what they need."""

ELSEWHERE = (
    "examples/quickstart/run",  # .ci/run runs these two, and they make and use the environment
    "tests/run",
    ". .venv/bin/activate",
    "pip install llama-cpp-python",
    "python tests/benchmarks/",  # measured by hand
    "python -m tests.benchmarks.",
)
"""How lines begin that are no part of a project."""

SMALLER = {"sequence_len": "64", "gradient_accumulation_steps": "2"}
"""Keys of documented configs that the tests make smaller, and nothing else."""

REFERENCE = re.compile(r"(<!-- reference: begin -->\n).*(<!-- reference: end -->\n)", re.DOTALL)
CHAT_TEMPLATE = "{% for message in messages %}<|user|>{{ message['content'] }}{% endfor %}"


def blocks(document: Path, language: str) -> list[str]:
    """The contents of the fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def command_lines(document: Path) -> list[str]:
    """The lines of shell blocks, but for those that run elsewhere."""
    lines = [line.strip() for block in blocks(document, "sh") for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith(ELSEWHERE)]


def trains(document: Path) -> bool:
    """Whether a document begins before the first run; else it is about an adapter that is there."""
    return any(line.startswith("cadapter train") for line in command_lines(document))


def needs(line: str) -> str | None:
    """What a line says that it needs, which is not here."""
    found = re.search(r"# needs (.+)$", line)
    return found[1] if found else None


def lacks_llama(line: str) -> bool:
    """Whether a line of the tutorial needs llama-cpp-python, and it is not installed."""
    return "talk.py" in line and importlib.util.find_spec("llama_cpp") is None


def examples_of(command: str) -> tuple[str, ...]:
    return importlib.import_module(f"cadapter.commands.{command.replace('-', '_')}").EXAMPLES


def needs_processes(line: str) -> bool:
    return "--num-gpus" in line


# ---- the project ----------------------------------------------------------------------------------------------------


def for_here(text: str) -> str:
    """A config with the keys of ``SMALLER``."""
    for key, value in SMALLER.items():
        text, count = re.subn(rf"^{key} = \d+", f"{key} = {value}", text, flags=re.MULTILINE)
        assert count == 1, key
    return text


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user has before the first command: a model, texts, a config. Read only."""
    from tests.tiny_project import make_model, texts, write_jsonl

    root = tmp_path_factory.mktemp("documented")
    make_model(root / "base", layers=2, hidden=64)  # 4 bits want multiples of 64
    (root / "base" / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    for file, kind in (("good", "positive"), ("bad", "negative"), ("neutral", "neutral")):
        write_jsonl(root / f"{file}.jsonl", texts(kind, 24))
    (root / "question.txt").write_text("What is best?\n", encoding="utf-8")
    (config,) = blocks(README, "toml")
    (root / "config.toml").write_text(for_here(config), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def trained(fresh: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a finished run, and the adapter of another run in style/. Read only."""
    root = tmp_path_factory.mktemp("trained") / "project"
    shutil.copytree(fresh, root)
    with inside(root):
        run_here("cadapter train config.toml")
    shutil.copytree(root / "run" / "final", root / "style" / "final")
    return root


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tutorial begins: a checkout in which the quickstart has run, with its config at hand. Read only."""
    from tests.tiny_project import make_model, texts, write_jsonl

    root = tmp_path_factory.mktemp("checkout")
    work = root / "examples" / "quickstart" / "work"
    (work / "corpus").mkdir(parents=True)
    make_model(work / "base", layers=2, hidden=32, tied=True)
    for file, kind in (("ornate", "positive"), ("plain", "negative")):
        write_jsonl(work / "corpus" / f"{file}.jsonl", texts(kind, 24))
    shutil.copytree(ROOT / "examples" / "tutorial", root / "examples" / "tutorial")
    (config,) = blocks(TUTORIAL, "toml")
    (root / "tutorial.toml").write_text(config, encoding="utf-8")
    return root


@contextmanager
def inside(directory: Path) -> Iterator[None]:
    """Work in ``directory`` on the CPU and outside of any job; the process is as before afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("DS_ACCELERATOR", "cpu")
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            patch.delenv(name, raising=False)
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        environment = dict(os.environ)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            for name in os.environ.keys() - environment.keys():
                del os.environ[name]


def parse(line: str) -> tuple[list[str], dict[str, str]]:
    """The words after ``cadapter``, and the files behind ``<`` and ``>``."""
    words = iter(shlex.split(line, comments=True)[1:])
    plain, files = [], {}
    for word in words:
        if word in ("<", ">"):
            files[word] = next(words)
        else:
            plain.append(word)
    return plain, files


def run_here(line: str) -> str:
    """Run a command line of the documentation in this process and directory; it must succeed. Return its output."""
    words, files = parse(line)
    given = Path(files["<"]).read_bytes() if "<" in files else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["cadapter", *words])
        done = CliRunner().invoke(app, words, input=given, prog_name="cadapter")
    assert done.exit_code == 0, f"{line}\n{done.output}\n{done.exception!r}"
    if ">" in files:
        Path(files[">"]).write_text(done.stdout, encoding="utf-8")
    return done.output


def run_line(line: str) -> None:
    """Run any line of a shell block; ``cadapter`` in this process, the rest in a shell."""
    if line.startswith("cadapter "):
        assert run_here(line).strip() or ">" in line
    elif line.startswith("cd "):
        os.chdir(line.removeprefix("cd "))
    else:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-c", line], env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"


# ---- command lines --------------------------------------------------------------------------------------------------


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def run_lines(lines: list[str]) -> dict[str, int]:
    """Run what can run here, in order; return how many lines cannot, by what they need."""
    skipped: dict[str, int] = {}
    for line in lines:
        reason = needs(line)
        if reason:
            skipped[reason] = skipped.get(reason, 0) + 1
        elif not lacks_llama(line):
            run_line(line)
    return skipped


@pytest.mark.parametrize("document", [each for each in DOCUMENTS if each != TUTORIAL], ids=name_of)
def test_the_command_lines_of_a_document_run_in_order(
    document: Path, fresh: Path, trained: Path, tmp_path: Path
) -> None:
    root = tmp_path / "project"
    shutil.copytree(fresh if trains(document) else trained, root)
    if trains(document):
        shutil.copytree(trained / "style", root / "style")
    with inside(root):
        assert run_lines(command_lines(document)) == SKIPPED.get(document.name, {})


def test_the_tutorial_can_be_followed(checkout: Path, tmp_path: Path) -> None:
    root = tmp_path / "checkout"
    shutil.copytree(checkout, root)
    lines = command_lines(TUTORIAL)
    assert lines[:2] == ["mkdir tutorial", "cd tutorial"]
    with inside(root):
        run_line(lines[0])
        shutil.copy("tutorial.toml", "tutorial/config.toml")
        assert run_lines(lines[1:]) == SKIPPED[TUTORIAL.name]
    assert (root / "tutorial" / "suppress.gguf").is_file()
    assert (root / "tutorial" / "merged" / "config.json").is_file()


def test_the_film_reviews_can_be_followed(fresh: Path, tmp_path: Path) -> None:
    """With a tiny model and few texts under the names that the example's config has for its own."""
    text = (REVIEWS / "config.toml").read_text("utf-8")
    (tmp_path / "config.toml").write_text(for_here(text), encoding="utf-8")
    config = load_config(REVIEWS / "config.toml")
    shutil.copytree(fresh / "base", tmp_path / config.model_dir)
    for dataset, file in zip(config.datasets, ("good", "bad"), strict=True):
        shutil.copy(fresh / f"{file}.jsonl", tmp_path / dataset.dataset_path)
    with inside(tmp_path):
        assert run_lines(command_lines(REVIEWS / "README.md")) == {}
    (contrast,) = [each for each in json.loads((tmp_path / "scores.json").read_text()) if "contrast" in each]
    assert contrast["strengths"] == [1.0, -1.0]
    assert (tmp_path / config.output_dir / "final" / "adapter_model.safetensors").is_file()


def test_documents_have_command_lines() -> None:
    """So that the patterns above find them."""
    assert len(command_lines(README)) >= 5
    assert all(command_lines(page) for page in COMMAND_PAGES.glob("*.md"))


@pytest.mark.parametrize(
    "command",
    # Its page has the same examples, and each takes seconds.
    [pytest.param(each, marks=pytest.mark.slow) if each == "doctor" else each for each in COMMANDS],
)
def test_the_examples_of_a_command_run(command: str, trained: Path, tmp_path: Path) -> None:
    root = tmp_path / "project"
    shutil.copytree(trained, root)
    if command == "train":
        shutil.rmtree(root / "run")
    lines = examples_of(command)
    assert len(lines) >= 2
    with inside(root):
        if command == "to-gguf":
            run_here("cadapter to-add-lora base run/final lora")
        for line in lines:
            if not needs_processes(line):
                run_here(line)


@pytest.mark.processes
def test_the_examples_with_several_processes_run(fresh: Path, tmp_path: Path) -> None:
    from tests.tiny_project import run_well

    root = tmp_path / "project"
    shutil.copytree(fresh, root)
    lines = [line for command in COMMANDS for line in examples_of(command) if needs_processes(line)]
    assert len(lines) == 1
    with inside(root):
        done = run_well(*parse(lines[0])[0])
    assert "Pipeline stages × data-parallel replicas: 2 × 1" in done.stdout
    assert (root / "run" / "final" / "adapter_model.safetensors").is_file()


def test_every_command_has_its_page_and_the_readme_leads_to_it() -> None:
    pages = {page.stem: page.read_text("utf-8").splitlines()[0] for page in COMMAND_PAGES.glob("*.md")}
    assert pages == {command: f"# cadapter {command}" for command in COMMANDS}
    linked = re.findall(r"\]\(docs/commands/([a-z-]+)\.md\)", README.read_text("utf-8"))
    assert sorted(linked) == sorted(COMMANDS)


def test_options_that_the_pages_name_exist() -> None:
    import typer

    group = typer.main.get_command(app)
    known = {"--help"}
    for command in [group, *group.commands.values()]:  # type: ignore[attr-defined]
        for parameter in command.params:
            known.update(getattr(parameter, "opts", []))
    foreign = {
        "--all", "--control-vector", "--logdir", "--lora", "--lora-scaled", "--memory-megabytes", "--nodes",
        "--nproc-per-node", "--ntasks-per-node", "--outfile", "--settings", "--shape", "--shm-size", "--steps",
        "--table", "--variant",
    }  # fmt: skip
    for page in DOCUMENTS:
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", page.read_text("utf-8")))
        assert named - foreign - known == set(), page.name


# ---- map and links --------------------------------------------------------------------------------------------------


def map_of_the_code() -> dict[str, str]:
    """Path → what the map says of it; folders end with "/"."""
    (text,) = [block for block in blocks(DEVELOPMENT, "text") if block.startswith("cadapter/ ")]
    found, folders = {}, [""]
    for line in text.splitlines():
        match = re.fullmatch(r"( *)(\S+)(?: +(.+))?", line)
        assert match is not None, line
        depth = len(match[1]) // 2
        path = folders[depth] + match[2]
        folders[depth + 1 :] = [path]
        found[path] = match[3] or ""
    return found


def test_the_map_names_what_exists_and_leaves_no_module_out() -> None:
    entries = map_of_the_code()
    for path, words in entries.items():
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), path
        assert words, f"{path}: the map says nothing of it"
    listed_one_by_one = {Path(path).parent for path in entries if path.endswith(".py")}
    for file in sorted((ROOT / "cadapter").rglob("*.py")):
        path = file.relative_to(ROOT)
        if path.name == "__init__.py":
            continue
        if path.parent in listed_one_by_one:
            assert str(path) in entries, f"{path} is missing from the map"
        else:
            assert f"{path.parent}/" in entries, f"{path.parent}/ is missing from the map"


def test_the_five_files_to_read_first_exist() -> None:
    tour = re.findall(r"^\d\. `([^`]+)`: ", DEVELOPMENT.read_text("utf-8"), re.MULTILINE)
    assert len(tour) == 5
    assert all((ROOT / path).is_file() for path in tour)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", page.read_text("utf-8")) if "://" not in link]
    for link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


# ---- configuration --------------------------------------------------------------------------------------------------


def reference() -> str:
    """The generated part of docs/configuration.md."""
    tables = (("Of the run", Config), ("Of a dataset", DatasetConfig), ("Of `class_weights`", ClassWeights))
    return "".join(f"\n### {title}\n\n{reference_table(model)}" for title, model in tables) + "\n"


def with_reference(text: str) -> str:
    new, count = REFERENCE.subn(lambda match: match[1] + reference() + match[2], text)
    assert count == 1
    return new


def test_the_reference_is_the_schema() -> None:
    text = CONFIGURATION.read_text("utf-8")
    assert text == with_reference(text), "renew it: python -m tests.test_readme"


def test_every_config_on_the_pages_loads(tmp_path: Path) -> None:
    count = 0
    for page in DOCUMENTS:
        for block in blocks(page, "toml"):
            file = tmp_path / "config.toml"
            file.write_text(block, encoding="utf-8")
            load_config(file)
            count += 1
    assert count >= 1


def renew() -> None:
    """Write the generated parts anew."""
    CONFIGURATION.write_text(with_reference(CONFIGURATION.read_text("utf-8")), encoding="utf-8")


if __name__ == "__main__":
    renew()
