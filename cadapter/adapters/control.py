"""Control Adapters: the low-rank, multiplicative change of what a decoder block adds to the residual stream.

With Δh what the block adds, one row per token, ``W = s·B·A`` and the token's class c, the block gives

    h' = h + Δh + y,    y = s·B·T_c·(A·Δh)

where only the [r, r] matrix T_c differs: the identity for class +1 (y = W·Δh), ``−(I + M)^-1`` with
``M = s·A·B`` for class −1 (y = ((I + W)^-1 − I)·Δh, by Woodbury), zero for class 0 and for positions that
predict nothing. The method is jukofyork's (qlora-pipe-lite); W is never formed.

The symmetric form, ``W = Q·diag(expm1(S))·Qᵀ`` with orthonormal columns of Q, has ``A = Qᵀ``, ``B = Q``, ``s = 1``, and
``T_c = diag(expm1(±S))``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cadapter.adapters.dropout import keep_mask
from cadapter.algebra import core, exact_inverse, neumann_inverse
from cadapter.classes import NEGATIVE, NEUTRAL, POSITIVE
from cadapter.errors import CadapterError, UsageError
from cadapter.models.families import MODULES, Family

SITES = ("block", "mlp", "writes")
PLACE_OF_MLP = 1
"""The places of a block where something is written to the residual stream: 0 the attention's, 1 the MLP's."""

Transform = tuple[int, Tensor | None]
"""A code and the T that positions with this code receive: [r, r], the diagonal [r] of one, or None, the identity."""

SMALLEST_SQUARED_DELTA = 1e-6
"""Lower bound of ‖Δh‖² in the neutral loss, so that a position where the block adds nothing divides by no zero."""


@dataclass(frozen=True)
class ControlSettings:
    """What the adapters of one run have in common.

    Attributes:
        rank: r.
        alpha: the scale is ``s = alpha / r``.
        site: where the adapter acts: "block", "mlp" or "writes".
        form: "general" or "symmetric", which has no scale (alpha = r).
        inverse: how class −1 inverts: "exact", or "neumann" (the published method).
        neumann_order: number of terms of the Neumann series.
        dropout: probability with which a component of Δh is left out before A, in training.
        dtype: of the trained factors.
    """

    rank: int
    alpha: float
    site: str = "block"
    form: str = "general"
    inverse: str = "exact"
    neumann_order: int = 2
    dropout: float = 0.0
    dtype: torch.dtype = torch.float32

    @property
    def scale(self) -> float:
        """s = alpha / r."""
        return self.alpha / self.rank


def _generator(seed: int, layer: int, name: str) -> torch.Generator:
    """Random numbers that are a function of (seed, layer, name) only, so that every layout starts alike."""
    digest = hashlib.sha256(f"{seed}/{layer}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def initial_factor(seed: int, layer: int, name: str, rank: int, hidden_size: int) -> Tensor:
    """Return the initial A of a layer, [r, H]: Kaiming-uniform with a = √5, i.e. uniform in ±1/√H."""
    uniform = torch.rand(rank, hidden_size, generator=_generator(seed, layer, name), dtype=torch.float32)
    return (uniform * 2 - 1) / hidden_size**0.5


def initial_directions(seed: int, layer: int, name: str, rank: int, hidden_size: int) -> Tensor:
    """Return the initial Q of a layer, [H, r]: random orthonormal columns, uniform on the sphere each."""
    normal = torch.randn(hidden_size, rank, generator=_generator(seed, layer, name), dtype=torch.float64)
    Q, R = torch.linalg.qr(normal)
    return (Q * R.diagonal().sign()).float()


class ControlAdapter(nn.Module):
    """The adapter of one layer; its two forms differ in their parameters and in T_c."""

    place: Tensor

    def __init__(self, layer: int, settings: ControlSettings, device: Any = "cpu") -> None:
        super().__init__()
        self.settings = settings
        self.layer = layer
        # What dropout's masks are a function of: a tensor, since compiled code would treat each number by itself.
        self.register_buffer("place", torch.tensor(2 * layer, device=device), persistent=False)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [r, H] and B [H, r] in float32, in which everything is worked out."""
        raise NotImplementedError

    def enhancing(self) -> Tensor | None:
        """T of class +1, differentiable in the parameters."""
        raise NotImplementedError

    def suppressing(self) -> Tensor:
        """T of class −1, differentiable in the parameters."""
        raise NotImplementedError

    def class_transforms(self) -> list[Transform]:
        """The T of the classes +1 and −1."""
        return [(POSITIVE, self.enhancing()), (NEGATIVE, self.suppressing())]

    def forward(self, delta: Tensor, codes: Tensor, transforms: Sequence[Transform]) -> Tensor:
        """Return y = s·B·T_c·(A·Δh), [.., H] in the dtype of Δh.

        Args:
            delta: Δh, [.., H]. The products with A and B take their inputs in its dtype; what happens between them,
                in r dimensions, is done in float32.
            codes: [..], which of ``transforms`` each position receives; a code that is not among them gets y = 0.
            transforms: the matrices by code.
        """
        A, B = self.factors()
        reduced = (delta @ A.to(delta.dtype).T).float()
        chosen = torch.zeros_like(reduced)
        for code, T in transforms:
            chosen = torch.where((codes == code).unsqueeze(-1), _transformed(reduced, T), chosen)
        return chosen.to(delta.dtype) @ (self.settings.scale * B).to(delta.dtype).T

    def neutral_penalty(self, delta: Tensor, classes: Tensor) -> Tensor:
        """Return Σ ‖W·Δh‖² / max(‖Δh‖², 1e-6) over the positions of class 0, a scalar.

        ‖W·Δh‖² = s²·zᵀ·(BᵀB)·z with z = T₊·A·Δh, so nothing wider than r is computed.
        """
        delta = delta.float()
        A, B = self.factors()
        reduced = _transformed(delta @ A.T, self.enhancing())
        gram = B.T @ B
        moved = self.settings.scale**2 * ((reduced @ gram) * reduced).sum(-1)
        size = delta.square().sum(-1).clamp(min=SMALLEST_SQUARED_DELTA)
        return torch.where(classes == NEUTRAL, moved / size, 0.0).sum()


