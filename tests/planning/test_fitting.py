"""What is proposed where a run does not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cadapter.planning.fitting import Remedy, Settings, Situation, changes, remedies

NOW = Situation(
    kind="control", checkpointing="none", four_bit=False, rows=4, accumulation=2, stages=1, replicas=1, tokens=1024,
    wide_gradients=True, layers=8, chosen=range(8),
)  # fmt: skip
BYTES = {"activation_checkpointing": 30, "micro_batch_size": 20, "load_in_4bit": 25, "sequence_len": 10}


def attempt(settings: Settings, room: float) -> Remedy:
    """100 bytes, less what each setting brings; stages cannot be had."""
    if "pipeline_stages" in settings:
        return Remedy(settings, None, False, "no more GPUs")
    memory = 100 - sum(BYTES.get(key, 1) for key in settings)
    return Remedy(settings, memory, memory <= room, "")


def keys_of(now: Situation) -> list[str]:
    return [next(iter(settings)) for settings in changes(now)]


def test_changes_are_of_the_settings_that_a_run_has() -> None:
    assert keys_of(NOW) == [
        *["activation_checkpointing"] * 3, *["micro_batch_size"] * 2, "load_in_4bit", *["pipeline_stages"] * 3,
        "layers_to_transform", "sequence_len",
    ]  # fmt: skip
    assert "load_in_4bit" not in keys_of(replace(NOW, four_bit=True))
    full = keys_of(replace(NOW, kind="full"))
    assert "load_in_4bit" not in full
    assert "gradient_dtype" in full
    assert "gradient_dtype" not in keys_of(replace(NOW, kind="full", wide_gradients=False))
    assert "activation_checkpointing" not in keys_of(replace(NOW, checkpointing="auto"))
    assert "activation_checkpointing" not in keys_of(replace(NOW, checkpointing="offload"))
    assert "sequence_len" not in keys_of(replace(NOW, tokens=64))
    assert "micro_batch_size" not in keys_of(replace(NOW, rows=1))


@pytest.mark.parametrize(("tokens", "shorter"), [(1024, 512), (192, 64), (128, 64), (64, None)])
def test_sequences_become_shorter_multiples_of_64(tokens: int, shorter: int | None) -> None:
    found = [each["sequence_len"] for each in changes(replace(NOW, tokens=tokens)) if "sequence_len" in each]
    assert found == ([] if shorter is None else [shorter])


def test_smaller_micro_batches_keep_the_batch() -> None:
    for settings in changes(NOW):
        if "micro_batch_size" in settings:
            assert settings["micro_batch_size"] * settings["gradient_accumulation_steps"] == 8


def test_stages_that_take_the_place_of_replicas_keep_the_batch() -> None:
    found = [each for each in changes(replace(NOW, replicas=4)) if "pipeline_stages" in each]
    assert found == [
        {"pipeline_stages": 2, "gradient_accumulation_steps": 4},
        {"pipeline_stages": 4, "gradient_accumulation_steps": 8},
        {"pipeline_stages": 8},
    ]


def test_smaller_micro_batches_and_more_stages_together_keep_the_batch() -> None:
    def only_both(settings: Settings) -> Remedy:
        memory = 100 - 10 * len(settings)
        return Remedy(settings, memory, settings.keys() >= {"micro_batch_size", "pipeline_stages"}, "")

    _, found = remedies(replace(NOW, checkpointing="offload", rows=2, replicas=2, four_bit=True), only_both)
    assert found is not None
    assert found.settings == {"micro_batch_size": 1, "pipeline_stages": 2, "gradient_accumulation_steps": 8}


def test_layers_are_the_upper_half_of_those_that_are_chosen() -> None:
    assert {"layers_to_transform": "4:7"} in changes(NOW)
    assert {"layers_to_transform": "3,6:7"} in changes(replace(NOW, chosen=[0, 1, 2, 3, 6, 7]))


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        (70, {"activation_checkpointing": "selective"}),
        (60, {"activation_checkpointing": "selective", "micro_batch_size": 2, "gradient_accumulation_steps": 4}),
        (
            25,
            {
                "activation_checkpointing": "selective",
                "micro_batch_size": 2,
                "gradient_accumulation_steps": 4,
                "load_in_4bit": True,
            },
        ),
        (5, None),
    ],
)
def test_one_change_where_one_is_enough_then_more_in_their_order(room: float, expected: Settings | None) -> None:
    alone, found = remedies(NOW, lambda settings: attempt(settings, room))
    assert [each.settings for each in alone] == changes(NOW)
    assert (None if found is None else found.settings) == expected
    assert found is None or found.fits
