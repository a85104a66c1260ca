r"""How fast `cadapter train` is: a random model of a given shape, random text, whole steps of the real command.

    python tests/benchmarks/train_speed.py --shape 8b --steps 20        # one GPU with 40 GiB or more free
    python tests/benchmarks/train_speed.py --shape 8b --steps 8 --table # every variant of docs/performance.md
    python tests/benchmarks/train_speed.py --shape tiny --steps 6       # a laptop's CPU
    python tests/benchmarks/train_speed.py --variant load_in_4bit=true \
        --variant use_control_adapters=false,datasets.1.control_class=1,lora_rank=64,lora_weight_decay=10
    python tests/benchmarks/train_speed.py --variant 'document_attention="isolated"'    # documents of 1,000 tokens

Prints tokens per second (median of the steps after the first two), TFLOP/s, the share of the floor that matrix
products alone would take, peak memory and loading time, with the conditions. Numbers of different machines do not
compare.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPES = {
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "layers": "0:29",
        "sequence_len": 4096, "dtype": "bfloat16",
    },
    "1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "layers": "0:15",
        "sequence_len": 4096, "dtype": "bfloat16",
    },
    "tiny": {
        "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 4096, "max_position_embeddings": 1024, "layers": "0:3",
        "sequence_len": 256, "dtype": "float32",
    },
}  # fmt: skip
LORA = "use_control_adapters=false,datasets.1.control_class=1,lora_rank=64,lora_weight_decay=10"
TABLE = [
    'activation_checkpointing="selective"', 'activation_checkpointing="full"', 'activation_checkpointing="offload"',
    "load_in_4bit=true", 'load_in_4bit=true,activation_checkpointing="full"',
    LORA, f'{LORA},activation_checkpointing="full"',
    f"{LORA},load_in_4bit=true", f'{LORA},load_in_4bit=true,activation_checkpointing="full"',
]  # fmt: skip
"""The variants of docs/performance.md, besides the defaults."""
H200_MATRIX_TFLOPS = 790
"""What large bfloat16 matrix products on random data reach on an H200."""


def make_tokenizer(directory: Path) -> list[str]:
    """Save a word tokenizer and return its words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [f"w{number}" for number in range(2000)]
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(directory)
    return words


