"""How close a conversion is to the adapter: both run on the same text, and their distributions are compared.

Base, adapter (applied natively) and conversion go through the model side by side, block by block, in float32: whatever
the model's size, memory holds the weights of one block of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cadapter.adapters.control import ControlledBlock, new_adapter
from cadapter.adapters.directory import ControlAdapterFiles
from cadapter.adapters.strengths import load_factors, native_settings
from cadapter.classes import POSITIVE
from cadapter.convert.operators import Dial, work_dtype
from cadapter.convert.plan import Plan
from cadapter.models.attach import UNLISTED
from cadapter.models.checkpoint import Checkpoint
from cadapter.models.layers import Frame
from cadapter.models.loading import CausalLM

CHUNK_BYTES = 64 * 2**20
"""Bytes of float64 logits that are compared at once."""

FAILED_SHARE = 0.01
"""A conversion that is exact by its mathematics and loses this share of the adapter's effect is wrong."""
ROUNDING_KL = 1e-8
"""Mean KL, nats a token, that float32 arithmetic in another order may cause; a few 1e-12 are seen."""

Adapters = Sequence[tuple[ControlAdapterFiles, Dial]]
Native = Callable[[int, nn.Module], nn.Module]
"""Makes of block ``index`` of the base the block with the adapter."""


@dataclass(frozen=True)
class Fidelity:
    """A comparison over ``tokens`` positions.

    Attributes:
        kl_mean, kl_max: KL(adapter ‖ conversion) a token, in nats.
        top1_agreement: share of positions where both find the same token most probable.
        effect_mean, effect_max, effect_top1: the same of base and adapter, for scale: KL(base ‖ adapter).
    """

    tokens: int
    kl_mean: float
    kl_max: float
    top1_agreement: float
    effect_mean: float
    effect_max: float
    effect_top1: float

    @property
    def share(self) -> float:
        """KL of the conversion as a share of the adapter's effect."""
        return self.kl_mean / self.effect_mean if self.effect_mean > 0 else float(self.kl_mean > 0)

    @property
    def within_rounding(self) -> bool:
        """Whether float32 arithmetic may explain the difference."""
        return self.kl_mean <= ROUNDING_KL


