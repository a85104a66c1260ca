"""``cadapter prepare`` on the screen: the table, the sequences made visible, what to do next."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from cadapter.commands.prepare import command
from cadapter.config import load_config
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


def row(screen: str, name: str, table: str = "Prepared data") -> list[str]:
    lines = screen[screen.index(table) :].splitlines()
    line = next(line for line in lines if line.strip().startswith(name))
    return re.split(r"\s{2,}", line.strip())


def test_the_tables(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(config_file)
    screen = capsys.readouterr().out
    data = prepare_data(load_config(config_file))
    for report, empty in zip(data.reports, (1, 0, 0), strict=True):
        assert row(screen, report.name) == [
            report.name,
            {1: "+1", -1: "−1", 0: "0"}[report.control_class],
            f"{report.documents} + {report.eval_documents}",
            f"{report.tokens:,} + {report.eval_tokens:,}",
            f"{report.sequences} + {report.eval_sequences}",
            "miss (new)",
        ]
        padding = report.padding + report.eval_padding
        left_out = [report.name, str(empty), str(report.split_documents), str(padding)]
        assert row(screen, report.name, "Left out, cut and padded") == left_out
    assert row(screen, "all")[:2] == ["all", "77 + 3"]
    assert row(screen, "all")[3] == f"{len(data.train)} + {len(data.evaluation)}"
    split = sum(report.split_documents for report in data.reports)
    padding = data.train.padding + data.evaluation.padding
    assert row(screen, "all", "Left out, cut and padded") == ["all", "1", str(split), str(padding)]
    assert re.search(r"^  dataset +empty +split +tokens of padding *$", screen, re.MULTILINE)
    assert f"Cache: {config_file.parent / '.cadapter-cache'}\n" in screen
    assert screen.endswith(f"Next: cadapter train {config_file}\n")


def bars(screen: str, title: str) -> dict[str, tuple[str, str]]:
    """What stands under ``title``: {label: (bar, numbers)}."""
    block = screen[screen.index(title) :].split("\n\n")[0].splitlines()[1:]
    found = [re.fullmatch(r" +(.+?) ([█▏▎▍▌▋▊▉]*) (.+)", line) for line in block]
    return {match[1]: (match[2], match[3]) for match in found if match}


def test_lengths_and_classes(tmp_path: Path, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    long, short = write_jsonl(tmp_path / "long.jsonl", GOOD * 3), write_jsonl(tmp_path / "short.jsonl", ["x"])
    make_config({long: 1, short: -1}, eval_fraction=0)
    command(tmp_path / "config.toml")
    captured = capsys.readouterr()
    lengths = bars(captured.out, "Documents by their tokens")
    (most,) = [label for label, (_, number) in lengths.items() if number == "60"]
    assert lengths[most][0] == "█" * 40
    assert lengths["2 to 3"] == ("▋", "1")
    classes = bars(captured.out, "Trained tokens by class")
    positive, negative = (int(classes[label][1].split(" + ")[0].replace(",", "")) for label in classes)
    assert list(classes) == ["+1 positive", "−1 negative"]
    assert negative == 2
    assert f"Class +1 has {positive / 2:.1f} times the tokens of class −1" in captured.out
    assert "20 texts occur more than once; 40 documents repeat an earlier one." in captured.out
    assert "warning" not in captured.err.replace("no sequence for evaluation", "")


def test_repeats_that_do_harm(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """plain.jsonl holds all texts of the others: of its own class, and of each other held-out text it has its own."""
    command(config_file)
    said = capsys.readouterr()
    assert "40 texts occur more than once; 40 documents repeat an earlier one." in said.out
    assert "warning: 40 texts occur in more than one class, which cancel each other out." in said.err
    assert re.search(r"warning: \d texts? occurs? both in training and in evaluation", said.err)


def test_bad_records_are_left_out_and_listed(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "good.jsonl").open("a") as file:
        file.write('{"text": 3}\n{"text"\n')
    with pytest.raises(UsageError, match=r"good\.jsonl, line 22: (.|\n)*cadapter prepare CONFIG --skip-bad 2"):
        command(config_file)
    with pytest.raises(
        UsageError, match=r"2 records cannot be used, and --skip-bad allows 1(.|\n)*good\.jsonl, line 23"
    ):
        command(config_file, skip_bad=1)
    for _ in range(2):  # built, then found
        capsys.readouterr()
        command(config_file, skip_bad=2)
        said = capsys.readouterr()
        assert row(said.out, "good", "Left out, cut and padded")[2] == "2"
        good = tmp_path / "good.jsonl"
        assert f"{good}: 2 records that cannot be used are left out" in said.err
        assert f"{good}, line 22: 'text' must be a string, but is a number." in said.err
        assert f"{good}, line 23: broken JSON" in said.err
    with pytest.raises(UsageError, match="line 22"):  # not quietly from the cache
        command(config_file)
    command(config_file, skip_bad=2)
    assert row(capsys.readouterr().out, "good")[-1] == "hit"
    used = prepare_data(load_config(config_file)).reports[0]  # as train does
    assert (used.cache_hit, len(used.bad_records)) == (True, 2)
    assert "2 records that cannot be used are left out" in capsys.readouterr().err


def test_bad_records_are_all_told_at_once(config_file: Path, tmp_path: Path) -> None:
    bad = ['{"text": 3}', '{"text"', '["x"]', '{"other": "y"}']
    with (tmp_path / "good.jsonl").open("a") as file:
        file.write("\n".join(bad) + "\n")
    with pytest.raises(UsageError) as refused:
        command(config_file)
    lines = str(refused.value).splitlines()
    good = tmp_path / "good.jsonl"
    assert lines == [
        "4 records cannot be used:",
        f"{good}, line 22: 'text' must be a string, but is a number.",
        f"{good}, line 23: broken JSON: Expecting ':' delimiter (column 8).",
        f"{good}, line 24: expected an object with 'text', found a list.",
        f"{good}, line 25: there is no 'text' (fields: other).",
        "Correct them, or leave them out: cadapter prepare CONFIG --skip-bad 4",
    ]
    with pytest.raises(
        UsageError, match=r"^4 records cannot be used, and --skip-bad allows 2:\n(.*\n){4}.*--skip-bad 4$"
    ):
        command(config_file, skip_bad=2)


def test_of_very_many_bad_records_the_first_are_told(config_file: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "good.jsonl", [*GOOD, *range(2000)])
    with pytest.raises(UsageError) as refused:
        command(config_file)
    lines = str(refused.value).splitlines()
    assert lines[0] == "10 records cannot be used, and there may be more behind them:"
    assert [int(re.search(r"line (\d+):", line)[1]) for line in lines[1:-1]] == list(range(21, 31))
    with pytest.raises(UsageError, match=r"^110 records cannot be used, and --skip-bad allows 100; .* The first 10:\n"):
        command(config_file, skip_bad=100)


def test_bad_records_of_several_datasets_are_told_together(config_file: Path, tmp_path: Path) -> None:
    for name in ("good", "bad"):
        with (tmp_path / f"{name}.jsonl").open("a") as file:
            file.write('{"text": 3}\n')
    with pytest.raises(
        UsageError, match=r"^2 records cannot be used:\n.*good\.jsonl, line 22.*\n.*bad\.jsonl, line 21"
    ):
        command(config_file, overrides=["mix_datasets=true"])


def test_texts_in_more_than_one_class_are_shown_with_their_places(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):  # built, then from the cache
        command(config_file)
        said = capsys.readouterr().err
        for number in range(5):
            good, plain = (f"{tmp_path / name}.jsonl, line {number + 1}" for name in ("good", "plain"))
            assert f"'good fox {number}': {good} (+1); {plain} (0)\n" in said
        assert "good fox 5" not in said
        assert "and 35 more" in said


def test_the_tokens_of_prepare_and_train_are_named(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(config_file)
    data = prepare_data(load_config(config_file))
    tokens, documents = int(data.train.tokens.sum()), sum(report.tokens for report in data.reports)
    assert tokens == documents + len(data.train)  # a BOS each
    screen = " ".join(capsys.readouterr().out.split())
    assert f"{tokens:,} tokens to train on, with the prefix of each sequence, as train counts them." in screen


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
    assert row(screen, "good")[4] == "mixed"
    assert re.fullmatch(r"\d+ \+ 1", row(screen, "all")[3])
    assert row(screen, "good", "Left out, cut and padded")[-1] == "mixed"


def test_show_prints_so_many_sequences(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(config_file, show=3)
    screen = capsys.readouterr().out
    titles = re.findall(r"^Sequence ([\d,]+) of ([\d,]+): .*$", screen, re.MULTILINE)
    assert len(titles) == 3
    assert titles[0][0] == "1"
    assert titles[-1][0] == titles[-1][1]
    assert "‹not trained›" in screen
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
    assert styles[BOS] == styles[USER] == "bold dim"
    assert (styles["good␛ fox"], styles["bad dog"]) == ("green", "red")
    assert styles[EOS] in ("bold green", "bold red")  # of the document that comes last
    assert (styles["[+1]"], styles["[−1]"]) == ("bold reverse green", "bold reverse red")
    assert "‹" not in render(data, 0, marks=False).plain


def test_characters_are_shown_whole(tmp_path: Path, make_config: MakeConfig) -> None:
    """Also where masking cuts between the bytes of one."""
    file = write_jsonl(tmp_path / "a.jsonl", ["a 🦊 b"])
    data = prepare_data(make_config({file: 1}, eval_fraction=0))
    (fox, *_) = [id_ for id_ in data.train.rows([0])[0][0].tolist() if data.tokenizer.decode(np.array([id_])) == "�"]
    masked = prepare_data(make_config({file: 1}, eval_fraction=0, mask_tokens=fox))
    assert "🦊" in render(masked, 0).plain
    assert "�" not in render(masked, 0).plain


def test_isolated_documents_begin_untrained(tmp_path: Path, make_config: MakeConfig) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ["x fox", "y dog"])
    keys = {"eval_fraction": 0, "document_attention": "isolated"}
    own_bos = render(prepare_data(make_config({file: 1}, **keys)), 0).plain
    assert own_bos == f"‹{BOS}›\n[+1] x fox{EOS}\n[+1] ‹{BOS}›y dog{EOS}"
    without = render(prepare_data(make_config({file: 0}, document_prefix="", **keys)), 0).plain
    assert without == f"‹{BOS}›\n[0] x fox{EOS}\n[0] ‹y› dog{EOS}"


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
