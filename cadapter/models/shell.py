"""A causal LM's own forward pass with its parts taken out, run to learn what it does around them.

Cutting a model into pipeline stages is right only if its forward pass is: embed, call each block on what the block
before gave, norm, head. What blocks are called with (masks, positions, rotary embeddings, by layer) and what happens
to embeddings and logits differs between families. Both are read off here, from the model's own code, without any
weight: blocks are replaced by recorders, so a family that does anything else is found out before it is loaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cadapter.errors import UsageError
from cadapter.models.families import ATTENTION, FUSED, MLP, PER_EXPERT, Family, LogitFacts, logit_facts

PARTS = ("embed_tokens", "layers", "norm")
"""What the inner model of a causal LM must have; besides it there is ``lm_head``."""

UNFIT = {"phimoe": "its routers choose experts at random in training"}
"""Types that are built like the others and cannot be trained like them, with the reason."""

PROBE_LENGTH, PROBE_WIDTH = 6, 5


class _Call(NamedTuple):
    """What a block, the ``number``-th, was called with."""

    number: int
    hidden: Tensor
    arguments: dict[str, Any]


class _Recorder(nn.Module):
    """Stands in for a block: notes what it is called with, and gives back another hidden state than it got."""

    def __init__(self, original: nn.Module, number: int, calls: list[_Call]) -> None:
        super().__init__()
        self._original = [original]  # in a list: not a submodule
        self._number = number
        self._calls = calls

    def __getattr__(self, name: str) -> Any:
        """Give what models read from their blocks, such as ``attention_type``."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_original":
                raise
            return getattr(self._original[0], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args:
            raise UsageError("it calls its blocks with more than hidden states by position")
        self._calls.append(_Call(self._number, hidden, kwargs))
        return hidden + 1


class _AddTwo(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + 2


class _Constant(nn.Module):
    """Gives the same whatever it is called with."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self._value = value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._value


@contextlib.contextmanager
def _replaced(module: nn.Module, **parts: nn.Module) -> Iterator[None]:
    """Have other submodules for the length of a block."""
    before = {name: getattr(module, name) for name in parts}
    try:
        for name, part in parts.items():
            setattr(module, name, part)
        yield
    finally:
        for name, part in before.items():
            setattr(module, name, part)


def inner_model(skeleton: Any) -> Any:
    """The model without its head: what holds the embedding, the blocks and the final norm.

    Raises:
        UsageError: the model is not built of these parts; the reason is the text.
    """
    if skeleton.config.model_type in UNFIT:
        raise UsageError(UNFIT[skeleton.config.model_type])
    inner: Any = getattr(skeleton, "model", None)
    missing = [name for name in PARTS if not isinstance(getattr(inner, name, None), nn.Module)]
    if inner is None or skeleton.base_model_prefix != "model":
        missing = ["model"]
    if missing or not isinstance(getattr(skeleton, "lm_head", None), nn.Linear):
        raise UsageError(f"it has no {' and no '.join(missing or ['linear lm_head'])}")
    if skeleton.lm_head.bias is not None:
        raise UsageError("its lm_head has a bias")
    for index, block in enumerate(inner.layers):
        absent = [name for name in (ATTENTION, MLP) if not isinstance(getattr(block, name, None), nn.Module)]
        if absent:
            raise UsageError(f"its block {index} has no {' and no '.join(absent)}")
    return inner


@torch.no_grad()
def record_calls(skeleton: Any, embeddings: Tensor, token: int = 0) -> tuple[Tensor, list[dict[str, Any]]]:
    """Run the inner model with recorders for blocks, and a table of embeddings that gives ``embeddings`` [1, T, H].

    Args:
        token: what the model is told that all tokens are.

    Returns:
        What the first block received, and the keyword arguments of each block.

    Raises:
        UsageError: the pass is not a chain of blocks and a norm; the reason is the text.
    """
    calls, output = _run_recorded(skeleton, embeddings, token)
    if [call.number for call in calls] != list(range(len(inner_model(skeleton).layers))):
        raise UsageError("it does not call each of its blocks once, in their order")
    # Each recorder added 1 and the norm 2: whatever else happens to hidden states on the way would show.
    first = expected = calls[0].hidden
    for call in calls:
        if not torch.equal(call.hidden, expected):
            raise UsageError("it changes hidden states between its blocks")
        expected = expected + 1
    if not torch.equal(output, expected + 2):
        raise UsageError("it changes hidden states after its blocks")
    return first, [call.arguments for call in calls]


def _run_recorded(
    skeleton: Any, embeddings: Tensor, token: int, use_cache: bool = False, **further: Any
) -> tuple[list[_Call], Tensor]:
    inner = inner_model(skeleton)
    calls: list[_Call] = []
    recorders = nn.ModuleList(_Recorder(block, number, calls) for number, block in enumerate(inner.layers))
    ids = torch.full(embeddings.shape[:2], token, device=embeddings.device)
    with _replaced(inner, embed_tokens=_Constant(embeddings), layers=recorders, norm=_AddTwo()):
        return calls, inner(input_ids=ids, use_cache=use_cache, **further).last_hidden_state


@torch.no_grad()
def arguments_at(skeleton: Any, embeddings: Tensor, positions: Tensor) -> list[dict[str, Any]]:
    """The keyword arguments of each block for embeddings [B, T, H] at ``positions`` [B, T].

    Positions that begin again begin a document that sees none before it: transformers' mask functions heed that where
    there is no key-value cache and no other mask. That the pass is a chain of blocks is not checked again.
    """
    return [call.arguments for call in _run_recorded(skeleton, embeddings, 0, position_ids=positions)[0]]


@torch.no_grad()
def arguments_after(skeleton: Any, embeddings: Tensor, cache: Any) -> list[dict[str, Any]]:
    """The keyword arguments of each block for embeddings [1, T, H] of what follows the tokens in ``cache``."""
    calls, _ = _run_recorded(skeleton, embeddings, 0, use_cache=True, past_key_values=cache)
    return [call.arguments for call in calls]


@torch.no_grad()
def logits_of_values(skeleton: Any, values: Tensor) -> Tensor:
    """What the model makes of products of hidden states and head weight: ``values`` [1, T, n] → [1, T, n]."""
    from transformers.modeling_outputs import MoeModelOutputWithPast

    ids = torch.zeros(values.shape[:2], dtype=torch.int64, device=values.device)
    output = MoeModelOutputWithPast(last_hidden_state=values)
    with _replaced(skeleton, model=_Constant(output), lm_head=nn.Identity()):
        return skeleton(input_ids=ids, use_cache=False).logits


def probe_values() -> Tensor:
    """Numbers as large as logits get, [1, T, n]."""
    return torch.linspace(-80, 80, PROBE_LENGTH * PROBE_WIDTH).view(1, PROBE_LENGTH, PROBE_WIDTH)


def check_cut(skeleton: Any, embedding_scale: float, logits: LogitFacts) -> None:
    """Make sure that embedding, blocks, norm and head called one after the other are this model.

    Raises:
        UsageError: they are not; the reason is the text.
    """
    config = skeleton.config
    generator = torch.Generator().manual_seed(0)
    seen = []
    for token in range(2):
        embeddings = torch.randn(1, PROBE_LENGTH, config.hidden_size, generator=generator)
        first, arguments = record_calls(skeleton, embeddings, token)
        if not torch.equal(first, embeddings * embedding_scale):
            raise UsageError("it changes its token embeddings in a way that is not known")
        seen.append(arguments)
    if not all(_same_entries(*arguments) for arguments in zip(*seen, strict=True)):
        raise UsageError("it hands its blocks more than hidden states, masks and positions")
    values = probe_values()
    if not torch.allclose(logits_of_values(skeleton, values), logits.apply(values), rtol=1e-6, atol=1e-6):
        raise UsageError("it changes its logits in a way that is not known")


def _same_entries(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)


def _same(first: Any, second: Any) -> bool:
    """Whether two values, looked into as deep as they go, hold the same numbers.

    An empty list or dict is never the same: there blocks leave values for those after them.
    """
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.equal(first, second)
    if isinstance(first, (list, dict)) and not first:
        return False
    if isinstance(first, dict):
        return isinstance(second, dict) and _same_entries(first, second)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(_same(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second)


WRITER_NAMES = ("o_proj", "out_proj", "dense", "wo", "down_proj", "w2", "fc2", "c_proj", "dense_4h_to_h")
"""Names that the last linear layer of an attention or MLP module goes by."""


def inferred_family(skeleton: Any) -> Family:
    """Facts of a family that is in no table, read from its structure.

    What a block adds is then taken as its output minus its input. Conversions know the writers that are named here.
    """
    scaled = _multiplies_embeddings(skeleton)
    hidden = skeleton.config.hidden_size
    writers: dict[str, dict[str, None]] = {ATTENTION: {}, MLP: {}}
    for block in inner_model(skeleton).layers:
        for name, module in block.named_modules():
            part, _, rest = name.partition(".")
            is_writer = isinstance(module, nn.Linear) and module.out_features == hidden
            if part in writers and is_writer and rest.rpartition(".")[2] in WRITER_NAMES:
                writers[part][name] = None
    plain = Family(
        attention_writers=tuple(writers[ATTENTION]),
        mlp_writers=(*writers[MLP], PER_EXPERT, FUSED),
        added=None,
        embedding_scale="embedding_multiplier" if scaled else None,
        inferred=True,
    )
    # Keys that mean the same wherever a model heeds them; some configs have them and their models do not.
    changed = replace(
        plain, logit_scale="logit_scale", logit_divisor="logits_scaling", logit_softcap="final_logit_softcapping"
    )
    return changed if _fits_logits(skeleton, changed) else plain


def _fits_logits(skeleton: Any, family: Family) -> bool:
    values = probe_values()
    expected = logit_facts(family, skeleton.config).apply(values)
    return torch.allclose(logits_of_values(skeleton, values), expected, rtol=1e-6, atol=1e-6)


def _multiplies_embeddings(skeleton: Any) -> bool:
    ones = torch.ones(1, PROBE_LENGTH, skeleton.config.hidden_size)
    first, _ = record_calls(skeleton, ones)
    return not torch.equal(first, ones)
