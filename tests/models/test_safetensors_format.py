"""Headers as the safetensors library writes and reads them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cadapter.models.safetensors_format import DTYPES, FLOATS, NAMES, Described, encoded_header, header_of

TENSORS = {f"ä {name}": torch.arange(6).reshape(2, 3).to(dtype) for name, dtype in DTYPES.items()}


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_the_library_reads_every_dtype_behind_our_header(tmp_path: Path) -> None:
    described = [Described(n, NAMES[t.dtype], tuple(t.shape), t.nbytes) for n, t in TENSORS.items()]
    beginning, places = encoded_header(described, {"format": "pt"})
    file = tmp_path / "ours.safetensors"
    file.write_bytes(beginning + b"".join(map(raw, TENSORS.values())))
    assert places[0] % 8 == 0
    assert places[-1] == file.stat().st_size
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        for name, tensor in TENSORS.items():
            found = opened.get_tensor(name)
            assert (found.dtype, raw(found)) == (tensor.dtype, raw(tensor))
    for place, tensor in zip(places, TENSORS.values(), strict=False):
        assert file.read_bytes()[place : place + tensor.nbytes] == raw(tensor)


def test_our_reading_finds_every_dtype_that_the_library_writes(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    header, start = header_of(tmp_path / "theirs.safetensors")
    assert header.pop("__metadata__") == {"format": "pt"}
    content = (tmp_path / "theirs.safetensors").read_bytes()
    assert header.keys() == TENSORS.keys()
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        assert DTYPES[entry["dtype"]] == TENSORS[name].dtype
        assert content[start + first : start + last] == raw(TENSORS[name])
    assert all(DTYPES[name].is_floating_point for name in FLOATS)
