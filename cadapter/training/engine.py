"""Everything DeepSpeed, and only here: the pipeline module, the engine that runs its schedule, the topology.

DeepSpeed moves micro-batches through the stages. What follows is ours: the trainer averages gradients over replicas
and takes the optimiser's step after :meth:`Pipeline.train` has returned, so that reduction, clipping, Adam and decay
are plain code on plain gradients. Work-arounds say which versions they are for.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from cadapter.errors import CadapterError
from cadapter.models.device import to_device
from cadapter.models.layers import EmbeddingLayer
from cadapter.training.layout import Layout

# DeepSpeed prints on import and while it builds; what users should know, cadapter says itself.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
with contextlib.redirect_stdout(io.StringIO()):
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.pipe import p2p, schedule
    from deepspeed.runtime.pipe.engine import PipelineEngine
    from deepspeed.runtime.pipe.module import PipelineModule
    from deepspeed.runtime.pipe.topology import ProcessTopology
    from deepspeed.utils import logger as deepspeed_logger
    from deepspeed.utils.timer import NoopTimer

deepspeed_logger.setLevel(logging.ERROR)

# On the CPU DeepSpeed (0.19.8) compiles an all-reduce of its own when it is first used: a minute, and a compiler is
# needed. The process group's does.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

OLDEST_DEEPSPEED = (0, 19, 3)
"""Before 0.19.3 gradients under accumulation are scaled differently, by version and stage (DeepSpeed #7773, #8152)."""
TRIED_DEEPSPEED = (0, 19)
"""What the work-arounds here were written for; a later one may have changed what they rest on."""

PipelineBatch = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
"""What the first stage reads (inputs of the embedding layer) and what the last one does (targets of the loss)."""

Loss = Callable[[Any, tuple[Tensor, ...]], Tensor]
"""``loss(outputs of the last layer, targets)``."""


def check_deepspeed() -> str:
    """Return what the user should know of the installed DeepSpeed, if anything.

    Raises:
        CadapterError: it is known to scale gradients wrongly.
    """
    found = tuple(int(number) for number in re.findall(r"\d+", deepspeed.__version__)[:3])
    if found < OLDEST_DEEPSPEED:
        raise CadapterError(
            f"DeepSpeed {deepspeed.__version__} scales gradients wrongly under accumulation.\n"
            "Install deepspeed>=0.19.3,<0.20."
        )
    if found[:2] > TRIED_DEEPSPEED:
        return f"DeepSpeed {deepspeed.__version__} was not tried with this cadapter, which knows it up to 0.19."
    return ""


class _NoOptimizer(torch.optim.Optimizer):
    """DeepSpeed asks for an optimiser and refuses an empty one, which a stage without trained layers would have."""

    def __init__(self) -> None:
        self.param_groups: list[dict[str, Any]] = []
        self.state: Any = {}
        self.defaults: dict[str, Any] = {}


class _Stage(PipelineModule):
    """The layers of this process's stage, cut where our own partition says; ``moved`` hears of each piece of work."""

    def __init__(self, bounds: Sequence[int], moved: Callable[[], None], **arguments: Any) -> None:
        self._bounds, self._moved = list(bounds), moved
        super().__init__(**arguments)

    def _partition_layers(self, method: str = "") -> None:
        self.parts = self._bounds
        self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])

    def _build(self) -> None:
        for index in range(self._local_start, self._local_stop):
            layer = self._layer_specs[index]()
            self.forward_funcs.append(layer)
            self.add_module(str(index), layer)
            self._moved()

    def train(self, mode: bool = True) -> _Stage:
        """Switch modes; the engine asks for it in each step, while the GPU waits, and there are many modules."""
        return self if mode == self.training else super().train(mode)

    def forward(self, forward_input: Any) -> Any:
        self._moved()
        outputs = super().forward(forward_input)
        if torch.is_grad_enabled() and type(outputs) is tuple:
            # The next stage sends gradients for whatever floats it was given, also when nothing of this stage
            # (which may hold frozen layers only) has made autograd record them.
            for tensor in outputs:
                if tensor.is_floating_point() and not tensor.requires_grad:
                    tensor.requires_grad_()
        return outputs