def _transformed(reduced: Tensor, T: Tensor | None) -> Tensor:
    """``T·z`` for each row z of ``reduced`` [.., r]."""
    if T is None:
        return reduced
    return reduced * T if T.ndim == 1 else reduced @ T.T


class GeneralAdapter(ControlAdapter):
    """W = s·B·A with A [r, H] and B [H, r], which is zero at first, so that training starts at the identity."""

    def __init__(self, hidden_size: int, layer: int, settings: ControlSettings, seed: int, device: Any = "cpu") -> None:
        super().__init__(layer, settings, device)
        first = initial_factor(seed, layer, "control_A", settings.rank, hidden_size)
        self.control_A = nn.Parameter(first.to(device, settings.dtype))
        self.control_B = nn.Parameter(torch.zeros(hidden_size, settings.rank, device=device, dtype=settings.dtype))

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B."""
        return self.control_A.float(), self.control_B.float()

    def enhancing(self) -> None:
        """The identity."""

    def suppressing(self) -> Tensor:
        """The exact inverse, or its Neumann series."""
        return suppressing([self])[0]


class SymmetricAdapter(ControlAdapter):
    """W = Q·diag(expm1(S))·Qᵀ with orthonormal columns of Q [H, r], and S [r], which is zero at first."""

    def __init__(self, hidden_size: int, layer: int, settings: ControlSettings, seed: int, device: Any = "cpu") -> None:
        super().__init__(layer, settings, device)
        first = initial_directions(seed, layer, "control_Q", settings.rank, hidden_size)
        self.control_Q = nn.Parameter(first.to(device, settings.dtype))
        self.control_S = nn.Parameter(torch.zeros(settings.rank, device=device, dtype=settings.dtype))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Qᵀ and Q."""
        Q = self.control_Q.float()
        return Q.T, Q

    def enhancing(self) -> Tensor:
        """The diagonal expm1(S)."""
        return torch.expm1(self.control_S.float())

    def suppressing(self) -> Tensor:
        """The diagonal expm1(−S): ``I + W`` with −S is the inverse."""
        return torch.expm1(-self.control_S.float())


class ClassTransforms:
    """The transforms of the classes for all adapters of a stage, worked out together: once in a forward pass.

    Alone, each would cost dozens of small operations on the GPU, forward and backward.
    """

    def __init__(self) -> None:
        self._adapters: list[ControlAdapter] = []
        self._made: dict[int, list[Transform]] = {}

    def add(self, adapter: ControlAdapter) -> None:
        """Have one more adapter; they are passed in the order in which they are added."""
        self._adapters.append(adapter)

    def of(self, adapter: ControlAdapter) -> list[Transform]:
        """The T of the classes +1 and −1 of one adapter; the first one's turn starts a pass."""
        if self._adapters and adapter is self._adapters[0]:
            self._made = self._work_out()
        made = self._made.pop(adapter.layer, None)
        return adapter.class_transforms() if made is None else made

    def _work_out(self) -> dict[int, list[Transform]]:
        together = [each for each in self._adapters if isinstance(each, GeneralAdapter)]
        if len(together) < 2:
            return {}
        inverses = suppressing(together).unbind()
        return {each.layer: [(POSITIVE, None), (NEGATIVE, T)] for each, T in zip(together, inverses, strict=True)}


