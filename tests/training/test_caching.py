"""Who builds the data's cache, in real processes that stand for those of two machines."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.joined_processes import run_processes
from tests.tiny_project import Project, make_model, texts, write_jsonl

pytestmark = pytest.mark.processes

BODY = """
    from dataclasses import replace
    from pathlib import Path
    from cadapter.config import load_config
    from cadapter.data import prepare_data
    from cadapter.training.caching import prepare_in_turn
    world = replace(world, local_rank=world.rank % 2)  # two processes on each of two machines
    config = load_config(Path({roots!r}[world.rank // 2]) / "run.toml")
    data = prepare_in_turn(lambda: prepare_data(config), world)
    barrier()  # training would begin
    hits = [report.cache_hit for report in data.reports]
    print(f"rank {{world.rank}}: {{hits}} {{data.fingerprint}} {{data.directories[0].parent}}", flush=True)
"""


def prepared(*roots: Path) -> tuple[list[int], list[str], dict[int, list[str]]]:
    """Exit codes, what was said, and by rank: which caches were found, the fingerprint, the cache's directory."""
    codes, said, _ = run_processes(BODY.format(roots=[str(root) for root in roots]), 4)
    results = {int(line[5]): line[8:].rsplit(" ", 2) for line in said.splitlines() if line.startswith("rank ")}
    return codes, [line for line in said.splitlines() if not line.startswith("rank ")], results


def a_project(root: Path, model: Path, seed: int = 0) -> Path:
    root.mkdir(exist_ok=True)
    (root / "model").symlink_to(model)
    write_jsonl(root / "positive.jsonl", texts("positive", 20, seed))
    Project(root).write_config("run", kinds=("positive",))
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "model")


@pytest.mark.slow
def test_where_paths_are_shared_rank_0_builds_and_the_others_wait(tmp_path: Path, model: Path) -> None:
    root = a_project(tmp_path / "shared", model)
    _, said, found = prepared(root, root)
    assert len(found) == 4, said
    assert [line.split(": ")[1] for line in said if "wait" in line] == ["waiting for rank 0, which prepares the data."]
    assert [found[rank][0] for rank in range(4)] == ["[False]", "[True]", "[True]", "[True]"]
    assert len(list((root / ".cadapter-cache").iterdir())) == 1


def test_a_machine_with_a_cache_of_its_own_builds_it_once(tmp_path: Path, model: Path) -> None:
    roots = [a_project(tmp_path / name, model) for name in ("one", "other")]
    _, said, found = prepared(*roots)
    assert len(found) == 4, said
    assert [found[rank][0] for rank in range(4)] == ["[False]", "[True]", "[False]", "[True]"]
    assert len({fingerprint for _, fingerprint, _ in found.values()}) == 1
    assert [found[rank][2] for rank in range(4)] == [str(root / ".cadapter-cache") for root in roots for _ in "12"]


@pytest.mark.slow
def test_other_data_on_another_machine_are_refused(tmp_path: Path, model: Path) -> None:
    roots = [a_project(tmp_path / name, model, seed) for seed, name in enumerate(("one", "other"))]
    codes, said, found = prepared(*roots)
    assert 0 not in codes
    assert found == {}, said
    assert sum("are not those of rank 0." in line for line in said) == 1
