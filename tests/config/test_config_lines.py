"""Lines of keys, on layouts chosen to confuse a scanner."""

from __future__ import annotations

import random

import pytest

from cadapter.config.lines import index_lines, line_of
from cadapter.config.toml import parse_toml

PLAIN = """\
# lr = 1
model_dir = "m"   # output_dir = "x"

lr = 2e-5
[[datasets]]  # first
dataset_path = "a"
control_class = 1

[[datasets]]
control_class = -1
dataset_path = "b"
"""

HOSTILE = '''\
title = """
lr = 7
[[datasets]]
a quote " and two "" and an escape \\""" and = [ # no comment
"""
other = \'\'\'lr = 8 # ' and '' and \\ \'\'\'
ids = [ # [ ]
    1, # ]
    "]", \'[\', """
]""",
    [2,
     3],
]
"quoted.key" = "# = ["
\'single\' = 1
  spaced . "dotted key"  .x = { a = "}", b = [ { c = 1 } ], "d" = \'{\' }
"\\u006cr" = 5
when = 1979-05-27 07:32:00
five = """x"""""
six = \'\'\'\'\'y\'\'\'\'\'
empty = ""
no = \'\'

[ table . inner ]
k = 1
[[datasets]]
v = 1
[datasets.sub]
w = 2
[[datasets.many]]
[[datasets.many]]
z = 3
[[datasets]]
v = 4
[datasets.sub]
w = 5
last = 6'''


def test_plain_layout() -> None:
    lines = index_lines(PLAIN)
    assert lines[("model_dir",)] == 2
    assert lines[("lr",)] == 4
    assert ("output_dir",) not in lines
    assert lines[("datasets", 0)] == 5
    assert lines[("datasets", 0, "control_class")] == 7
    assert lines[("datasets", 1)] == 9
    assert lines[("datasets", 1, "control_class")] == 10
    assert lines[("datasets", 1, "dataset_path")] == 11


@pytest.mark.parametrize(
    ("path", "start"),
    [
        (("title",), "title ="),
        (("other",), "other ="),
        (("ids",), "ids ="),
        (("ids", 0), "    1,"),
        (("ids", 1), '    "]"'),
        (("ids", 2), '    "]"'),
        (("ids", 3), '    "]"'),
        (("ids", 4), "    [2"),
        (("ids", 4, 1), "     3"),
        (("quoted.key",), '"quoted'),
        (("single",), "'single"),
        (("spaced",), "  spaced"),
        (("spaced", "dotted key", "x"), "  spaced"),
        (("spaced", "dotted key", "x", "b", 0, "c"), "  spaced"),
        (("spaced", "dotted key", "x", "d"), "  spaced"),
        (("lr",), '"\\u006cr"'),
        (("when",), "when"),
        (("five",), "five"),
        (("six",), "six"),
        (("no",), "no ="),
        (("table",), "[ table"),
        (("table", "inner", "k"), "k ="),
        (("datasets", 0, "v"), "v = 1"),
        (("datasets", 0, "sub", "w"), "w = 2"),
        (("datasets", 0, "many", 1, "z"), "z = 3"),
        (("datasets", 1, "v"), "v = 4"),
        (("datasets", 1, "sub", "w"), "w = 5"),
        (("datasets", 1, "sub", "last"), "last"),
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_hostile_layout(path: tuple[str | int, ...], start: str, newline: str) -> None:
    line = index_lines(HOSTILE.replace("\n", newline))[path]
    assert HOSTILE.split("\n")[line - 1].startswith(start)


def paths_of(value: object, path: tuple[str | int, ...] = ()) -> set[tuple[str | int, ...]]:
    members: list[tuple[str | int, object]] = []
    if isinstance(value, dict):
        members = list(value.items())
    elif isinstance(value, list):
        members = list(enumerate(value))
    return {path}.union(*(paths_of(member, (*path, key)) for key, member in members))


@pytest.mark.parametrize("source", [PLAIN, HOSTILE, "", "# only a comment", "\n\n", "a = []", "a = {}"])
def test_paths_are_those_of_the_parser(source: str) -> None:
    assert set(index_lines(source)) == paths_of(parse_toml(source)) - {()}


def test_random_documents_agree_with_the_parser() -> None:
    rng = random.Random(0)

    def value(depth: int) -> str:
        kind = rng.randrange(9 if depth else 7)
        blank = rng.choice(["", " ", "\n", "\n# ] } = \" ' \n", "\n\n  "])
        if kind == 7:
            return "[" + ",".join(blank + value(depth - 1) + blank for _ in range(rng.randrange(4))) + blank + "]"
        if kind == 8:
            return "{" + ", ".join(f"k{i} = {value(0)}" for i in range(rng.randrange(4))) + "}"
        texts = ["1", "-2.5e-3", "true", '"a # [ \\" b"', "'c \" ]'", '"""\n\\""" " ""\n= 1"""', "'''\n[x]\n' '''"]
        return texts[kind]

    for _ in range(300):
        parts = []
        for number in range(rng.randrange(6)):
            header = rng.choice(["", "", f"[t{number}]", "[[list]]", "[[list]]\n[list.sub]", f"[t{number}.'a.b']"])
            keys = [f"x{number}{rng.choice(['', '.y', ' . z'])}{index}" for index in range(rng.randrange(3))]
            parts += [header, *(f"{key} = {value(2)} # comment = '''" for key in keys)]
        source = "\n".join(parts)
        lines = index_lines(source)
        assert set(lines) == paths_of(parse_toml(source)) - {()}, source
        for path, line in lines.items():
            if isinstance(path[-1], str) and len(path) > 1:
                assert path[-1] in source.split("\n")[line - 1], (source, path)


def test_line_of_falls_back_to_the_table_around() -> None:
    lines = index_lines(PLAIN)
    assert line_of(lines, ("datasets", 1, "text_field")) == 9
    assert line_of(lines, ("sequence_len",)) is None
