"""The choice of what to recompute: what the user says holds; "auto" takes the fastest that fits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cadapter.training.recompute import FASTEST_FIRST, Needs, decide, slower

GIB = 2**30
LLAMA_8B = Needs(
    weights=13.99 * GIB,
    blocks=32,
    hidden_size=4096,
    intermediate_size=14336,
    number_bytes=2,
    micro_batch=4096,
    compiled=True,
)
"""Control Adapters on a model of the shape of Llama 3.1 8B, with token embeddings on the host."""
LORA_8B = replace(LLAMA_8B, weights=16.33 * GIB, trained_inside=True)


@pytest.mark.parametrize(("setting", "recomputed"), [("none", []), ("full", [0, 1, 2, 3]), (2, [0, 2]), (3, [0, 3])])
def test_what_the_user_says_holds_whatever_the_memory(setting: str | int, recomputed: list[int]) -> None:
    decision = decide(setting, LLAMA_8B, free=1)
    assert [index for index in range(4) if decision.block(index) == "full"] == recomputed


@pytest.mark.parametrize("setting", ["selective", "offload"])
def test_other_settings_hold_for_every_block(setting: str) -> None:
    assert [decide(setting, LLAMA_8B, free=1).block(index) for index in range(3)] == [setting] * 3


@pytest.mark.parametrize(
    ("free_gib", "keep"),
    [(139, "none"), (40, "none"), (23.5, "selective"), (18, "full"), (16.5, "offload"), (12, "offload")],
)
def test_auto_takes_the_fastest_that_fits(free_gib: float, keep: str) -> None:
    """A card of 24 GB has 23.5 GiB free, where keeping narrow products takes 21.4 GiB."""
    decision = decide("auto", LLAMA_8B, int(free_gib * GIB))
    assert [decision.block(index) for index in range(3)] == [keep] * 3
    assert keep in decision.reason
    assert f"{free_gib:.1f} GiB free" in decision.reason


def test_auto_on_cpu_keeps_everything() -> None:
    assert decide("auto", LLAMA_8B, None).block(0) == "none"


def test_several_processes_choose_with_more_of_a_margin() -> None:
    """They cannot choose again in the first step."""
    free = int(23.5 * GIB)
    assert decide("auto", LLAMA_8B, free).keep == "selective"
    assert decide("auto", LLAMA_8B, free, several=True).keep == "full"


def test_a_first_stage_keeps_the_micro_batches_of_all_stages() -> None:
    """Two stages hold half the blocks each, but the first keeps two micro-batches."""
    half = replace(LLAMA_8B, weights=LLAMA_8B.weights / 2, blocks=16, in_flight=2)
    saved = (LLAMA_8B.bytes("none") - half.bytes("none")) / GIB
    assert saved == pytest.approx(13.99 / 2)  # of what is kept, nothing


@pytest.mark.parametrize(
    ("needs", "keep", "measured"),
    [
        (LLAMA_8B, "none", 26.8),
        (LLAMA_8B, "selective", 21.4),
        (LLAMA_8B, "full", 16.0),
        (LLAMA_8B, "offload", 15.1),
        (replace(LLAMA_8B, compiled=False), "none", 32.5),
        (LORA_8B, "none", 34.6),
        (LORA_8B, "selective", 25.9),
        (LORA_8B, "full", 19.3),
    ],
)
def test_the_estimate_is_near_what_was_measured(needs: Needs, keep: str, measured: float) -> None:
    """Peaks on an H100, sequences of 4,096 tokens; estimates are used with a margin of 7 %."""
    assert needs.bytes(keep) / GIB == pytest.approx(measured, rel=0.065)


def test_each_choice_takes_less_than_the_faster_one() -> None:
    for needs in (LLAMA_8B, LORA_8B, replace(LLAMA_8B, compiled=False), replace(LORA_8B, compiled=False)):
        sizes = [needs.bytes(keep) for keep in FASTEST_FIRST]
        assert sizes == sorted(sizes, reverse=True)
        assert len(set(sizes)) == len(sizes)
    assert [slower(keep) for keep in FASTEST_FIRST] == [*FASTEST_FIRST[1:], None]
