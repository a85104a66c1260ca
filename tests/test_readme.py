"""The documentation is true: its command lines run, its map leaves nothing out, its reference is the schema.

Command lines run in order in a tiny project whose files have the names that the documentation uses. What cannot run
here says why at its end: ``# needs several GPUs``. ``python -m tests.test_readme`` renews the generated parts.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cadapter.cli import COMMANDS, app
from cadapter.config import ClassWeights, Config, DatasetConfig, load_config
from cadapter.config.wording import reference_table
from cadapter.errors import UsageError

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
CONFIGURATION = ROOT / "docs" / "configuration.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [
    *DOCUMENTS,
    ROOT / "CHANGELOG.md",
    *(ROOT / "examples" / name / "README.md" for name in ("reviews", "configs")),
]

SKIPPED = {"README.md": {"several GPUs": 2, "several nodes": 3}}
"""How many lines of a document do not run here, by what they need."""

SMALLER = {"sequence_len": "64", "gradient_accumulation_steps": "2"}
"""Keys of the README's config that the test makes smaller, and nothing else."""

REFERENCE = re.compile(r"(<!-- reference: begin -->\n).*(<!-- reference: end -->\n)", re.DOTALL)
CHAT_TEMPLATE = "{% for message in messages %}<|user|>{{ message['content'] }}{% endfor %}"


def blocks(document: Path, language: str) -> list[str]:
    """The contents of the fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def command_lines(document: Path) -> list[str]:
    lines = [line.strip() for block in blocks(document, "sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith("cadapter ")]


def needs(line: str) -> str | None:
    """What a line needs that is not here."""
    found = re.search(r"# needs (.+)$", line)
    return found[1] if found else None


def examples_of(command: str) -> tuple[str, ...]:
    return importlib.import_module(f"cadapter.commands.{command.replace('-', '_')}").EXAMPLES


def needs_processes(line: str) -> bool:
    return "--num-gpus" in line


# ---- the project ----------------------------------------------------------------------------------------------------


def config_for_here() -> str:
    """The README's config, with the keys of ``SMALLER``."""
    (text,) = blocks(README, "toml")
    for key, value in SMALLER.items():
        text, count = re.subn(rf"^{key} = \d+", f"{key} = {value}", text, flags=re.MULTILINE)
        assert count == 1, key
    return text


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user has before the first command: a model, texts, a config. Read only."""
    from tests.tiny_project import make_model, texts, write_jsonl

    root = tmp_path_factory.mktemp("documented")
    make_model(root / "base", layers=2, hidden=32)
    (root / "base" / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    for file, kind in (("good", "positive"), ("bad", "negative"), ("neutral", "neutral")):
        write_jsonl(root / f"{file}.jsonl", texts(kind, 24))
    (root / "question.txt").write_text("What is best?\n", encoding="utf-8")
    (root / "config.toml").write_text(config_for_here(), encoding="utf-8")
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


# ---- command lines --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_command_lines_of_a_document_run_in_order(document: Path, fresh: Path, tmp_path: Path) -> None:
    root = tmp_path / "project"
    shutil.copytree(fresh, root)
    skipped: dict[str, int] = {}
    lines = command_lines(document)
    with inside(root):
        for line in lines:
            reason = needs(line)
            if reason:
                skipped[reason] = skipped.get(reason, 0) + 1
            else:
                assert run_here(line).strip() or ">" in line
    assert skipped == SKIPPED.get(document.name, {})
    assert not lines or len(lines) > sum(skipped.values())


@pytest.mark.parametrize("command", COMMANDS)
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


def test_every_command_has_its_section_in_the_readme() -> None:
    headings = re.findall(r"^### cadapter (\S+)$", README.read_text("utf-8"), re.MULTILINE)
    assert headings == list(COMMANDS)


def test_options_that_the_pages_name_exist() -> None:
    import typer

    group = typer.main.get_command(app)
    known = {"--help"}
    for command in [group, *group.commands.values()]:  # type: ignore[attr-defined]
        for parameter in command.params:
            known.update(getattr(parameter, "opts", []))
    foreign = {
        "--all", "--memory-megabytes", "--nproc-per-node", "--shape", "--variant", "--lora", "--lora-scaled",
        "--settings", "--steps", "--table", "--logdir",
    }  # fmt: skip
    for page in DOCUMENTS:
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", page.read_text("utf-8")))
        assert named - foreign - known == set(), page.name


# ---- map and links --------------------------------------------------------------------------------------------------


def map_of_the_code() -> dict[str, str]:
    """Path → what the map says of it; folders end with "/"."""
    (text,) = [block for block in blocks(README, "text") if block.startswith("cadapter/ ")]
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
    tour = re.findall(r"^\d\. `([^`]+)`: ", README.read_text("utf-8"), re.MULTILINE)
    assert len(tour) == 5
    assert all((ROOT / path).is_file() for path in tour)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
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


def test_what_is_said_to_be_unsupported_is_and_nothing_else(tmp_path: Path) -> None:
    """Each line is refused in these words; each key whose value can be refused so has its line."""
    from cadapter.config import unsupported

    section = CONFIGURATION.read_text("utf-8").split("## Not supported yet")[1].split("\n## ")[0]
    settings = re.findall(r"^- `([^`]+)`", section, re.MULTILINE)
    config = tmp_path / "config.toml"
    config.write_text(config_for_here(), encoding="utf-8")
    for setting in settings:
        key = setting.split(" = ")[0]
        with pytest.raises(UsageError) as refused:
            load_config(config, [setting])
        lines = [line for line in str(refused.value).splitlines() if f"{key} = " in line or f"--set {key}" in line]
        assert any("not supported yet" in line for line in lines), f"{setting}\n{refused.value}"
    rows = [row.key for row in unsupported._CONFIG_ROWS]
    named = [setting.split(" = ")[0].rpartition(".")[2] for setting in settings]
    assert sorted(named) == sorted(rows)


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