class _Engine(PipelineEngine):
    """DeepSpeed's engine without its reduction of gradients and its optimiser step."""

    def _broadcast_model(self) -> None:
        """Nothing to send: every replica has read the same files and drawn the same initial values."""

    def _leave_to_trainer(self, lr_kwargs: Any = None) -> None:
        """Do nothing where the schedule says ReduceGrads, ReduceTiedGrads or OptimizerStep."""

    def _backward_all(self, buffer_id: int) -> None:
        """Run one backward pass for all floats that crossed the boundary.

        DeepSpeed (to 0.19.8 at least) runs one for each, through the same layers.
        """
        outputs = self.pipe_buffers["outputs"][buffer_id]
        if self.is_last_stage():
            super()._exec_backward_pass(buffer_id)
            return
        floats = [tensor for tensor in outputs if tensor.is_floating_point()]
        self._running_engine_backward = True
        try:
            torch.autograd.backward(floats, list(self.grad_layer))
        finally:
            self._running_engine_backward = False
        self.pipe_buffers["output_tensors"][buffer_id] = None
        self.pipe_buffers["outputs"][buffer_id] = None

    def _load(self, buffer_id: int) -> None:
        """Take the next micro-batch without waiting for the GPU, as DeepSpeed's own copies would.

        What the first stage reads stays on the host: its layer looks token embeddings up where they lie.
        """
        inputs, targets = self._next_batch()
        if self.is_first_stage():
            self.pipe_buffers["inputs"][buffer_id] = inputs
        if self.is_last_stage():
            self.pipe_buffers["labels"][buffer_id] = tuple(to_device(tensor, self.device) for tensor in targets)

    def _send_nothing(self, buffer_id: int) -> None:
        """Stand in for SendActivation, which lets go of nothing."""

    def _receive_the_same(self, buffer_id: int) -> None:
        """Stand in for RecvActivation: as if what lies in the receive buffer had come."""
        received = tuple(part.clone() for part in self.pipe_recv_buf)
        for part in received:
            part.requires_grad = part.is_floating_point()
        self.pipe_buffers["inputs"][buffer_id] = received

    def _let_go_of_inputs(self, buffer_id: int) -> None:
        """Stand in for SendGrad."""
        self.pipe_buffers["inputs"][buffer_id] = None

    def _receive_zeros(self, buffer_id: int) -> None:
        """Stand in for RecvGrad: zeros for whatever floats were sent."""
        if self.grad_layer is None:
            outputs = self.pipe_buffers["outputs"][buffer_id]
            self.grad_layer: Any = [torch.zeros_like(part) for part in outputs if part.is_floating_point()]

    _INSTRUCTION_MAP = {  # noqa: RUF012 (DeepSpeed's own name and form)
        **PipelineEngine._INSTRUCTION_MAP,
        schedule.ReduceTiedGrads: _leave_to_trainer,
        schedule.ReduceGrads: _leave_to_trainer,
        schedule.OptimizerStep: _leave_to_trainer,
        schedule.BackwardPass: _backward_all,
        schedule.LoadMicroBatch: _load,
    }
    ALONE = {  # noqa: RUF012
        **_INSTRUCTION_MAP,
        schedule.SendActivation: _send_nothing,
        schedule.RecvActivation: _receive_the_same,
        schedule.SendGrad: _let_go_of_inputs,
        schedule.RecvGrad: _receive_zeros,
    }
    """What is done instead where the other stages take no part."""


def rehearsed_micro_batches(stage: int, stages: int, accumulation: int) -> int:
    """How many micro-batches a step needs in which stage s of S has as much to hold as in one of M: min(S − s + 1, M).

    S − s are under way at once, and one more finds the gradients of the first beside them.
    """
    return min(stages - stage + 1, accumulation)


