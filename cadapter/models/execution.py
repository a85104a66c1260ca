"""How decoder blocks are run: as they are or compiled, and what of a block is kept for the backward pass.

What can be kept, by the names of ``activation_checkpointing``:

    none        everything that the backward pass needs
    selective   of the products with weights those that are no wider than the residual stream, and attention's outputs;
                the rest (in an MLP most of it) is computed again
    full        the residual stream that a block starts from; the block is computed again
    offload     the same, in pinned host memory: copied while later blocks compute, and back while they do backwards

A block that runs as it is has PyTorch's checkpointing around it. In a compiled block the compiler decides: it is told
which share of what it would keep it may keep, and finds the cheapest choice.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from cadapter.errors import CadapterError
from cadapter.terminal import warn

SHARES = {"none": 1.0, "selective": 0.5, "full": 0.0, "offload": 0.0}
"""What can be kept, and which share of it a compiled block keeps beyond what it starts from."""

VARIANTS = 64
"""How many versions of the block may be compiled: for layers with and without adapter, by kind of attention, …"""

_ATTENTION = {
    getattr(torch.ops.aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
}


def _width(operation: Any, args: tuple[Any, ...]) -> int | None:
    """The width of what a product with a weight gives; None for any other operation."""
    if operation is torch.ops.aten.mm.default:
        return args[1].shape[1]
    if operation is torch.ops.aten.addmm.default:
        return args[2].shape[1]
    if operation.namespace == "cadapter" and operation._opname == "linear_4bit":
        return args[3]
    return None


def _keeps(hidden_size: int, _context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    width = _width(operation, args)
    if operation in _ATTENTION or (width is not None and width <= hidden_size):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


class Compiled:
    """A function that torch.compile compiles as one graph when it is first called, for each kind of arguments.

    Args:
        function: computes with tensors and has no other effect.
        what: what it is, for the user.
        required: fail where it cannot be compiled; else that is said once, and the function is run as it is.
    """

    def __init__(self, function: Callable[..., Any], what: str, required: bool) -> None:
        # What is float32 here is so for the sake of its precision.
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, VARIANTS)
        self._function = function
        self._compiled: Callable[..., Any] | None = torch.compile(function, fullgraph=True, dynamic=False)
        self._what = what
        self._required = required

    def __call__(self, *args: Any) -> Any:
        """Call the function."""
        if self._compiled is not None:
            try:
                return self._compiled(*args)
            except torch._dynamo.exc.TorchDynamoException as error:
                self._give_up(error)
        return self._function(*args)

    def _give_up(self, error: Exception) -> None:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        said = f"compile: {self._what} cannot be compiled: {reason}"
        if self._required:
            raise CadapterError(f"{said}\nSet compile = false.") from error
        warn(f"{said}\nIt runs as it is.")
        self._compiled = None

    @property
    def works(self) -> bool:
        """Whether it is compiled, as far as is known."""
        return self._compiled is not None


def compiled_if(compiled: bool, function: Callable[..., Any], what: str, required: bool) -> Callable[..., Any]:
    """A function as it is, or :class:`Compiled`."""
    return Compiled(function, what, required) if compiled else function


class BlockRunner:
    """Runs ``function(block, hidden, …)``, the same for all decoder blocks of a stage.

    Args:
        function: its first tensor is the residual stream, [B, T, H].
        compiled: compile it in training: once for all blocks that are alike.
        required: see :class:`Compiled`.
    """

    def __init__(self, function: Callable[..., Any], compiled: bool = False, required: bool = False) -> None:
        self._function = function
        # The share that is kept is an argument, so that there is a version of the code for each.
        self._compiled = Compiled(partial(_run, function), "the decoder block", required) if compiled else None
        self._offload: HostCopies | None = None

    def __call__(self, keep: str, block: Any, hidden: Tensor, *args: Any) -> Any:
        """Run the function on a block.

        Args:
            keep: one of ``SHARES``.
            block, hidden, args: of the function.
        """
        if not torch.is_grad_enabled():
            return self._function(block, hidden, *args)
        with self._host_copies(hidden) if keep == "offload" else contextlib.nullcontext():
            if self._compiled is not None and self._compiled.works:
                with torch._functorch.config.patch(activation_memory_budget=SHARES[keep]):
                    return self._compiled(SHARES[keep], block, hidden, *args)
            if keep == "none":
                return self._function(block, hidden, *args)
            chosen: dict[str, Any] = {}
            if keep == "selective":
                policy = partial(_keeps, hidden.shape[-1])
                chosen["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
            # Nothing in a block draws random numbers, so there is no state to keep.
            return checkpoint(
                self._function, block, hidden, *args, use_reentrant=False, preserve_rng_state=False, **chosen
            )

    def _host_copies(self, hidden: Tensor) -> contextlib.AbstractContextManager[Any]:
        if not hidden.is_cuda:  # it is in host memory
            return contextlib.nullcontext()
        if self._offload is None:
            self._offload = HostCopies(hidden.device)
        return self._offload.instead_of(hidden)


def _run(function: Callable[..., Any], share: float, *args: Any) -> Any:
    if not 0 <= share <= 1:  # compiled code is made for a value only if the value is looked at
        raise ValueError(f"{share} is no share")
    return function(*args)


class _Copy:
    """A tensor in host memory, on its way there, or on its way back."""

    def __init__(self, host: Tensor, before: _Copy | None) -> None:
        self.host = host
        self.before = before
        self.back: Tensor | None = None


class HostCopies:
    """Copies in pinned host memory of residual streams that autograd keeps.

    Copies run on a stream of their own. Tensors are needed in the reverse order in which they were kept: when one is
    asked for, the one before it is fetched as well.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._last: _Copy | None = None

    @contextlib.contextmanager
    def instead_of(self, hidden: Tensor) -> Iterator[None]:
        """Have autograd keep a copy of ``hidden`` instead of itself; other tensors are kept as they are."""

        # Autograd holds on to this function, which therefore must not hold on to ``hidden``.
        place, shape = hidden.data_ptr(), hidden.shape

        def pack(tensor: Tensor) -> Any:
            same = tensor.data_ptr() == place and tensor.shape == shape
            return self._send(tensor) if same else tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, self._unpack):
            yield

    def _send(self, tensor: Tensor) -> _Copy:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self._stream):
            host.copy_(tensor.detach(), non_blocking=True)
        tensor.record_stream(self._stream)
        self._last = _Copy(host, self._last)
        return self._last

    def _fetch(self, copy: _Copy) -> Tensor:
        if copy.back is None:
            with torch.cuda.stream(self._stream):
                copy.back = copy.host.to(self._stream.device, non_blocking=True)
        return copy.back

    def _unpack(self, kept: Any) -> Tensor:
        if not isinstance(kept, _Copy):
            return kept
        tensor, kept.back = self._fetch(kept), None
        current = torch.cuda.current_stream(self._stream.device)
        current.wait_stream(self._stream)
        tensor.record_stream(current)
        if kept.before is not None:
            self._fetch(kept.before)
            kept.before = None
        if self._last is kept:
            self._last = None
        return tensor