class ChangedCheckpoint(Checkpoint):
    """A base as a merge of ``plan`` would leave it, without rounding: changes are worked out as tensors are read."""

    def __init__(self, base: Checkpoint, plan: Plan) -> None:
        super().__init__(base.directory, base.trust_remote_code)
        self._plan = plan

    def tensors(self, names: Iterable[str], device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """As of :class:`Checkpoint`; changed tensors come in float32 or better."""
        found = super().tensors(names, device)
        for name in found.keys() & self._plan.keys():
            found[name] = found[name].to(work_dtype(found[name]), copy=True)
            for change in self._plan[name]:
                change.apply_(found[name])
        return found


def native_blocks(base: CausalLM, adapters: Adapters) -> Native:
    """Control adapters around the base's blocks, each at its dial, the first one innermost."""

    def wrap(index: int, block: nn.Module) -> nn.Module:
        family = base.family
        for files, dial in adapters:
            if index not in files.layers:
                continue
            adapter = new_adapter(files.hidden_size, index, native_settings(files), 0, base.device)
            load_factors(adapter, files)
            block = ControlledBlock(block, adapter, family, base.residual_scale).eval()
            block.fix([(POSITIVE, _transform(files, index, dial).to(base.device))])
            family = UNLISTED  # what a block with an adapter adds is no longer the sum of its modules' outputs
        return block

    return wrap


def _transform(files: ControlAdapterFiles, layer: int, dial: Dial) -> Tensor:
    """T of ``x·((I + W)^t − I) = s·B·T·A``, float32."""
    power = files.layers[layer].power(dial.strength, files.scale, f"{files.path}, layer {layer}")
    return dial.factor * (torch.eye(files.rank) if power is None else power.float())


def verify(
    base: Checkpoint,
    adapters: Adapters | Plan,
    converted: Checkpoint,
    rows: Sequence[Tensor],
    device: str | torch.device,
    advance: Callable[[int], None] = lambda blocks: None,
) -> Fidelity:
    """Compare what a conversion has made with what it was made from, on token ids ``rows``, each [1, T].

    Args:
        adapters: control adapters, applied natively; or what LoRAs change, worked out without rounding.
        converted: the base with the conversion in its weights.
        advance: called with 1 after each block.

    Raises:
        UsageError: a model cannot be taken apart.
    """
    model = CausalLM(base, torch.float32, device)
    native: Native | CausalLM
    if isinstance(adapters, dict):
        native = CausalLM(ChangedCheckpoint(base, adapters), torch.float32, device)
    else:
        native = native_blocks(model, adapters)
    return measure(model, native, CausalLM(converted, torch.float32, device), rows, advance)


@torch.inference_mode()
def measure(
    base: CausalLM,
    native: Native | CausalLM,
    converted: CausalLM,
    rows: Sequence[Tensor],
    advance: Callable[[int], None] = lambda blocks: None,
) -> Fidelity:
    """Compare ``converted`` with the adapter on token ids ``rows``, each [1, T].

    Args:
        native: the adapter as blocks around the base's, or as a model of its own.
        advance: called with 1 after each block.
    """
    rows = [row.to(base.device) for row in rows]
    models = (base, native if isinstance(native, CausalLM) else base, converted)
    start = _embedded(base, rows)
    streams = [list(start) if model is base else _embedded(model, rows) for model in models]
    frames = [Frame(model) for model in models]
    for index in range(base.layer_count):
        bare, other = base.block(index), converted.block(index)
        blocks = [bare, native.block(index) if isinstance(native, CausalLM) else native(index, bare), other]
        for stream, frame, block in zip(streams, frames, blocks, strict=True):
            for number, hidden in enumerate(stream):
                stream[number] = block(hidden, **frame.arguments(hidden, index))
        for block in blocks:
            release(block)
        advance(1)
    return _compare(models, streams)


def release(module: nn.Module) -> None:
    """Give the memory of a module's weights back."""
    module.to("meta")


def _embedded(model: CausalLM, rows: Sequence[Tensor]) -> list[Tensor]:
    """Hidden states of the rows before the first block."""
    embedding = model.embedding()
    found = [embedding(row) * model.embedding_scale for row in rows]
    release(embedding)
    return found


def _compare(models: Sequence[CausalLM], streams: Sequence[Sequence[Tensor]]) -> Fidelity:
    """Heads, softmax and divergences, in float64 over chunks of positions."""
    hidden = [torch.cat([row[0] for row in stream]) for stream in streams]
    heads = [(model.final_norm(), model.head_weight(), model.logits) for model in models]
    found: list[list[Tensor]] = []
    step = max(1, CHUNK_BYTES // (8 * heads[0][1].shape[0]))
    for at in range(0, len(hidden[0]), step):
        logs = [
            torch.log_softmax(facts.apply((norm(part[at : at + step]) @ head.T).float()).double(), dim=1)
            for part, (norm, head, facts) in zip(hidden, heads, strict=True)
        ]
        tops = [each.argmax(dim=1) for each in logs]
        found.append([_kl(logs[1], logs[2]), tops[1] == tops[2], _kl(logs[0], logs[1]), tops[0] == tops[1]])
    kl, agrees, effect, kept = (torch.cat([part[k] for part in found]).double() for k in range(4))
    return Fidelity(
        tokens=len(kl),
        kl_mean=kl.mean().item(),
        kl_max=kl.max().item(),
        top1_agreement=agrees.mean().item(),
        effect_mean=effect.mean().item(),
        effect_max=effect.max().item(),
        effect_top1=kept.mean().item(),
    )


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """``Σ p·(log p − log q)`` of rows of log-probabilities; rounding below zero is zero."""
    return (p.exp() * (p - q)).sum(dim=1).clamp_min(0)


def verdict(
    found: Fidelity, exact: bool, truncated: bool = False, rounded_to: str | None = None, writers: str | None = None
) -> tuple[bool, str]:
    """Whether a conversion is as it must be, and in words what was found.

    Args:
        exact: its mathematics says that it is the adapter.
        writers: those that were asked for instead of those of the adapter's site.
        truncated: to a smaller rank.
        rounded_to: the dtype that changed weights were rounded to, where it is less than float32.
    """
    lost = f"{found.share:.2%} of the adapter's effect (KL)"
    if truncated:
        return True, f"Truncation loses {lost}. Without --rank the adapter's own rank is kept."
    if not exact and writers is not None:
        return True, f"The conversion misses the adapter by {lost}. Without --writers it follows the adapter's site."
    if not exact:
        return True, (
            f'The conversion misses the adapter by {lost}. One that is trained with control_site = "writes" or "mlp" '
            "converts exactly."
        )
    if rounded_to is not None:
        return found.share < 1, f"The conversion is exact; rounding its weights to {rounded_to} costs {lost}."
    if found.within_rounding or found.share < FAILED_SHARE:
        return True, "The conversion is the adapter, to float32 rounding."
    return False, f"The conversion should be exact and misses the adapter by {lost}. Please report this."
