"""What a decoder block keeps of each token for its backward pass, from the sizes of its parts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from cadapter.models.execution import SHARES
from cadapter.models.families import ATTENTION, MLP

FLOAT32 = 4
"""Bytes of what is float32 whatever the model's dtype: what norms read, softmax, routers' scores."""


@dataclass(frozen=True)
class BlockShape:
    """Components for each token of what a decoder block computes.

    Attributes:
        hidden: H, of the residual stream.
        queries, keys: of all queries, and of all keys (of the values there are as many).
        heads: query heads.
        norms: of what norms keep in float32, all of them together.
        inner: between the two products of an MLP, over all experts that a token goes to.
        wide: of what the first product of an MLP gives: twice ``inner`` where there is a gate.
        experts: experts that a token goes to; 0: a plain MLP.
        window: tokens that a position sees, itself included; None: all before it.
        masked: attention is given a mask [T, T] whatever the window, since documents are isolated by one.
        scores: attention makes its [T, T] scores, rather than a kernel that does not.
        capped: and caps them.
        weights: numbers in the weights of products that a token goes through.
    """

    hidden: int
    queries: int
    keys: int
    heads: int
    norms: int
    inner: int
    wide: int
    weights: int
    experts: int = 0
    window: int | None = None
    masked: bool = False
    scores: bool = False
    capped: bool = False

    def has_mask(self, tokens: int) -> bool:
        """Whether attention in sequences of so many tokens needs a mask [T, T]."""
        return self.masked or self.scores or (self.window is not None and self.window < tokens)


@dataclass(frozen=True)
class Change:
    """What is trained in or around a block, as far as it decides what is kept; the default: nothing.

    Attributes:
        numbers: trained ones.
        after: acts on what the block adds, or on what its MLP writes, and on nothing before.
        deltas: components of the Δh that Control Adapters read, over all places where they act.
        inputs: components of what trained products read, each counted once, without attention's own output.
        narrow: components of what lies between two factors.
        masked: components of what dropout acts on.
        norms: the weights of norms are trained.
    """

    numbers: int = 0
    after: bool = False
    deltas: int = 0
    inputs: int = 0
    narrow: int = 0
    masked: int = 0
    norms: bool = False


@dataclass(frozen=True)
class Block:
    """A decoder block and what is trained in it."""

    shape: BlockShape
    change: Change = Change()

    def kept(self, keep: str, number_bytes: int, tokens: int, compiled: bool, reached: bool = True) -> float:
        """Bytes that are kept of each token.

        Args:
            keep: one of :data:`cadapter.models.execution.SHARES`.
            number_bytes: of one number of the hidden states.
            tokens: T, of a sequence.
            compiled: whether the block is compiled.
            reached: whether the gradient goes on to what the block starts from.
        """
        if not reached and not self.change.numbers:
            return 0.0  # no gradient comes here
        if keep == "offload":
            return 0.0
        start = float(number_bytes * self.shape.hidden)
        if keep == "full":
            return start
        if not reached and self.change.after:  # the block itself needs no gradient
            return self._for_change(number_bytes)
        if keep == "selective" and not compiled:
            return self._narrow_products(number_bytes)
        everything = (self._compiled if compiled else self._plain)(number_bytes, tokens)
        return start + SHARES[keep] * (everything - start)

    def _for_change(self, n: int) -> float:
        """What is trained needs its inputs; dropout its float32 mask."""
        change = self.change
        return n * (change.deltas + change.inputs) + (FLOAT32 + n) * change.narrow + FLOAT32 * change.masked

    def _attention(self, n: int, tokens: int) -> float:
        """Queries, keys, values, and the kernel's output with a number for each head; or the scores."""
        shape = self.shape
        if shape.scores:
            copies = (n if shape.capped else 0) + FLOAT32 + (n if n < FLOAT32 else 0)
            return n * 3 * shape.queries + copies * shape.heads * tokens
        if shape.has_mask(tokens):  # kept with it: keys and values of every head
            return n * (4 * shape.queries + tokens) + FLOAT32 * shape.heads
        return n * (2 * shape.queries + 2 * shape.keys) + FLOAT32 * shape.heads

    def _plain(self, n: int, tokens: int) -> float:
        """A block that runs as it is keeps what each of its operations needs."""
        shape = self.shape
        kept = FLOAT32 * shape.norms + self._attention(n, tokens) + n * (shape.inner + shape.wide)
        if shape.experts:  # what experts give is weighed; who goes where is int64
            kept += n * shape.experts * shape.hidden + 8 * 4 * shape.experts
        if self.change.norms:
            kept += n * shape.norms
        return kept + self._for_change(n)

    def _compiled(self, n: int, tokens: int) -> float:
        """A compiled block keeps what it starts from and what products and attention give; the rest is cheap."""
        shape = self.shape
        change = self.change
        # What the MLP gives is only added to the stream; of experts, each one's is weighed first.
        given = shape.hidden * (1 + shape.experts) + change.deltas
        kept = n * (shape.hidden + given + shape.wide) + self._attention(n, tokens)
        return kept + n * (change.inputs + change.narrow) + FLOAT32 * change.masked

    def _narrow_products(self, n: int) -> float:
        """With PyTorch's own checkpointing: the start, products no wider than the stream, attention's output."""
        shape = self.shape
        products = (shape.queries, shape.keys, shape.keys, shape.hidden, shape.hidden)
        kept = sum(width for width in products if width <= shape.hidden)
        return n * (shape.hidden + kept + shape.queries + 2 * self.change.narrow) + FLOAT32 * shape.heads

    def backward(self, number_bytes: int, tokens: int, compiled: bool) -> float:
        """Bytes for each token of gradients that are there at once while the block is computed backwards.

        Four tensors of the stream's width and four of the MLP's; half as many again where products are trained.
        """
        shape = self.shape
        each = 4 * number_bytes * (shape.hidden + shape.inner)
        scores = 2 * FLOAT32 * shape.heads * tokens if shape.scores else 0
        return each * (1.5 if self.change.inputs else 1) + scores


