"""Whatever bytes users' files hold: what reads them answers in plain words, and no other file changes.

The same targets as in the campaign by hand (``tests/fuzz/campaign.py``), with inputs that hypothesis makes: valid files
with values replaced, left out and doubled, with bytes changed, and cut off.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.campaign import changed_json, files_in
from tests.fuzz.targets import TARGETS, Target, call

QUICK, LONG = 40, 1500


def inputs_of(target: Target) -> st.SearchStrategy[bytes]:
    @st.composite
    def make(draw: st.DrawFn) -> bytes:
        data = draw(st.sampled_from(target.seeds))
        kind = draw(st.integers(0, 9))
        if kind == 0:
            return draw(st.binary(max_size=300))
        if kind < 7:
            random_ = random.Random(draw(st.integers(0, 2**32)))
            for _ in range(draw(st.integers(1, 3))):
                try:
                    data = changed_json(data, random_)
                except (ValueError, IndexError):  # this one is no JSON
                    break
        for _ in range(draw(st.integers(0 if kind < 7 else 1, 3))):
            place, length = draw(st.integers(0, len(data))), draw(st.integers(0, 8))
            word = draw(st.sampled_from([*target.words, "", "\x00"])).encode("utf-8", "surrogatepass")
            data = data[:place] + draw(st.sampled_from([word, draw(st.binary(max_size=8))])) + data[place + length :]
        return data[: draw(st.integers(0, len(data)))] if kind == 9 else data

    return make()


def fuzz(name: str, directory: Path, count: int) -> tuple[int, int]:
    """Call a target ``count`` times; how many inputs there were, and how many of them were accepted."""
    target = TARGETS[name]
    target.lay_out(directory)
    seen, accepted = 0, 0
    for data in target.seeds:
        call(target, directory, data)
    before = files_in(directory, target.file)

    @settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(inputs_of(target))
    def one(data: bytes) -> None:
        nonlocal seen, accepted
        seen += 1
        accepted += call(target, directory, data)

    one()
    assert files_in(directory, target.file) == before
    return seen, accepted


@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes_are_answered_in_plain_words(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: Callable[[int], int]
) -> None:
    monkeypatch.chdir(tmp_path)
    wanted = counted(QUICK // 4 if TARGETS[name].slow else QUICK)
    seen, accepted = fuzz(name, tmp_path, wanted)
    assert seen >= wanted
    assert accepted <= seen


@pytest.fixture(params=[1, pytest.param(LONG // QUICK, marks=pytest.mark.slow)], ids=["some", "many"])
def counted(request: pytest.FixtureRequest) -> Callable[[int], int]:
    return lambda count: count * request.param


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "manifest"])
def test_what_is_valid_is_accepted(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the targets get past their first line."""
    monkeypatch.chdir(tmp_path)
    TARGETS[name].lay_out(tmp_path)
    assert call(TARGETS[name], tmp_path, TARGETS[name].seeds[0])


def test_faults_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The campaign and these tests would tell of an error that is not expected, and of a file that changes."""

    def careless(directory: Path) -> object:
        return (directory / "config.toml").read_text("ascii")

    def meddling(directory: Path) -> object:
        with (directory / "other").open("ab") as file:  # longer with every call
            return file.write(b"x")

    for read in (careless, meddling):
        monkeypatch.setitem(TARGETS, "config", Target(lambda directory: None, "config.toml", read, (b"{}",)))
        with pytest.raises((UnicodeDecodeError, AssertionError)):
            fuzz("config", tmp_path, 300)