def suppressing(adapters: Sequence[GeneralAdapter]) -> Tensor:
    """T of class −1 of adapters that have their settings in common, [adapters, r, r]."""
    settings = adapters[0].settings
    A, B = (torch.stack(factors) for factors in zip(*(each.factors() for each in adapters), strict=True))
    middle = core(A, B, settings.scale)
    if settings.inverse == "exact":
        return exact_inverse(middle)
    return neumann_inverse(middle, settings.neumann_order)


def new_adapter(hidden_size: int, layer: int, settings: ControlSettings, seed: int, device: Any) -> ControlAdapter:
    """The adapter of a layer in the form that the settings say, with its initial values, on ``device``."""
    kind = SymmetricAdapter if settings.form == "symmetric" else GeneralAdapter
    return kind(hidden_size, layer, settings, seed, device)


@dataclass
class _Pass:
    """What one forward pass of a controlled block carries to the places where the adapter acts."""

    codes: Tensor
    transforms: Sequence[Transform]
    dropout_rows: Tensor | None
    penalise_neutral: bool
    penalty: Tensor
    written: list[Tensor]


class _Current:
    """The pass that a controlled block is in, for its taps to see; None between passes."""

    pass_: _Pass | None = None


class _Tap(nn.Module):
    """Stands in for a module of a block that writes to the residual stream, and shows what it writes.

    A module and no forward hook: a compiled block is shared by all layers, and hooks would tell the layers apart.
    """

    def __init__(self, module: nn.Module, place: int, adapter: ControlAdapter, current: _Current) -> None:
        super().__init__()
        self.module = module
        self.place = place
        self._adapter = [adapter]  # in a list: not a submodule
        self._current = current

    def __getattr__(self, name: str) -> Any:
        """Give what only the module has, such as its weights."""
        return attribute_of(self, "module", name, super().__getattr__)

    def serves(self, adapter: ControlAdapter) -> bool:
        """Whether it is there for ``adapter``."""
        return self._adapter[0] is adapter

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Note what is written, or change it, as the site says."""
        output = self.module(*args, **kwargs)
        state, adapter = self._current.pass_, self._adapter[0]
        if state is None:
            return output
        written = output[0] if isinstance(output, tuple) else output
        if adapter.settings.site == "block":
            state.written.append(written)
            return output
        if adapter.settings.site == "mlp" and self.place != PLACE_OF_MLP:
            return output
        changed = written + _change(adapter, state, written, self.place, written.dtype)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed


def repeats_of(rows: int, strengths: int) -> int:
    """How many rows of a batch follow one another for each of so many strengths.

    Raises:
        UsageError: the batch cannot be divided so.
    """
    if rows % strengths:
        raise UsageError(
            f"The batch has {rows} rows, and strengths were set for {strengths}.\n"
            "Set one strength for each row, or one for all."
        )
    return rows // strengths


def attribute_of(module: nn.Module, wrapped: str, name: str, usual: Callable[[str], Any]) -> Any:
    """The attribute ``name`` of ``module``, or what the module wrapped in it, its attribute ``wrapped``, has."""
    try:
        return usual(name)
    except AttributeError:
        if name == wrapped:  # while the module is being made, or unpickled
            raise
        return getattr(usual(wrapped), name)


def _change(adapter: ControlAdapter, state: _Pass, delta: Tensor, place: int, dtype: torch.dtype) -> Tensor:
    """y for Δh, with products in ``dtype``; the neutral loss is added up on the way."""
    if state.penalise_neutral:
        state.penalty = state.penalty + adapter.neutral_penalty(delta, state.codes)
    if adapter.training and state.dropout_rows is not None:
        mask = keep_mask(state.dropout_rows, adapter.place + place, delta.shape, adapter.settings.dropout)
        delta = delta.float() * mask
    return adapter(delta.to(dtype), state.codes, state.transforms)


class ControlledBlock(nn.Module):
    """A decoder block with a Control Adapter around it; it stands in for the block wherever the block is called.

    The adapter acts on what the block's two modules write to the residual stream, which taps in their places show:

    * site "block": on the sum of what the family's facts say is added, after the block (on block output − block
      input where they do not say it);
    * site "mlp": on what the MLP writes, before anything else sees it;
    * site "writes": on what the attention and the MLP write, each on its own.

    Args:
        block: the decoder block, or one that has an adapter already; taps are put around its modules.
        adapter: of this layer.
        family: the facts of the block.
        residual_scale: what the block multiplies the outputs of its modules by before it adds them.
    """

    def __init__(self, block: nn.Module, adapter: ControlAdapter, family: Family, residual_scale: float = 1.0) -> None:
        super().__init__()
        self.block = block
        self.adapter = adapter
        self.residual_scale = residual_scale
        self.sums_branches = family.added is not None
        self.fixed: Sequence[Transform] | None = None
        self._fixed_codes = torch.full((1,), POSITIVE)
        self._current = _Current()
        seen = family.added if adapter.settings.site == "block" else MODULES
        block = innermost(block)  # adapters around adapters: taps stand around taps
        for place, name in enumerate(seen or ()):
            setattr(block, name, _Tap(getattr(block, name), place, adapter, self._current))

    def remove(self) -> nn.Module:
        """Take the adapter's taps out of the block and return it as it was; of several adapters the outermost first."""
        block = innermost(self.block)
        for name, module in list(block.named_children()):
            if isinstance(module, _Tap) and module.serves(self.adapter):
                setattr(block, name, module.module)
        return self.block

    def __getattr__(self, name: str) -> Any:
        """Give what only the block has, such as the ``attention_type`` that some models read from their layers."""
        return attribute_of(self, "block", name, super().__getattr__)

    @property
    def applications(self) -> int:
        """How often the adapter acts in one pass through the block."""
        return 2 if self.adapter.settings.site == "writes" else 1

    def fix(self, transforms: Sequence[Transform], codes: Tensor | None = None) -> None:
        """Apply ``transforms`` from now on when the block is called as a plain block, as generation does.

        Args:
            transforms: by code; none: the bare block.
            codes: [rows], of each row of the batch; None: every position of every row has the code of class +1. A
                batch that is k times as large has k rows for each, one after the other, as ``generate`` makes them.
        """
        self.fixed = transforms
        self._fixed_codes = torch.full((1,), POSITIVE) if codes is None else codes

    def _fixed_for(self, hidden: Tensor) -> tuple[Tensor, Sequence[Transform]]:
        """Codes [rows, 1] and transforms where ``hidden`` [rows, T, H] is; they stay there for the next call."""
        codes, device = self._fixed_codes, hidden.device
        if codes.device != device or any(T is not None and T.device != device for _, T in self.fixed or ()):
            self.fixed = [(code, None if T is None else T.to(device)) for code, T in self.fixed or ()]
            self._fixed_codes = codes = codes.to(device)
        if len(codes) > 1:
            codes = codes.repeat_interleave(repeats_of(len(hidden), len(codes)))
        return codes.unsqueeze(1), self.fixed or ()

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Call the block as it would be called without an adapter; the transforms are those of :meth:`fix`."""
        if self.fixed is None:
            raise CadapterError(f"The adapter of layer {self.adapter.layer} was called before its strength was set.")
        if not self.fixed:  # the base, bit for bit
            return self.block(hidden, *args, **kwargs)
        hidden = hidden.to(self.adapter.place.device)  # where a model lies on several devices
        codes, transforms = self._fixed_for(hidden)
        return self.controlled(hidden, codes, transforms, args=args, kwargs=kwargs)[0]

    def controlled(
        self,
        hidden: Tensor,
        codes: Tensor,
        transforms: Sequence[Transform],
        *,
        dropout_rows: Tensor | None = None,
        penalise_neutral: bool = False,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Return the block's changed output [B, T, H] and its neutral penalty (a float32 scalar, 0 if not asked for).

        Args:
            hidden: the residual stream, [B, T, H].
            codes: [B, T]; the classes in training.
            transforms: by code.
            dropout_rows: [B] int64, one number per row that dropout's masks are a function of.
            penalise_neutral: sum the loss of the neutral positions.
            args, kwargs: what else the block is called with.
        """
        state = _Pass(codes, transforms, dropout_rows, penalise_neutral, hidden.new_zeros((), dtype=torch.float32), [])
        self._current.pass_ = state
        try:
            output = self.block(hidden, *args, **kwargs)
        finally:
            self._current.pass_ = None
        if self.adapter.settings.site == "block":
            if self.sums_branches:
                delta = self.residual_scale * sum_of(state.written)
            else:
                delta = output.float() - hidden.float()
            output = output + _change(self.adapter, state, delta, 0, output.dtype)
        return output, state.penalty


def innermost(module: Any) -> Any:
    """What control adapters stand around: a block, or a module of one."""
    while isinstance(module, (ControlledBlock, _Tap)):
        module = module.block if isinstance(module, ControlledBlock) else module.module
    return module


def sum_of(written: Sequence[Tensor]) -> Tensor:
    """Return the float32 sum of what a block's modules wrote.

    Δh taken as a difference of two bfloat16 residual streams would carry their rounding.
    """
    total = written[0].float()
    for other in written[1:]:
        total = total + other.float()
    return total
