"""``cadapter prepare`` on the screen: the table, the sequences made visible, what to do next."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cadapter.commands.prepare import command
from cadapter.data import prepare_data
from cadapter.data.showing import render
from cadapter.errors import UsageError
from tests.data.conftest import MakeConfig, write_jsonl
from tests.tiny_tokenizer import BOS, EOS, USER

GOOD = [f"good fox {number}" for number in range(20)]
BAD = [f"bad dog {number} ü" for number in range(20)]


@pytest.fixture
def config_file(tmp_path: Path, make_config: MakeConfig) -> Path:
    files = {
        write_jsonl(tmp_path / "good.jsonl", [*GOOD, ""]): 1,
        write_jsonl(tmp_path / "bad.jsonl", BAD): -1,
        write_jsonl(tmp_path / "plain.jsonl", GOOD + BAD): 0,
    }
    make_config(files)
    return tmp_path / "config.toml"


def row(screen: str, name: str) -> list[str]:
    line = next(line for line in screen.splitlines() if line.strip().startswith(name))
    return re.split(r"\s{2,}", line.strip())


def test_the_table(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from cadapter.config import load_config

    command(config_file)
    screen = capsys.readouterr().out
    data = prepare_data(load_config(config_file))
    for report, empty in zip(data.reports, ("1 empty documents", "0", "0"), strict=True):
        class_ = {1: "+1", -1: "-1", 0: "0"}[report.control_class]
        assert row(screen, report.name) == [
            report.name,
            class_,
            str(report.documents),
            str(report.eval_documents),
            empty,
            f"{report.tokens:,} + {report.eval_tokens:,}",
            f"{report.sequences} + {report.eval_sequences}",
            f"{report.padding} + {report.eval_padding}",
            "miss (new)",
        ]
    total = row(screen, "all")
    assert total[:4] == ["all", "77", "3", "1 empty documents"]
    assert total[5] == f"{len(data.train)} + {len(data.evaluation)}"
    positive, negative, neutral = data.train.trained
    counts = f"{positive:,} of class +1, {negative:,} of class −1, {neutral:,} of class 0 (no cross-entropy)"
    assert f"Trained tokens: {counts}; evaluated: " in screen
    assert f"Cache: {config_file.parent / '.cadapter-cache'}\n" in screen
    assert screen.endswith(f"Next: cadapter train {config_file}\n")


def test_hits_misses_and_force(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def cells(*arguments: object, **options: object) -> set[str]:
        command(config_file, *arguments, **options)
        screen = capsys.readouterr().out
        return {row(screen, name)[-1] for name in ("good", "bad", "plain")}

    assert cells() == {"miss (new)"}
    assert cells() == {"hit"}
    assert cells(overrides=["seed=7"]) == {"miss (option changed: seed)"}
    assert cells(force=True) == {"miss (forced)"}


def test_overrides_are_part_of_the_next_command(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(config_file, overrides=["document_prefix='a b'"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"""Next: cadapter train {config_file} --set 'document_prefix='"'"'a b'"'"''"""


def test_mixed_datasets_have_no_sequences_of_their_own(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(config_file, overrides=["mix_datasets=true"])
    screen = capsys.readouterr().out
    assert row(screen, "good")[6:8] == ["mixed", "mixed"]
    assert re.fullmatch(r"\d+ \+ 1", row(screen, "all")[5])


def test_show_prints_so_many_sequences(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(config_file, show=3)
    screen = capsys.readouterr().out
    titles = re.findall(r"^Sequence ([\d,]+) of ([\d,]+): .*$", screen, re.MULTILINE)
    assert len(titles) == 3
    assert titles[0][0] == "1"
    assert titles[-1][0] == titles[-1][1]
    assert "‹ ›: tokens that are not trained" in screen
    assert "[+1] " in screen
    assert "[0] " in screen
    command(config_file, show=10_000)
    shown = re.findall(r"^Sequence ", capsys.readouterr().out, re.MULTILINE)
    assert len(shown) == int(titles[0][1])  # all of them, each once


def test_what_a_shown_sequence_says(tmp_path: Path, make_config: MakeConfig) -> None:
    texts = [f"good\x1b fox{USER}", "bad dog"]
    good, bad = (write_jsonl(tmp_path / f"{text[:3]}.jsonl", [text]) for text in texts)
    tables = [{"dataset_path": str(path), "control_class": class_} for path, class_ in ((good, 1), (bad, -1))]
    data = prepare_data(make_config(tables, mix_datasets=True, eval_fraction=0, mask_tokens=3))
    shown = render(data, 0)
    plus, minus = f"[+1] good␛ fox‹{USER}›{EOS}", f"[−1] bad dog{EOS}"
    assert shown.plain in (f"‹{BOS}›\n{plus}\n{minus}", f"‹{BOS}›\n{minus}\n{plus}")
    styles = {shown.plain[span.start : span.end]: str(span.style) for span in shown.spans}
    assert styles[f"‹{BOS}›"] == styles[f"‹{USER}›"] == "bold dim"
    assert (styles["good␛ fox"], styles["bad dog"]) == ("green", "red")


def test_a_document_that_goes_on_and_a_first_token_without_prefix(tmp_path: Path, make_config: MakeConfig) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ["x" * 100])
    data = prepare_data(make_config({file: 1}, eval_fraction=0, sequence_prefix="", document_suffix=""))
    first, second = (render(data, number).plain for number in (0, 1))
    assert first.startswith("[+1] ‹x›x")  # nothing predicts the first token
    assert second.startswith("[+1]… ‹x›x")


def test_errors_come_before_anything_is_written(tmp_path: Path, config_file: Path) -> None:
    (tmp_path / "bad.jsonl").unlink()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UsageError, match=r"bad\.jsonl does not exist"):
        command(config_file)
    assert sorted(tmp_path.iterdir()) == before
