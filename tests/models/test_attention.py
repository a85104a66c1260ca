"""Which attention kernel is preferred: the fastest that was seen, and never one that cannot do it."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig

from cadapter.models.attention import BLOCK_MASKS, KERNELS, KernelTimes, time_kernels

CONFIG = LlamaConfig(hidden_size=256, num_attention_heads=4, num_key_value_heads=2)


def test_there_is_nothing_to_choose_on_the_cpu():
    assert time_kernels(CONFIG, 1, 64, torch.float32, torch.device("cpu")) is None


def test_the_user_is_told_what_was_found():
    times = KernelTimes({"cuDNN": 1.132, "flash": 1.94})
    assert times.in_words() == "attention: cuDNN 1.13 ms a layer (flash 1.94 ms)."
    assert KernelTimes({"flash": 2.0}).in_words() == "attention: flash 2.00 ms a layer."


def test_what_no_kernel_can_do_is_done_without_them():
    """On the CPU none of them is there; the order must not keep PyTorch from computing."""
    query = torch.randn(1, 4, 8, 16)
    expected = scaled_dot_product_attention(query, query, query, is_causal=True)
    with KernelTimes({"cuDNN": 1.0}).preferred():
        assert torch.equal(scaled_dot_product_attention(query, query, query, is_causal=True), expected)


def test_the_fastest_may_be_one_that_pytorch_does_not_choose_from():
    times = KernelTimes({BLOCK_MASKS: 0.96, "cuDNN": 3.18})
    assert times.fastest == BLOCK_MASKS
    with times.preferred():
        query = torch.randn(1, 4, 8, 16)
        assert scaled_dot_product_attention(query, query, query).shape == query.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels are of GPUs")
def test_kernels_are_timed_where_there_are_any():
    times = time_kernels(CONFIG, 1, 256, torch.bfloat16, torch.device("cuda"))
    assert times is not None
    assert times.milliseconds.keys() <= KERNELS.keys()
    assert list(times.milliseconds.values()) == sorted(times.milliseconds.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels are of GPUs")
def test_isolated_documents_are_timed_with_masks():
    times = time_kernels(CONFIG, 1, 2048, torch.bfloat16, torch.device("cuda"), isolated=True, block_masks=True)
    assert times is not None
    assert BLOCK_MASKS in times.milliseconds
    assert "flash" not in times.milliseconds  # takes no mask
