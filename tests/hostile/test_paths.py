"""Names and links that lead elsewhere, the layout of the hub's cache, and how other programs are started."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import pytest

from cadapter.data import Tokenizer
from cadapter.errors import UsageError
from cadapter.files import refuse_links_out
from cadapter.models.checkpoint import Checkpoint, resolve_model
from cadapter.models.saving import copy_companions
from cadapter.training.launch import without_modules_of_here
from cadapter.training.nodes import read_hostfile
from cadapter.training.state import fault_of, load_checkpoint
from tests.tiny_project import Project

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("shared", [False, True], ids=["blobs-of-the-repository", "blobs-that-repositories-share"])
def test_links_of_the_hubs_cache_are_followed(
    good: Project, tmp_path: Path, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``models--NAME/snapshots/REVISION/FILE`` is a link to ``blobs/HASH``, and that may be one to ``../blobs/…``."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--base"
    snapshot, blobs = repository / "snapshots" / revision, repository / "blobs"
    for directory in (snapshot, blobs, tmp_path / "blobs" / "ab", repository / "refs"):
        directory.mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    for number, file in enumerate(sorted((good.root / "model").iterdir())):
        blob = blobs / f"{number:064x}"
        if shared:
            shutil.copyfile(file, tmp_path / "blobs" / "ab" / blob.name)
            blob.symlink_to(f"../../blobs/ab/{blob.name}")
        else:
            shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    directory = resolve_model("someone/base")
    assert directory.resolve() == snapshot.resolve()
    (tmp_path / "base").symlink_to(snapshot)  # and a link to the directory itself leads where its user wants
    for place in (directory, tmp_path / "base"):
        assert len(Checkpoint(place).tensors(["model.norm.weight"])) == 1
        assert Tokenizer(place).fast.is_fast
    copied = tmp_path / "copied"
    copied.mkdir()
    copy_companions(snapshot, copied, None)
    assert not any(path.is_symlink() for path in copied.iterdir())
    (blobs / "secret").symlink_to("/etc/passwd")
    (snapshot / "LICENSE").symlink_to("../../blobs/secret")
    with pytest.raises(UsageError, match="LICENSE is a link that leads out of its directory, to /etc/passwd"):
        Checkpoint(snapshot)


@pytest.mark.parametrize(
    ("link", "to", "allowed"),
    [
        ("a.json", "b.json", True),
        ("a.json", "../outside.json", False),
        ("a.json", "/etc/passwd", False),
        ("a.json", "a.json", True),  # a circle leads nowhere; reading it says so
        ("a.json", "sub/../../outside.json", False),
        ("a.json", "sub/c.json", True),
        ("a.png", "../outside.json", True),  # which nobody reads
    ],
)
def test_links_may_not_leave(tmp_path: Path, link: str, to: str, allowed: bool) -> None:
    directory = tmp_path / "snapshots" / "fake"  # without models--NAME around it, blobs/ beside it are no part of it
    (directory / "sub").mkdir(parents=True)
    for file in (directory / "b.json", directory / "sub" / "c.json", tmp_path / "snapshots" / "outside.json"):
        file.write_text("{}")
    (directory / link).symlink_to(to)
    if allowed:
        refuse_links_out(directory, ("*.json",))
    else:
        with pytest.raises(UsageError, match="leads out of its directory"):
            refuse_links_out(directory, ("*.json",))


def test_blobs_that_are_a_link_themselves_allow_nothing(tmp_path: Path) -> None:
    snapshot = tmp_path / "cache" / "models--a--b" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("{}")
    (tmp_path / "cache" / "models--a--b" / "blobs").symlink_to(tmp_path / "outside")
    (snapshot / "config.json").symlink_to("../../blobs/secret")
    with pytest.raises(UsageError, match="leads out of its directory"):
        refuse_links_out(snapshot, ("*.json",))


def test_a_checkpoint_names_its_own_files_only(good: Project, tmp_path: Path) -> None:
    (source,) = (good.root / "run" / "checkpoints").glob("step-*")
    step = shutil.copytree(source, tmp_path / source.name)
    assert fault_of(step) is None
    outside = tmp_path / "outside"
    (step / "state.json").rename(outside)
    (step / "state.json").symlink_to(outside)
    with pytest.raises(UsageError, match="leads out of its directory"):
        load_checkpoint(step)
    text = (step / "manifest.json").read_text()
    for name in ("../outside", str(outside), "..", "", "x" * 5000):
        (step / "manifest.json").write_text(text.replace("state.json", name))
        assert fault_of(step) == f"{name} is missing"


@pytest.mark.parametrize("name", ["-Fevil", "-oProxyCommand=x", "a;reboot", "$(reboot)", "`x`", "a b", "../x", "a/b"])
def test_a_hostfile_names_machines_and_nothing_else(tmp_path: Path, name: str) -> None:
    file = tmp_path / "hosts"
    file.write_text(f"node-a slots=1\n{name} slots=1\n")
    with pytest.raises(UsageError, match=r"line 2: .* does not name a machine"):
        read_hostfile(str(file))


def test_processes_do_not_import_from_where_they_are_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert without_modules_of_here({"A": "1"}) == {"A": "1", "PYTHONSAFEPATH": "1"}
    assert without_modules_of_here({"PYTHONSAFEPATH": ""}) == {"PYTHONSAFEPATH": ""}  # who sets it decides
    monkeypatch.chdir(ROOT)  # from where cadapter itself is imported
    assert without_modules_of_here({"A": "1"}) == {"A": "1"}


# ---- how other programs are started ---------------------------------------------------------------------------------

STARTERS = {"run", "Popen", "call", "check_call", "check_output"}
SHELLS = {"system", "popen", "getoutput", "getstatusoutput", "spawnl", "execl", "create_subprocess_shell"}


def through_a_shell(tree: ast.AST) -> list[int]:
    """Lines that start a program through a shell, or by a command that is one string."""
    lines = []
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, (ast.Attribute, ast.Name))):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
        of = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        shell = any(each.arg == "shell" and ast.unparse(each.value) != "False" for each in node.keywords)
        command = node.args[0] if node.args else None
        string = isinstance(command, ast.JoinedStr | ast.BinOp) or (
            isinstance(command, ast.Constant) and isinstance(command.value, str)
        )
        started = of == "subprocess" and name in STARTERS
        if (
            shell
            or (started and (string or command is None))
            or (of in ("os", "subprocess", "asyncio") and name in SHELLS)
        ):
            lines.append(node.lineno)
    return lines


def test_no_command_goes_through_a_shell() -> None:
    files = [file for folder in ("cadapter", "examples") for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    found = {str(file.relative_to(ROOT)): through_a_shell(ast.parse(file.read_text("utf-8"))) for file in files}
    assert {file: lines for file, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "line",
    ["subprocess.run('ls', shell=True)", "subprocess.Popen(words, shell=yes)", "os.system(x)", "os.popen('x')",
     "subprocess.run(f'ls {x}')", "subprocess.check_output('ls ' + x)", "subprocess.getoutput(x)"],
)  # fmt: skip
def test_shells_are_found(line: str) -> None:
    assert through_a_shell(ast.parse(line)) == [1]


ASKED = {"own_code.py": {"True"}, "tokenising.py": {"True"},
         "loading.py": {"is_own_class(config)"}, "attach.py": {"is_own_class(checkpoint.config)"}}  # fmt: skip
"""Where code of a model is run because it is allowed; ``tests/hostile/test_own_code.py`` shows that this is asked."""


def test_code_of_models_is_run_nowhere_unasked() -> None:
    """Whoever loads with transformers says ``trust_remote_code``, and says no but for a few places."""
    loaders, said = 0, []
    for file in (ROOT / "cadapter").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func).lower().startswith("auto")):
                continue
            if isinstance(node.func, ast.Attribute) and node.func.attr in ("from_pretrained", "from_config"):
                loaders += 1
                words = {each.arg: ast.unparse(each.value) for each in node.keywords}
                if words.get("trust_remote_code") not in {"False"} | ASKED.get(file.name, set()):
                    said.append(f"{file.name}:{node.lineno}")
    assert loaders >= 4
    assert said == []
