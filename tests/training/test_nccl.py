"""What NCCL is told, by the names of the cards."""

from __future__ import annotations

import pytest

from cadapter.training.nccl import nccl_settings

BOTH = {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}


@pytest.mark.parametrize(
    ("gpus", "environ", "expected"),
    [
        (["NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4090"], {}, BOTH),
        (["NVIDIA GeForce RTX 3090", "NVIDIA GeForce RTX 4060 Ti"], {}, BOTH),
        (["NVIDIA GeForce RTX 4090"], {"NCCL_P2P_DISABLE": "0"}, {"NCCL_IB_DISABLE": "1"}),
        (["NVIDIA GeForce RTX 4090"], {"NCCL_P2P_DISABLE": "0", "NCCL_IB_DISABLE": ""}, {}),
        (["NVIDIA GeForce RTX 3090", "NVIDIA GeForce RTX 5090", "NVIDIA H200", "NVIDIA A40"], {}, {}),
        ([], {}, {}),
    ],
)
def test_peer_to_peer_is_switched_off_where_there_is_none(gpus, environ, expected) -> None:
    assert nccl_settings(gpus, environ) == expected
