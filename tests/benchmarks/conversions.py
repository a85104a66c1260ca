r"""How fast conversions are, against the ways that are known, in one run on the CPU.

    python tests/benchmarks/conversions.py --parts additive merge

* additive: the additive LoRA of a residual writer [4096, 14336], exactly in rank space, against the published way, an
  SVD of the whole product;
* merge: `cadapter merge` of a random model of 2 GB, against copying its files; and how much memory it takes.

Both sides of a ratio run one after the other in one process, or as one command each. Times of different machines do not
compare.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

OUT_FEATURES, IN_FEATURES = 4096, 14336
SHAPE = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 8192,
}  # fmt: skip


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median of ``repeats`` runs."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def additive(rank: int) -> None:
    """Rank space against an SVD of the product, for one writer."""
    from cadapter.adapters.factors import LowRank
    from cadapter.convert.add_lora import additive_pair

    generator = torch.Generator().manual_seed(0)
    operator = LowRank(
        torch.randn(rank, OUT_FEATURES, generator=generator),
        torch.randn(OUT_FEATURES, rank, generator=generator) * 1e-4,
    )
    weight = torch.randn(OUT_FEATURES, IN_FEATURES, generator=generator) * 0.02

    def by_svd() -> tuple[torch.Tensor, torch.Tensor]:
        product = operator.B @ operator.A @ weight
        U, S, Vh = torch.linalg.svd(product, full_matrices=False)
        root = S[:rank].sqrt()
        return root[:, None] * Vh[:rank], U[:, :rank] * root

    pair = additive_pair(operator, weight, None)
    ours = seconds(lambda: additive_pair(operator, weight, None), 5)
    started = time.perf_counter()
    A, B = by_svd()
    published = time.perf_counter() - started
    exact = operator.B.double() @ (operator.A.double() @ weight.double())

    def error(A: torch.Tensor, B: torch.Tensor) -> float:
        return ((B.double() @ A.double() - exact).norm() / exact.norm()).item()

    print(f"--- additive LoRA of a writer [{OUT_FEATURES}, {IN_FEATURES}], rank {rank}, float32")
    print(f"rank space      {ours:9.4f} s   relative error {error(pair.A, pair.B):.1e}")
    print(f"SVD of product  {published:9.4f} s   relative error {error(A, B):.1e}")
    print(f"ratio           {published / ours:9.0f}", flush=True)


def make_model(directory: Path) -> int:
    """Save a random bfloat16 Llama, one shard for every four layers; returns its bytes."""
    import json

    config = LlamaConfig(**SHAPE, tie_word_embeddings=False, architectures=["LlamaForCausalLM"])
    config.dtype = torch.bfloat16
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        skeleton = AutoModelForCausalLM.from_config(config)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in skeleton.state_dict().items():
        number = int(name.split(".")[2]) // 4 if name.startswith("model.layers.") else 9
        value = (torch.randn(tensor.shape) * 0.02).bfloat16()
        shards.setdefault(f"model-{number}.safetensors", {})[name] = value
    for file, tensors in shards.items():
        save_file(tensors, directory / file, metadata={"format": "pt"})
    total = sum(t.numel() * 2 for tensors in shards.values() for t in tensors.values())
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(directory)
    return total


def make_adapter(directory: Path, base: Path) -> None:
    """Save a random adapter on every layer's writers."""
    from cadapter.adapters.directory import ControlAdapterFiles, control_card, write_control_adapter
    from cadapter.adapters.factors import LowRank

    hidden, rank, layers = SHAPE["hidden_size"], 16, {}
    for layer in range(SHAPE["num_hidden_layers"]):
        layers[layer] = LowRank(torch.randn(rank, hidden) / hidden**0.5, torch.randn(hidden, rank) * 0.02)
    adapter = ControlAdapterFiles(directory, rank, rank**0.5, layers, site="writes", base_model_type="llama",
                                  base_model_name_or_path=str(base))  # fmt: skip
    directory.mkdir()
    write_control_adapter(directory, adapter, control_card(adapter))


def copy_and_flush(source: Path, target: Path) -> None:
    """Copy a model's shards and wait until they are on the disk, as a merge does."""
    target.mkdir()
    for file in sorted(source.glob("*.safetensors")):
        shutil.copyfile(file, target / file.name)
        descriptor = os.open(target / file.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def peak_memory(code: str) -> int:
    """Most bytes that a process running ``code`` had in memory (VmHWM: a child's ru_maxrss may be its parent's)."""
    wrapped = (
        f"try:\n    {code}\nexcept SystemExit:\n    pass\n"
        "print([line for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
    )
    done = subprocess.run([sys.executable, "-c", wrapped], capture_output=True, text=True, check=True)
    return int(done.stdout.split("VmHWM:")[1].split()[0]) * 1024


def merge(repeats: int) -> None:
    """The command against a copy of the same files."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "base").mkdir()
        size = make_model(root / "base")
        make_adapter(root / "adapter", root / "base")
        copies, merges, inside = [], [], []
        for number in range(repeats):
            started = time.perf_counter()
            copy_and_flush(root / "base", root / f"copy{number}")
            copies.append(time.perf_counter() - started)
            shutil.rmtree(root / f"copy{number}")
            command = [sys.executable, "-m", "cadapter", "merge", str(root / "base"), str(root / "adapter")]
            started = time.perf_counter()
            done = subprocess.run(
                [*command, str(root / "merged"), "--force"], capture_output=True, text=True, check=True
            )
            merges.append(time.perf_counter() - started)
            inside.append(float(done.stdout.split(" GB in ")[1].split(" s")[0]))
        names = [str(root / name) for name in ("base", "adapter", "again")]
        peak = peak_memory(f"import sys; sys.argv[1:] = ['merge', *{names!r}]; from cadapter.cli import main; main()")
        rest = peak_memory("import torch, transformers, cadapter.convert.merge")
        print(f"--- merge of a bfloat16 model of {size / 1e9:.2f} GB, {repeats} runs, medians")
        copy, whole, work = (statistics.median(times) for times in (copies, merges, inside))
        print(f"copying the files, flushed  {copy:6.1f} s  {size / 1e9 / copy:5.2f} GB/s")
        print(
            f"merge, without its imports  {work:6.1f} s  {size / 1e9 / work:5.2f} GB/s   {work / copy:.2f} × the copy"
        )
        print(f"merge, the whole command    {whole:6.1f} s")
        print(f"peak memory {peak / 1e9:.2f} GB, of which {rest / 1e9:.2f} GB after the imports alone", flush=True)


def main() -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("additive", "merge"), default=["additive", "merge"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print(f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if "additive" in options.parts:
        additive(options.rank)
    if "merge" in options.parts:
        merge(options.repeats)


if __name__ == "__main__":
    main()
