"""Dequantising in one pass: the bits that bitsandbytes gives.

Without a GPU, Triton's interpreter runs the kernel where Triton is installed and TRITON_INTERPRET=1 is set.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

from cadapter.models import four_bit
from cadapter.models.four_bit import BLOCK_SIZE, SCALE_GROUP, by_bitsandbytes, constants_of, dequantiser, in_one_pass

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
SHAPES = [(64, 64), (65, 4160), (1, 128), (7, 192), (256, 1024)]
DTYPES = [torch.float32, torch.float16]
if ON_GPU:
    DTYPES += [torch.bfloat16]  # to which the interpreter does not round
    SHAPES += [(33, 65), (4096, 14336)]  # rows that fill no block, which bitsandbytes reads wrongly on the CPU


needs_triton = pytest.mark.skipif(
    find_spec("triton") is None or not (ON_GPU or os.environ.get("TRITON_INTERPRET") == "1"),
    reason="needs Triton, and a GPU or TRITON_INTERPRET=1",
)


def quantised(shape, double):
    import bitsandbytes

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    weight[0, : min(BLOCK_SIZE, shape[1])] = 0
    packed, state = bitsandbytes.functional.quantize_4bit(
        weight, blocksize=BLOCK_SIZE, compress_statistics=double, quant_type="nf4"
    )
    return weight, packed, state


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_pass_gives_the_bits_of_bitsandbytes(shape, double, dtype):
    import bitsandbytes

    weight, packed, state = quantised(shape, double)
    state.dtype = dtype
    expected = bitsandbytes.functional.dequantize_4bit(packed, state)
    found = in_one_pass(packed, constants_of(state), shape, dtype)
    assert torch.equal(found, expected)
    assert torch.equal(by_bitsandbytes(packed, constants_of(state), shape, dtype), expected)
    assert 0.05 < (found.float() - weight).norm() / weight.norm() < 0.2  # nf4 loses some 9 %


@needs_triton
def test_numbers_beyond_the_last_are_not_written():
    """The last program's bytes are not all there, and an odd number has half a byte."""
    _, packed, state = quantised((1, 2 * 1024 + 65), False)
    count = 2 * 1024 + 1
    found = in_one_pass(packed, constants_of(state), (1, count), torch.float32)
    assert found.shape == (1, count)
    assert torch.equal(found[0, -1], by_bitsandbytes(packed, constants_of(state), (1, count), torch.float32)[0, -1])


def test_bitsandbytes_dequantises_where_there_is_no_gpu():
    assert dequantiser(torch.device("cpu"), torch.bfloat16, True) is by_bitsandbytes


@pytest.mark.skipif(not ON_GPU, reason="the kernel is for GPUs")
@pytest.mark.parametrize("double", [False, True])
def test_the_kernel_is_taken_on_a_gpu(double):
    assert dequantiser(torch.device("cuda", 0), torch.bfloat16, double) is in_one_pass


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """A device that is taken for a GPU with Triton, whose trials run where tensors are."""
    trial = four_bit._trial
    monkeypatch.setattr(four_bit, "find_spec", lambda name: name)
    monkeypatch.setattr(four_bit, "_trial", lambda device, double: trial(DEVICE, double))
    dequantiser.cache_clear()
    yield torch.device("cuda", 99)
    dequantiser.cache_clear()


def test_a_kernel_that_gives_other_bits_is_not_taken(as_on_a_gpu, monkeypatch, capsys):
    def wrong(packed, constants, shape, dtype):
        weight = by_bitsandbytes(packed, constants, shape, dtype)
        weight[-1, -1] += 0.01
        return weight

    monkeypatch.setattr(four_bit, "in_one_pass", wrong)
    assert dequantiser(as_on_a_gpu, torch.float32, True) is by_bitsandbytes
    assert "does not give what bitsandbytes gives" in capsys.readouterr().err
    # The same comparison lets a right one pass.
    monkeypatch.setattr(four_bit, "in_one_pass", by_bitsandbytes)
    dequantiser.cache_clear()
    assert dequantiser(as_on_a_gpu, torch.float32, True) is by_bitsandbytes
    assert capsys.readouterr().err == ""


def test_a_kernel_that_cannot_run_is_not_taken(as_on_a_gpu, monkeypatch, capsys):
    def broken(*_args):
        raise RuntimeError("no compiler found\nmore")

    monkeypatch.setattr(four_bit, "in_one_pass", broken)
    assert dequantiser(as_on_a_gpu, torch.bfloat16, True) is by_bitsandbytes
    assert "no compiler found" in capsys.readouterr().err


def test_the_trial_has_what_can_go_wrong():
    packed, constants, shape = four_bit._trial(torch.device("cpu"), True)
    scales, values, largest, table, mean = constants
    assert packed.numel() * 2 == shape[0] * shape[1]
    assert len(values) == 16
    assert len(table) == 256
    assert mean.numel() == 1
    assert len(largest) > 4
    assert len(scales) % SCALE_GROUP
    assert by_bitsandbytes(packed, constants, shape, torch.float32)[0, :BLOCK_SIZE].abs().max() < 0.01