def make_model(directory: Path, shape: dict[str, object]) -> int:
    """Save a random Llama of this shape, one shard a layer, and return its number of parameters."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, LlamaConfig

    dtype = getattr(torch, str(shape["dtype"]))
    keys = [key for key in shape if key not in ("layers", "sequence_len", "dtype")]
    config = LlamaConfig(**{key: shape[key] for key in keys}, rms_norm_eps=1e-5, tie_word_embeddings=False)
    config.dtype = dtype
    config.architectures = ["LlamaForCausalLM"]
    with init_empty_weights():
        skeleton = AutoModelForCausalLM.from_config(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    weight_map, parameters = {}, 0
    for name, tensor in skeleton.state_dict().items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        file = f"model-{int(layer[1]) + 1:05d}.safetensors" if layer else f"model-{name.split('.')[-2]}.safetensors"
        value = torch.randn(tensor.shape, device=device) * 0.02 if tensor.ndim > 1 else torch.ones(tensor.shape)
        shards.setdefault(file, {})[name] = value.to(dtype).cpu()
        weight_map[name] = file
        parameters += value.numel()
    for file, tensors in shards.items():
        save_file(tensors, directory / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": parameters * dtype.itemsize}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(directory)
    return parameters


def write_texts(path: Path, words: list[str], tokens: int) -> None:
    """Write documents of about 1,000 random words, ``tokens`` in all."""
    draw = random.Random(path.name)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(tokens // 1000 + 2):
            file.write(json.dumps({"text": " ".join(draw.choices(words, k=1000))}) + "\n")


def flop_per_token(shape: dict[str, object], parameters: int) -> float:
    """Multiply-adds × 2 of one token's forward pass and of its backward pass to the hidden states.

    Frozen weights get no gradient of their own: 2 + 2 operations for each weight of a product, and the attention
    scores and sums (causal: half of them) 2 + 4.
    """
    hidden, layers, length = (int(str(shape[k])) for k in ("hidden_size", "num_hidden_layers", "sequence_len"))
    products = parameters - int(str(shape["vocab_size"])) * hidden  # the embedding is looked up
    return 4 * products + (2 + 4) * 2 * layers * hidden * length / 2


def train(directory: Path, overrides: list[str]) -> tuple[str, list[dict[str, float]]]:
    """Run the command with these overrides; return what it printed and its lines of metrics."""
    command = [sys.executable, "-m", "cadapter", "train", str(directory / "config.toml"), "--num-gpus", "1", "--force"]
    command += [part for value in overrides for part in ("--set", value)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{' '.join(command)}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}")
    lines = (directory / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    return result.stdout, [json.loads(line) for line in lines]


def report(variant: str, printed: str, lines: list[dict[str, float]], flop: float) -> None:
    """Print the numbers of one variant."""
    rates = [line["train/tokens_per_second"] for line in lines][2:]
    median = statistics.median(rates)
    print(f"--- {variant or 'defaults'}")
    print(f"tokens/s: median {median:,.0f} of {len(rates)} steps (lowest {min(rates):,.0f}, highest {max(rates):,.0f})")
    tflops = median * flop / 1e12
    print(f"TFLOP/s of the model's own products: {tflops:.1f}")
    if torch.cuda.is_available():
        floor = H200_MATRIX_TFLOPS * 1e12 / flop
        print(f"share of the floor without recomputation ({floor:,.0f} tokens/s on an H200): {median / floor:.2f}")
    for line in printed.splitlines():
        if line.startswith(("Decoder", "Loaded", "Peak")):
            print(line)
    print(f"loss: first {lines[0]['train/loss']:.4f}, last {lines[-1]['train/loss']:.4f}", flush=True)


def write_config(directory: Path, shape: dict[str, object], options: argparse.Namespace) -> None:
    """Write the config that all variants start from."""
    lines = [
        f'model_dir = "{directory}/model"',
        f'output_dir = "{directory}/run"',
        "use_control_adapters = true",
        f"lora_rank = {options.rank}",
        "lora_weight_decay = 100.0",
        "lr = 1e-4",
        f'layers_to_transform = "{shape["layers"]}"',
        f"sequence_len = {shape['sequence_len']}",
        f"gradient_accumulation_steps = {options.accumulation}",
        f'dtype = "{shape["dtype"]}"',
        f"max_steps = {options.steps}",
        "eval_fraction = 0.0",
    ]
    for name, control_class in (("positive", 1), ("negative", -1)):
        lines += ["[[datasets]]", f'dataset_path = "{directory}/{name}.jsonl"', f"control_class = {control_class}"]
    (directory / "config.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Make everything, train each variant, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--accumulation", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--variant", action="append", metavar="KEY=VALUE,…", help="a further run with these keys of the config"
    )
    parser.add_argument("--table", action="store_true", help="the variants of docs/performance.md")
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        (directory / "model").mkdir()
        words = make_tokenizer(directory / "model")
        parameters = make_model(directory / "model", shape)
        tokens = options.steps * options.accumulation * int(str(shape["sequence_len"]))
        for name in ("positive", "negative"):
            write_texts(directory / f"{name}.jsonl", words, tokens // 2)
        write_config(directory, shape, options)
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        print(f"{device}, torch {torch.__version__}, {parameters / 1e9:.2f} G parameters, {shape['dtype']}")
        print(
            f"rank {options.rank}, layers {shape['layers']}, sequence_len {shape['sequence_len']}, micro-batch 1, "
            f"accumulation {options.accumulation}, {options.steps} steps, the first 2 not counted"
        )
        for variant in ["", *(TABLE if options.table else []), *(options.variant or [])]:
            printed, lines = train(directory, variant.split(",") if variant else [])
            report(variant, printed, lines, flop_per_token(shape, parameters))


if __name__ == "__main__":
    main()
