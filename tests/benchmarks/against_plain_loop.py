r"""The quickstart's training step beside the same step in a plain loop: Hugging Face's model, hooks, torch's own Adam.

    python -m tests.benchmarks.against_plain_loop

Both train the same adapters in float32 on the CPU, on the same random tokens of classes +1, −1 and 0. They take turns,
so that what else the machine does slows both; what counts is the ratio of the medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from tests.benchmarks.step_parts import ALONE, Notes
from tests.benchmarks.train_speed import make_model, make_tokenizer, write_texts

SHAPE: dict[str, object] = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 1024, "max_position_embeddings": 512, "dtype": "float32",
}  # fmt: skip
RANK, SEQUENCE, ROWS = 16, 256, 8
CLASSES = {"positive": 1, "negative": -1, "neutral": 0}
CONFIG = """
model_dir = "{root}/model"
output_dir = "{root}/run"
dtype = "float32"
use_control_adapters = true
lora_rank = 16
lora_weight_decay = 10.0
control_site = "writes"
control_class0_lambda = 1.0
lr = 3e-3
epochs = 100
sequence_len = 256
micro_batch_size = 8
eval_fraction = 0.0
mix_datasets = true
"""


class PlainLoop:
    """The method as one would write it with hooks on the attention and the MLP of each layer."""

    def __init__(self, directory: Path) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).requires_grad_(False)
        self.classes = torch.empty(0)
        self.penalty = torch.zeros(())
        self.factors: list[nn.Parameter] = []
        for layer in self.model.model.layers:
            A = nn.Parameter((torch.rand(RANK, layer.hidden_size) * 2 - 1) / layer.hidden_size**0.5)
            B = nn.Parameter(torch.zeros(layer.hidden_size, RANK))
            self.factors += [A, B]
            for module in (layer.self_attn, layer.mlp):
                module.register_forward_hook(self._hook(A, B))
        self.adam = torch.optim.Adam(self.factors, lr=3e-3, betas=(0.9, 0.99))

    def _hook(self, A: Tensor, B: Tensor) -> Callable[..., Any]:
        scale = RANK**-0.5

        def change(_module: nn.Module, _args: Any, output: Any) -> Any:
            delta = output[0] if isinstance(output, tuple) else output
            z = delta @ A.T
            inverse = -torch.linalg.solve(torch.eye(RANK) + scale * A @ B, torch.eye(RANK))
            classes = self.classes.unsqueeze(-1)
            chosen = torch.where(classes == 1, z, 0.0) + torch.where(classes == -1, z @ inverse.T, 0.0)
            moved = scale**2 * ((z @ (B.T @ B)) * z).sum(-1) / delta.square().sum(-1).clamp(min=1e-6)
            self.penalty = self.penalty + moved[self.classes == 0].sum()
            changed = delta + scale * chosen @ B.T
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return change

    def step(self, ids: Tensor, classes: Tensor) -> float:
        """One optimiser step with decay; the loss."""
        self.classes, self.penalty = classes, torch.zeros(())
        logits = self.model(input_ids=ids, use_cache=False).logits
        labels = torch.where(classes[:, :-1] == 0, -100, ids[:, 1:])
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())
        loss = loss + self.penalty / (2 * len(self.factors) / 2 * max(int((classes == 0).sum()), 1))
        loss.backward()
        nn.utils.clip_grad_norm_(self.factors, 1.0)
        self.adam.step()
        self.adam.zero_grad()
        with torch.no_grad():
            for A, B in zip(self.factors[::2], self.factors[1::2], strict=True):
                step = 3e-3 * 10.0 / RANK
                change_A, change_B = step * (B.T @ B) @ A, step * B @ (A @ A.T)
                A.sub_(change_A)
                B.sub_(change_B)
        return loss.item()


def main() -> None:
    """Make model and texts, let both take turns, and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    os.environ.update(ALONE)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "model").mkdir()
        words = make_tokenizer(root / "model")
        make_model(root / "model", {**SHAPE, "vocab_size": len(words) + 4})
        lines = [CONFIG.format(root=root)]
        for name, number in CLASSES.items():
            write_texts(root / f"{name}.jsonl", words, 40_000)
            lines += ["[[datasets]]", f'dataset_path = "{root}/{name}.jsonl"', f"control_class = {number}"]
        (root / "config.toml").write_text("\n".join(lines), encoding="utf-8")
        run(root, options.steps)


def run(root: Path, steps: int) -> None:
    """Take turns."""
    from cadapter.config.loading import load_config
    from cadapter.training.build import build_run, plan_run
    from cadapter.training.failures import joined_world
    from cadapter.training.run_directory import RunDirectory
    from cadapter.training.signals import StopSignals
    from cadapter.training.trainer import Trainer

    with joined_world() as world:
        plan = plan_run(load_config(root / "config.toml", []), world)
        made = build_run(plan, world, RunDirectory(root / "run"), None)
        trainer = Trainer(made, Notes(), StopSignals())  # type: ignore[arg-type]
        plain, seconds = PlainLoop(root / "model"), {"cadapter": [], "plain loop": []}
        classes = torch.tensor([1, -1, 0]).repeat(ROWS * SEQUENCE)[: ROWS * SEQUENCE].view(ROWS, SEQUENCE)
        for _ in range(steps):
            ids = torch.randint(4, 2004, (ROWS, SEQUENCE))
            for name, step in (("cadapter", trainer._step), ("plain loop", lambda ids=ids: plain.step(ids, classes))):
                started = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(each[3:]) for name, each in seconds.items()}
    for name, median in medians.items():
        print(f"{name}: {ROWS * SEQUENCE / median:,.0f} tokens/s, median of {steps - 3} steps")
    print(f"cadapter has {medians['plain loop'] / medians['cadapter']:.2f} of the plain loop's speed")


if __name__ == "__main__":
    main()
