"""Blocks compiled and not, and keeping more or less for the backward pass: the same numbers, in fewer bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, LlamaConfig

from cadapter.adapters.control import ControlledBlock, ControlSettings, GeneralAdapter
from cadapter.adapters.lora import LoraBlock, LoraSettings
from cadapter.adapters.lora_targets import match_targets
from cadapter.errors import CadapterError
from cadapter.models import execution
from cadapter.models.execution import SHARES, BlockRunner, Compiled
from cadapter.models.families import FAMILIES
from cadapter.models.layers import run_block
from cadapter.models.quantise import quantise_block_

HIDDEN, TOKENS, LAYERS = 64, 32, 4
KINDS = ("control", "writes", "lora", "4-bit")


@pytest.fixture(autouse=True)
def without_a_code_generator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs are made, split into forward and backward and counted as ever; what runs them here is PyTorch itself."""
    torch._dynamo.reset()
    counters.clear()
    compile_as_ever = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda function, **kwargs: compile_as_ever(function, backend="aot_eager_decomp_partition", **kwargs),
    )
    yield
    torch._dynamo.reset()


class Case:
    """Blocks of one kind and what they are called with; dropout and the neutral loss are on."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=HIDDEN, intermediate_size=192, num_hidden_layers=LAYERS, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=64,
        )  # fmt: skip
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).requires_grad_(False)
        self.blocks: list[Any] = []
        for layer, block in enumerate(model.model.layers):
            if kind == "4-bit":
                quantise_block_(block)
            self.blocks.append(self._adapted(block, layer, kind))
        self.factors = [p for block in self.blocks for p in block.parameters() if p.requires_grad]
        for factor in self.factors:
            nn.init.normal_(factor, std=0.1)
        positions = torch.arange(TOKENS)[None]
        self.hidden = torch.randn(1, TOKENS, HIDDEN)
        self.arguments = {
            "attention_mask": None,
            "position_ids": positions,
            "position_embeddings": model.model.rotary_emb(self.hidden, positions),
        }
        self.codes = torch.tensor([1, -1, 0, 2] * (TOKENS // 4), dtype=torch.int8)[None]

    @staticmethod
    def _adapted(block: nn.Module, layer: int, kind: str) -> nn.Module:
        if kind == "lora":
            return LoraBlock(block, layer, match_targets(block, None), LoraSettings(4, 2.0, dropout=0.1), seed=0)
        settings = ControlSettings(4, 2.0, "writes" if kind == "writes" else "block", dropout=0.1)
        return ControlledBlock(block, GeneralAdapter(HIDDEN, layer, settings, seed=0), FAMILIES["llama"])

    def run(self, runner: BlockRunner, keep: str) -> list[Tensor]:
        """Output of all blocks, penalty, and the gradients of all factors."""
        hidden, total = self.hidden, torch.zeros(())
        for block in self.blocks:
            transforms = block.adapter.class_transforms() if isinstance(block, ControlledBlock) else []
            rows = torch.tensor([1234567])
            hidden, penalty = runner(keep, block, hidden, self.codes, transforms, rows, True, self.arguments)
            total = total if penalty is None else total + penalty
        loss = (hidden * torch.linspace(-1, 1, HIDDEN)).sum() + total
        return [hidden.detach(), total.detach(), *torch.autograd.grad(loss, self.factors)]


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_blocks_give_the_same_and_one_graph_serves_all_layers(kind):
    case = Case(kind)
    expected = case.run(BlockRunner(run_block), "none")
    assert all(gradient.norm() > 0 for gradient in expected[2:])
    runner = BlockRunner(run_block, compiled=True, required=True)
    for keep in SHARES:
        # float32, the same sums in another order, through four blocks
        assert_close(case.run(runner, keep), expected, 1e-5)
    # For each share that is kept: one for the first block, whose input needs no gradient, and one for the others.
    assert counters["stats"]["unique_graphs"] == 2 * len(set(SHARES.values()))
    assert not counters["graph_break"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_changes_nothing_bit_for_bit_where_blocks_run_as_they_are(kind):
    case, runner = Case(kind), BlockRunner(run_block)
    expected = case.run(runner, "none")
    for keep in ("selective", "full", "offload"):
        for one, other in zip(case.run(runner, keep), expected, strict=True):
            assert torch.equal(one, other)


def kept_bytes(case: Case, runner: BlockRunner, keep: str) -> int:
    """What autograd keeps of a block's own results."""
    own = {p.untyped_storage().data_ptr() for p in case.blocks[1].parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    hidden = case.hidden.clone().requires_grad_()
    block = case.blocks[1]
    transforms = [(code, None if T is None else T.detach()) for code, T in block.adapter.class_transforms()]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output, _ = runner(keep, block, hidden, case.codes, transforms, None, False, case.arguments)
    output.sum().backward()
    return sum(found.values())


def test_a_compiled_block_keeps_what_it_is_told():
    case, runner = Case("control"), BlockRunner(run_block, compiled=True, required=True)
    everything, some, start = (kept_bytes(case, runner, keep) for keep in ("none", "selective", "full"))
    stream = case.hidden.nbytes
    assert stream <= start < 2 * stream  # the block's input, rotary embeddings, codes
    assert start < some < 0.7 * everything


def test_narrow_products_and_attention_are_what_a_selective_block_does_not_repeat():
    """Counted: products in the backward pass of a block that runs as it is."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = str(func)
            if name.startswith("aten.mm") and args[0].shape[0] == TOKENS and args[1].shape[0] == HIDDEN:
                seen.append(args[1].shape[1])
            if "scaled_dot_product" in name and "backward" not in name:
                seen.append(-1)
            return func(*args, **(kwargs or {}))

    case, repeated = Case("lora"), {}
    for keep in ("selective", "full"):
        hidden = case.hidden.clone().requires_grad_()
        output, _ = BlockRunner(run_block)(keep, case.blocks[0], hidden, case.codes, [], None, False, case.arguments)
        seen: list[int] = []
        with Products():
            output.sum().backward()
        repeated[keep] = seen
    wide = 192
    # Gate and up once more, and the gradient of what down reads.
    assert repeated["selective"].count(wide) == repeated["full"].count(wide) == 3
    assert repeated["full"].count(-1) == 1
    assert repeated["selective"].count(-1) == 0
    assert len(repeated["selective"]) < len(repeated["full"])


def untraceable(tensor: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return 2 * tensor


def test_what_cannot_be_compiled_runs_as_it_is_and_that_is_said_once(capsys):
    function = Compiled(untraceable, "the test", required=False)
    for _ in range(2):
        assert torch.equal(function(torch.ones(2)), 2 * torch.ones(2))
    assert capsys.readouterr().err.count("the test cannot be compiled") == 1
    with pytest.raises(CadapterError, match=r"the test cannot be compiled: .*\n.*compile = false"):
        Compiled(untraceable, "the test", required=True)(torch.ones(2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="host copies are of what lies on a GPU")
def test_streams_that_are_kept_on_the_host_come_back():
    copies, tensors = execution.HostCopies(torch.device("cuda")), [torch.rand(1, 64, 64) for _ in range(5)]
    total = torch.zeros((), device="cuda")
    weight = torch.ones(64, device="cuda", requires_grad=True)
    for tensor in tensors:
        hidden = tensor.cuda()
        with copies.instead_of(hidden):
            total = total + (hidden * weight).sum()
    total.backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad.cpu(), sum(tensor.sum(dim=(0, 1)) for tensor in tensors))