class Pipeline:
    """The pipeline of this process: builds its stage and runs micro-batches through the stages.

    Args:
        layers: for each layer of the whole pipeline, the function that builds it; only this stage's are called.
        bounds: which layers belong to which stage.
        layout: stages × replicas.
        loss: ``loss(outputs of the last layer, targets)``, called on the last stage for every micro-batch.
        micro_batch_size, accumulation: sequences per forward, forwards per step.
        moved: called for each layer that is built and each micro-batch that comes to this stage.
    """

    def __init__(
        self,
        layers: Sequence[Callable[[], nn.Module]],
        bounds: Sequence[int],
        layout: Layout,
        loss: Loss,
        micro_batch_size: int,
        accumulation: int,
        moved: Callable[[], None] = lambda: None,
    ) -> None:
        axes = ("data", "pipe") if layout.column_major else ("pipe", "data")
        sizes = {"data": layout.replicas, "pipe": layout.stages}
        with _quiet():
            # Takes over the process group that joined the world.
            deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
            self.module = _Stage(
                bounds,
                moved,
                layers=layers,
                topology=ProcessTopology(axes=list(axes), dims=[sizes[axis] for axis in axes]),
                loss_fn=loss,
            )
            settings = {
                "train_micro_batch_size_per_gpu": micro_batch_size,
                "gradient_accumulation_steps": accumulation,
                # Clipping is the trainer's, over all stages; DeepSpeed's fails where a stage trains nothing.
                "gradient_clipping": 0.0,
                "steps_per_print": None,
                # It would wait for the GPU before every micro-batch.
                "timers": {"throughput": {"enabled": False}},
            }
            grid = self.module.mpu()
            self._engine = _Engine(
                args=None,
                model=self.module,
                optimizer=_NoOptimizer(),
                model_parameters=[],
                mpu=grid,
                dist_init_required=False,
                config=settings,
                config_class=DeepSpeedConfig(settings, grid),
            )
            self._engine.timers = NoopTimer()  # the others would note events without end

    def layers(self) -> list[nn.Module]:
        """The pipeline layers of this stage, in order."""
        return list(self.module.forward_funcs)

    def replicas(self) -> Any:
        """The group of the processes that hold this stage."""
        return self.module.mpu().get_data_parallel_group()

    def train(self, micro_batches: Iterable[PipelineBatch]) -> None:
        """Run a step's micro-batches forward and backward; gradients are left averaged over this replica's.

        Every process calls this with the micro-batches of its replica.
        """
        self._engine.train_batch(iter(micro_batches))

    def connect(self, message: Tensor) -> None:
        """Send ``message`` from each stage to the next and back, and agree on a loss, as a step does.

        What the libraries below take for good when a connection is first used is taken then.
        """
        engine = self._engine
        first, last = engine.is_first_stage(), engine.is_last_stage()
        if not first:
            p2p.recv(message, engine.prev_stage)
        if not last:
            p2p.send(message, engine.next_stage)
            p2p.recv(message, engine.next_stage)
        if not first:
            p2p.send(message, engine.prev_stage)
        engine.total_loss = torch.zeros((), device=engine.device)
        engine._aggregate_total_loss()

    def rehearse(self, micro_batch: PipelineBatch, received: tuple[Tensor, ...]) -> None:
        """Do what a step asks of this stage when most micro-batches are under way, without the other stages.

        It takes a step that is as short as that allows; :meth:`forget` is called afterwards.

        Args:
            micro_batch: takes the place of each.
            received: what would come from the stage before, in the form in which it travels.
        """
        engine = self._engine
        count = rehearsed_micro_batches(engine.stage_id, engine.num_stages, engine.micro_batches)
        engine.set_dataiterator(repeat(micro_batch))
        engine.module.train()
        engine._compute_loss = True
        engine.pipe_recv_buf = received
        engine._INSTRUCTION_MAP = engine.ALONE
        try:
            engine._exec_schedule(schedule.TrainSchedule(count, engine.num_stages, engine.stage_id))
        finally:
            del engine._INSTRUCTION_MAP  # that of the class counts again

    def look_ahead(self, batch: PipelineBatch) -> None:
        """Begin already with what the host does for the micro-batch that will come next."""
        first = self.module.forward_funcs[0]
        if isinstance(first, EmbeddingLayer):
            first.look_ahead(batch[0][0])

    def forget(self) -> None:
        """Let go of the micro-batches of a step that failed or was rehearsed, so that one can be taken."""
        for buffers in self._engine.pipe_buffers.values():
            buffers[:] = [None] * len(buffers)
        self._engine.loss = None
        self._engine.reset_activation_shape()

    def evaluate(self, micro_batches: Iterable[PipelineBatch], count: int, loss: Loss | None = None) -> None:
        """Run ``count`` micro-batches, all of one shape, forward only and without dropout.

        ``loss``, by default that of training, sees each on the last stage.
        """
        of_training = self.module.loss_fn
        self.module.loss_fn = loss or of_training
        self._engine.reset_activation_shape()
        try:
            self._engine.eval_batch(iter(micro_batches), reduce_output=None, bcast_loss=False, num_micro_batches=count)
        finally:
            self.module.loss_fn = of_training
        self._engine.reset_activation_shape()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Swallow what DeepSpeed prints while it builds (errors are raised, not printed)."""
    if os.environ.get("CADAPTER_DEEPSPEED_OUTPUT"):
        yield
        return
    sys.stdout.flush()
    with contextlib.redirect_stdout(io.StringIO()):
        yield
