"""What processes tell each other; and several processes, one error: whoever fails, one of them tells."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from cadapter.errors import CadapterError
from cadapter.training import distributed
from cadapter.training.distributed import (
    World,
    average,
    barrier,
    from_main,
    new_group,
    stream_to_main,
    sum_over_world,
)
from tests.joined_processes import run_processes, run_processes_well

Part = dict[str, Tensor]
HERE = "from tests.training.test_distributed import"


@pytest.mark.processes
@pytest.mark.parametrize(
    ("body", "rank"),
    [
        pytest.param("raise ValueError('spoilt')", 0, id="all"),
        pytest.param("world.is_main or barrier(); raise ValueError('spoilt')", 0, id="the-first-alone"),
        pytest.param("world.is_main and barrier(); raise ValueError('spoilt')", 1, id="another-alone"),
        pytest.param("on_main(lambda: int('spoilt'), world)", 0, id="work-of-the-first"),
    ],
)
def test_one_process_tells(body: str, rank: int) -> None:
    codes, said, seconds = run_processes(body)
    assert said.count("spoilt") == 1, said  # Python's own traceback of the one that tells
    assert said.count("Traceback") == 1, said
    assert f"From rank {rank} of 2, start-up:" in said
    assert codes == [1, 1]
    assert seconds < 60  # and not the half hour that a collective waits


LISTENS = "from cadapter.training.signals import StopSignals; StopSignals(); import os, signal, threading, time"


@pytest.mark.processes
def test_who_tells_is_not_stopped_by_a_launcher_that_ends_the_others() -> None:
    """A launcher sends SIGTERM to all as soon as one has ended, while rank 0 still waits for the last to hear of it."""
    stop = "threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()"
    body = f"{LISTENS}; {stop} if world.is_main else time.sleep(3); raise ValueError('spoilt')"
    codes, said, _ = run_processes(body)
    assert codes == [1, 1], said
    assert said.count("spoilt") == 1, said
    assert "From rank 0 of 2" in said
    assert "Stopped" not in said


@pytest.mark.processes
@pytest.mark.parametrize(("error", "code"), [("UsageError('x')", 2), ("KeyboardInterrupt", 130)])
def test_all_end_with_the_exit_code_of_the_error(error: str, code: int) -> None:
    codes, said, _ = run_processes(f"world.is_main or barrier(); raise {error}")
    assert codes[1] == code, said
    assert "done" not in said


@pytest.mark.processes
def test_what_processes_tell_each_other() -> None:
    """The assertions stand in the functions below, which run in three processes."""
    run_processes_well(f"{HERE} everything; everything(world)", 3)


def everything(world: World) -> None:
    for work in (tell, stream, one_at_a_time, fail_to_write, add_up):
        work(world)
        barrier()


def tell(world: World) -> None:
    assert sum_over_world(torch.tensor([world.rank, 1.0])).tolist() == [3.0, 3.0]
    assert from_main("größe" if world.is_main else "", world) == "größe"
    assert from_main("", world) == ""


# ---- streams --------------------------------------------------------------------------------------------------------


def parts_of(rank: int) -> Iterator[Part]:
    """Two parts of a process, and two with nothing in them: tensors of several dtypes, one not contiguous."""
    yield {}
    yield {f"{rank}.float": torch.full((2, 3), rank + 0.5).T, f"{rank}.half": torch.tensor([1.0, rank]).bfloat16()}
    yield {}
    yield {f"{rank}.count": torch.tensor(rank, dtype=torch.int32), f"{rank}.weight": torch.ones(3).requires_grad_()}


def assert_same_parts(found: list[Part], expected: list[Part]) -> None:
    assert [sorted(part) for part in found] == [sorted(part) for part in expected]
    for one, other in zip(found, expected, strict=True):
        for name, tensor in one.items():
            assert tensor.dtype == other[name].dtype
            assert torch.equal(tensor, other[name])
            assert tensor.is_contiguous()
            assert not tensor.requires_grad


def in_order(*sources: int) -> list[Part]:
    return [part for source in sources for part in parts_of(source) if part]


def stream(world: World) -> None:
    """Parts arrive on rank 0 alone, source by source and unchanged, whoever the sources are."""
    for sources in ([0, 2], [2, 1], [0], [1]):
        calls: list[list[Part]] = []
        stream_to_main(parts_of(world.rank), sources, world, lambda parts, to=calls: to.append(list(parts)))
        assert len(calls) == int(world.is_main)
        for found in calls:
            assert_same_parts(found, in_order(*sources))


def one_at_a_time(world: World) -> None:
    """A part is made when it is asked for: a model need not be in memory twice."""
    made = []

    def parts() -> Iterator[Part]:
        for number in range(4):
            made.append(number)
            yield {"number": torch.tensor([number])}

    def write(received: Iterator[Part]) -> None:
        for number, part in enumerate(received):
            assert int(part["number"]) == number
            assert len(made) == number + 1

    stream_to_main(parts(), [0], world, write)


def raising(parts: Iterator[Part]) -> None:
    """A ``write`` for which the disk is full after the first part."""
    next(parts)
    raise OSError("no space left")


def raising_at_once(parts: Iterator[Part]) -> None:
    raise OSError("no space left")


def raising_at_the_end(parts: Iterator[Part]) -> None:
    assert list(parts)
    raise OSError("no space left")


def spoilt_parts() -> Iterator[Part]:
    yield {"first": torch.ones(2)}
    raise OSError("no space left")


def assert_all_fail(world: World, own: Iterator[Part], sources: list[int], write: Callable[..., None]) -> None:
    """Rank 0 raises what was raised there, the others that it did; and nothing is left on the way."""
    kind = OSError if world.is_main else CadapterError
    with pytest.raises(kind, match="no space left") as caught:
        stream_to_main(own, sources, world, write)
    if not world.is_main:
        assert str(caught.value).startswith("Rank 0 failed.\n")
    found: list[Part] = []
    stream_to_main(parts_of(world.rank), [2, 0, 1], world, found.extend)
    assert_same_parts(found, in_order(2, 0, 1) if world.is_main else [])


def fail_to_write(world: World) -> None:
    """After an error on rank 0 every process raises, and none waits for its parts to be taken."""
    for sources in ([0, 1, 2], [1, 2], [0], [2, 0]):
        for write in (raising_at_once, raising, raising_at_the_end):
            assert_all_fail(world, parts_of(world.rank), sources, write)
    own = spoilt_parts() if world.is_main else parts_of(world.rank)
    assert_all_fail(world, own, [0, 1, 2], lambda parts: list(parts))
    # Who looks at some parts only hinders nobody either.
    stream_to_main(parts_of(world.rank), [1, 2], world, lambda parts: next(parts))
    assert from_main("on we go", world) == "on we go"


@pytest.mark.processes
def test_a_source_that_fails_between_its_parts_ends_the_job() -> None:
    codes, said, seconds = run_processes(f"{HERE} fail_to_send; fail_to_send(world)")
    assert said.count("OSError: no space left") == said.count("Traceback") == 1, said
    assert "From rank 1 of 2, start-up:" in said
    assert codes == [1, 1]
    assert seconds < 60


def fail_to_send(world: World) -> None:
    stream_to_main(spoilt_parts(), [1], world, lambda parts: list(parts))


# ---- averages -------------------------------------------------------------------------------------------------------


def add_up(world: World) -> None:
    """Means over all processes and over some, in buckets of one dtype that hold no more than they need to."""
    shapes = [(7,), (2, 3), (4,), (5, 5), (3,), (), (1,)]
    dtypes = [torch.float32, torch.float32, torch.bfloat16, torch.float32, torch.float32, torch.float32, torch.float64]

    def tensors(rank: int) -> list[Tensor]:
        """Small integers, whose sums every dtype holds exactly; one tensor is not contiguous."""
        generator = torch.Generator().manual_seed(rank)
        drawn = [torch.randint(-9, 9, shape, generator=generator) for shape in shapes]
        made = [tensor.to(dtype) for tensor, dtype in zip(drawn, dtypes, strict=True)]
        return [tensor.T if tensor.ndim == 2 else tensor for tensor in made]

    buckets: list[tuple[int, torch.dtype]] = []
    all_reduce = torch.distributed.all_reduce

    def counted(flat: Tensor, *args: object, **options: object) -> None:
        buckets.append((flat.numel(), flat.dtype))
        all_reduce(flat, *args, **options)

    torch.distributed.all_reduce = counted  # type: ignore[assignment]  # a whole process has no monkeypatch
    distributed.BUCKET_NUMBERS = 10
    ends = new_group([0, 2])
    for group, ranks, count in ((None, range(3), 2), (ends, (0, 2), 4)):
        found = tensors(world.rank)
        if world.rank not in ranks:
            continue
        before = [tensor.data_ptr() for tensor in found]
        average(found, group, count)
        assert [tensor.data_ptr() for tensor in found] == before
        for number, tensor in enumerate(found):
            expected = sum(tensors(rank)[number].double() for rank in ranks) / count
            assert torch.equal(tensor, expected.to(tensor.dtype))
            assert expected.count_nonzero() or expected.ndim == 0
    full, small = (13, torch.float32), (4, torch.bfloat16)
    rest = [(25, torch.float32), (4, torch.float32), (1, torch.float64)]
    assert buckets == [full, small, *rest] * (1 if world.rank == 1 else 2)
    average([], None, 3)
