"""Which versions of DeepSpeed are taken: those that scale gradients as this code expects."""

from __future__ import annotations

import pytest

from cadapter.errors import CadapterError
from cadapter.training import engine
from cadapter.training.engine import check_deepspeed


@pytest.mark.parametrize("version", ["0.15.4", "0.16.0", "0.18.2", "0.18.9", "0.19.2", "0.19.2+cu130"])
def test_versions_that_scale_gradients_otherwise_are_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(engine.deepspeed, "__version__", version)
    with pytest.raises(CadapterError, match=rf"DeepSpeed {version.replace('+', '.')} scales gradients wrongly"):
        check_deepspeed()


@pytest.mark.parametrize(
    ("version", "remark"), [("0.19.3", ""), ("0.19.10", ""), ("0.19.8+abc1234", ""), ("0.20.0", "was not tried")]
)
def test_others_are_taken_and_newer_ones_said(monkeypatch: pytest.MonkeyPatch, version: str, remark: str) -> None:
    monkeypatch.setattr(engine.deepspeed, "__version__", version)
    said = check_deepspeed()
    assert remark in said
    assert bool(remark) == bool(said)


def test_the_installed_one_is_taken() -> None:
    assert check_deepspeed() == ""