def block_shape(block: nn.Module, config: Any) -> BlockShape:
    """Read the sizes of a decoder block, before anything is put in it; the meta device is enough."""
    hidden = config.hidden_size
    attention, mlp = (block.get_submodule(name) for name in (ATTENTION, MLP))
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or hidden // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    chosen = getattr(config, "num_experts_per_tok", None) or 1
    routed = [each for each in mlp.parameters() if each.ndim == 3]
    dense = [each for each in mlp.modules() if isinstance(each, nn.Linear) and min(each.weight.shape) > 1]
    dense = [each for each in dense if hidden in each.weight.shape]
    dense = [each for each in dense if not _scores(mlp, each)]
    experts = chosen if routed else 0
    # What gives the stream's width is an MLP's last product, what reads it a first one.
    last = [each for each in dense if each.out_features == hidden and each.in_features != hidden]
    inner = sum(each.in_features for each in last) or sum(each.in_features for each in dense[-1:])
    wide = sum(each.out_features for each in dense if each not in last) or inner
    for tensor in routed:
        rows, columns = tensor.shape[1:]
        if rows == hidden and columns != hidden:
            inner += experts * columns
        else:
            wide += experts * rows
    attended = sum(each.weight.numel() for each in attention.modules() if isinstance(each, nn.Linear))
    multiplied = sum(each.weight.numel() for each in dense)
    multiplied += sum(tensor[0].numel() * experts for tensor in routed)
    scores = config._attn_implementation == "eager"
    return BlockShape(
        hidden=hidden,
        queries=heads * width,
        keys=groups * width,
        heads=heads,
        norms=_norms(block, heads * width, groups * width),
        inner=inner,
        wide=wide,
        weights=attended + multiplied,
        experts=experts,
        window=_window(attention, config),
        scores=scores,
        capped=bool(getattr(config, "attn_logit_softcapping", None)),
    )


def _scores(mlp: nn.Module, linear: nn.Linear) -> bool:
    """Whether a layer of an MLP is a router's."""
    name = next(name for name, module in mlp.named_modules() if module is linear)
    return name == "gate" or "router" in name


def _window(attention: Any, config: Any) -> int | None:
    kinds = getattr(config, "layer_types", None)
    if kinds and kinds[attention.layer_idx] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


def _norms(block: nn.Module, queries: int, keys: int) -> int:
    """Components that norms keep: those of a norm without a mean once, others (centred, then scaled) twice."""
    total = 0
    for name, module in block.named_modules():
        kind = type(module).__name__
        weight = getattr(module, "weight", None)
        if "Norm" not in kind or weight is None:
            continue
        width = {"q_norm": queries, "k_norm": keys}.get(name.rpartition(".")[2], weight.shape[-1])
        total += width * (1 if "RMS" in kind else 2)
    return total


def components_read(block: nn.Module, linears: Iterable[str], known: Iterable[str]) -> int:
    """Components of what ``linears`` of a block read, by name: those of one module that read alike read the same.

    What ``known`` linear layers read, attention's own output, is kept in any case and not counted.
    """
    left_out = set(known)
    widths = {(name.rpartition(".")[0], width_read(block, name)) for name in linears if name not in left_out}
    return sum(width for _, width in widths)


def width_read(block: nn.Module, linear: str) -> int:
    """Components of what a linear layer of a block reads."""
    module: Any = block.get_submodule(linear)
    return module.in_features
