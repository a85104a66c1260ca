"""Hostfiles: what they say, and every way in which one can be wrong."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from cadapter.errors import UsageError
from cadapter.training import nodes
from cadapter.training.nodes import Node, check_address, chosen, number_of_this_machine, read_hostfile


def written(folder: Path, text: str) -> str:
    file = folder / "hosts"
    file.write_text(text)
    return str(file)


def test_lines_with_comments_and_gaps(tmp_path: Path) -> None:
    file = written(tmp_path, "# the big ones\n\nnode-a.lab   slots=8\n10.0.0.7\tslots=2  # borrowed\n")
    assert read_hostfile(file) == [
        Node("node-a.lab", 8, f"{file}, line 3"),
        Node("10.0.0.7", 2, f"{file}, line 4"),
    ]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a slots=2\nb\n", 2, "'b' does not name a machine"),
        ("a 8\n", 1, "'a 8' does not name a machine"),
        ("a slots=2 b slots=2\n", 1, "does not name a machine"),
        ("me@a slots=2\n", 1, "does not name a machine"),
        ("\na slots=two\n", 2, "slots=two is no number"),
        ("a slots=0\n", 1, "slots=0 is no number"),
        ("a slots=-1\n", 1, "slots=-1 is no number"),
        ("a slots=2\n# b\na slots=4\n", 3, "a stands in {file}, line 1 already"),
        ("a slots=2\nlocalhost slots=2\n", 2, "localhost is a different machine on each"),
        ("127.0.0.1 slots=2\na slots=2\n", 1, "127.0.0.1 is a different machine on each"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, text: str, line: int, words: str) -> None:
    file = written(tmp_path, text)
    with pytest.raises(UsageError) as raised:
        read_hostfile(file)
    assert str(raised.value).startswith(f"{file}, line {line}: ")
    assert words.format(file=file) in str(raised.value)


@pytest.mark.parametrize(("text", "words"), [("# nothing\n\n", "names no machine"), (None, "No such file")])
def test_a_file_without_machines(tmp_path: Path, text: str | None, words: str) -> None:
    file = str(tmp_path / "none") if text is None else written(tmp_path, text)
    with pytest.raises(UsageError, match=words) as raised:
        read_hostfile(file)
    assert file in str(raised.value)
    assert "HOST slots=N" in str(raised.value)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="it is no text"):
        read_hostfile(str(tmp_path / "hosts"))


def test_one_machine_may_be_this_one(tmp_path: Path) -> None:
    machines = read_hostfile(written(tmp_path, "localhost slots=2\n"))
    assert [node.name for node in machines] == ["localhost"]
    assert number_of_this_machine(machines) == 0


def test_fewer_machines_and_processes_than_there_are() -> None:
    machines = [Node("a", 8, "hosts, line 1"), Node("b", 4, "hosts, line 2"), Node("c", 8, "hosts, line 3")]
    assert chosen(machines, None, None) == machines
    assert [(node.name, node.slots) for node in chosen(machines, 2, 3)] == [("a", 3), ("b", 3)]
    with pytest.raises(UsageError, match="--num-nodes 4: the hostfile names 3 machines"):
        chosen(machines, 4, None)
    with pytest.raises(UsageError, match="--num-gpus 5: hosts, line 2 gives b 4 slots only"):
        chosen(machines, None, 5)
    assert chosen(machines, 1, 5) == [Node("a", 5, "hosts, line 1")]  # the second machine takes no part


@pytest.mark.parametrize(
    ("own", "number"),
    [("node-b", 1), ("node-b.lab", 1), ("node-a.elsewhere", 0), ("10.0.0.7", 2), ("node", None), ("10.0.0.8", None)],
)
def test_which_machine_this_is(monkeypatch: pytest.MonkeyPatch, own: str, number: int | None) -> None:
    monkeypatch.setattr(nodes, "names_of_this_machine", lambda: {own, "127.0.0.1"})
    names = ("node-a", "node-b.lab", "10.0.0.7")
    machines = [Node(name, 1, f"hosts, line {line}") for line, name in enumerate(names, 1)]
    if number is not None:
        assert number_of_this_machine(machines) == number
        return
    with pytest.raises(
        UsageError, match=r"is none of node-a \(hosts, line 1\), node-b\.lab \(hosts, line 2\), 10"
    ) as raised:
        number_of_this_machine(machines)
    assert "--node-rank" in str(raised.value)


def test_a_machine_that_goes_by_two_names() -> None:
    with pytest.raises(UsageError, match="is 2 of"):
        number_of_this_machine([Node(socket.gethostname(), 1), Node("localhost", 1)])


@pytest.mark.parametrize("address", ["localhost", "127.0.0.1", "127.1.2.3"])
def test_an_address_that_others_do_not_reach(address: str) -> None:
    with pytest.raises(UsageError, match=f"--master-addr {address}"):
        check_address(address)
    check_address("10.0.0.1")
    check_address("localhost.example")
