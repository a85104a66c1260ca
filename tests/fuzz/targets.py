"""What is fuzzed: the functions by which commands read users' files, each on a file of the bytes it is given.

A target lays out a directory of valid files once, and then is called with bytes for one of them. Nothing but a
``CadapterError`` may come out of it, and no other file may change. ``tests/fuzz/test_fuzz.py`` calls them with what
hypothesis makes, ``tests/fuzz/campaign.py`` with what a coverage-guided fuzzer does.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch

from cadapter.adapters.directory import kind_of, read_control_adapter
from cadapter.adapters.lora_directory import read_lora_adapter
from cadapter.config import load_config
from cadapter.config.layers import parse_layers
from cadapter.convert.lora_directory import read_lora
from cadapter.convert.norms import measure, orthogonality, verdict
from cadapter.convert.shards import read_header, rewrite_shard
from cadapter.data import cache as data_cache
from cadapter.data.chat import ChatTemplate
from cadapter.data.records import Fields, documents_of
from cadapter.data.sources import read_records
from cadapter.data.tokenising import Tokenizer
from cadapter.errors import CadapterError, UsageError
from cadapter.models.checkpoint import Checkpoint, load_model_config
from cadapter.training.nodes import read_hostfile
from cadapter.training.report import trim_metrics
from cadapter.training.state import FORMAT as CHECKPOINT_FORMAT
from cadapter.training.state import fault_of, load_checkpoint, newest_checkpoint
from tests.chat_templates import HEADERS
from tests.tiny_tokenizer import make_tokenizer

HIDDEN, RANK = 8, 2


@dataclass(frozen=True)
class Target:
    """Something to fuzz.

    Attributes:
        lay_out: writes the valid files into a directory.
        file: which of them takes the bytes.
        read: reads them, as commands do; the argument is the directory.
        seeds: valid contents of the file.
        words: what is worth putting into it.
    """

    lay_out: Callable[[Path], None]
    file: str
    read: Callable[[Path], object]
    seeds: tuple[bytes, ...]
    words: tuple[str, ...] = ()
    slow: bool = field(default=False)


def call(target: Target, directory: Path, data: bytes) -> bool:
    """Call ``target`` with ``data`` in a directory that it has laid out; whether the data was accepted."""
    (directory / target.file).write_bytes(data)
    try:
        target.read(directory)
    except CadapterError:
        return False
    return True


def tensors_in_bytes(tensors: dict[str, torch.Tensor]) -> bytes:
    return safetensors.torch.save(tensors, metadata={"format": "pt"})


# ---- configs and options --------------------------------------------------------------------------------------------

CONFIG = b"""model_dir = "base"
output_dir = "run"   # where
use_control_adapters = true
lora_rank = 4
lr = 2e-5
sequence_len = 64
layers_to_transform = "0:3"
class_weights = { positive = 1.0, negative = 0.5 }
sequence_prefix = [1, 2]
[[datasets]]
dataset_path = "a.jsonl"
control_class = -1
[[datasets]]
"dataset_path" = '''b.jsonl'''
"""


def read_config(directory: Path) -> object:
    return load_config(directory / "config.toml", ["lr=1e-4", "datasets.0.control_class=1"])


def read_layers(directory: Path) -> object:
    return parse_layers((directory / "layers").read_bytes().decode("utf-8", "surrogateescape"), 32)


# ---- models ---------------------------------------------------------------------------------------------------------

MODEL_CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 16,
    "max_position_embeddings": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False, "dtype": "float32",
}  # fmt: skip
SHARDS = {
    f"model-{number:05d}-of-00002.safetensors": {f"model.layers.{number - 1}.mlp.down_proj.weight": torch.ones(8, 16)}
    for number in (1, 2)
}
INDEX = {"metadata": {"total_size": 1024}, "weight_map": {name: file for file, held in SHARDS.items() for name in held}}


def lay_out_shards(directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps(MODEL_CONFIG))
    for file, tensors in SHARDS.items():
        (directory / file).write_bytes(tensors_in_bytes(tensors))


def lay_out_single(directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps(MODEL_CONFIG))


def read_model(directory: Path) -> object:
    with _config_known():
        checkpoint = Checkpoint(directory)
    tensors = checkpoint.tensors(checkpoint.names())
    for file in checkpoint.files():
        read_header(directory / file)
        copied = directory / "copied"
        try:
            rewrite_shard(directory / file, copied, lambda entry: tensors[entry.name], lambda entry: False, "BF16")
        finally:
            copied.unlink(missing_ok=True)
    return tensors


@cache
def _llama() -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(**MODEL_CONFIG)


class _config_known:  # noqa: N801 (a context manager)
    """Spare transformers' reading of the same config again and again, which takes milliseconds."""

    def __enter__(self) -> None:
        import cadapter.models.checkpoint as module

        self._module, self._original = module, module.load_model_config
        module.load_model_config = lambda directory, trust_remote_code=False: _llama()

    def __exit__(self, *_: object) -> None:
        self._module.load_model_config = self._original


# ---- adapters -------------------------------------------------------------------------------------------------------

CONTROL_TENSORS = {
    f"base_model.model.model.layers.{layer}.control_{factor}.weight": 0.1 * torch.arange(1.0, 17).view(shape)
    for layer in range(2)
    for factor, shape in (("A", (RANK, HIDDEN)), ("B", (HIDDEN, RANK)))
}
SYMMETRIC_TENSORS = {
    "base_model.model.model.layers.0.control_Q.weight": torch.eye(HIDDEN)[:, :RANK].contiguous(),
    "base_model.model.model.layers.0.control_S.weight": torch.tensor([0.5, -0.5]),
}
LORA_TENSORS = {
    f"base_model.model.model.layers.{layer}.mlp.down_proj.lora_{factor}.weight": torch.ones(shape)
    for layer in range(2)
    for factor, shape in (("A", (RANK, 16)), ("B", (HIDDEN, RANK)))
}
CONTROL_CONFIG = {
    "peft_type": "CONTROL_ADAPTER", "r": RANK, "lora_alpha": math.sqrt(RANK), "layers_to_transform": [0, 1],
    "base_model_name_or_path": "base", "base_model_type": "llama", "control_form": "general",
    "control_site": "writes", "control_inverse": "exact", "control_neumann_order": 2, "hidden_size": HIDDEN,
    "layers": {
        str(layer): {"attention": ["self_attn.o_proj"], "mlp": ["mlp.experts.*.w2"], "post_norms": False,
                     "biased": [], "experts": 2, "unknown": []}
        for layer in range(2)
    },
}  # fmt: skip
LORA_CONFIG = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 4, "lora_dropout": 0.0, "use_rslora": False,
    "bias": "none", "target_modules": ["down_proj"], "layers_to_transform": [0, 1], "init_lora_weights": True,
    "rank_pattern": {}, "alpha_pattern": {"layers.0.mlp.down_proj": 2}, "target_parameters": None,
    "base_model_name_or_path": "base", "use_dora": False, "modules_to_save": None,
}  # fmt: skip
PLAIN_LORA_CONFIG = {**LORA_CONFIG, "alpha_pattern": {}}


def in_json(value: object) -> bytes:
    return json.dumps(value).encode()


def adapter_files(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Callable[[Path], None]:
    def lay_out(directory: Path) -> None:
        (directory / "adapter_config.json").write_bytes(in_json(config))
        (directory / "adapter_model.safetensors").write_bytes(tensors_in_bytes(tensors))

    return lay_out


def read_control(directory: Path) -> object:
    kind_of(directory)
    control = read_control_adapter(directory)
    found = measure(control)
    orthogonality(control)
    return verdict(control, found)


def read_either_lora(directory: Path) -> object:
    kind_of(directory)
    found = read_lora(directory)
    try:
        read_lora_adapter(directory)  # which knows less
    except UsageError:
        return found
    return found


# ---- texts ----------------------------------------------------------------------------------------------------------

TURNS = [{"role": "user", "content": "Was it good?"}, {"role": "assistant", "content": "It was.", "x": None}]
RECORD = {"text": "It was the best of films.", "class": -1, "messages": TURNS, "chosen": "good", "rejected": "bad",
          "tools": [{"name": "search", "parameters": {}}]}  # fmt: skip
LINES = json.dumps(RECORD).encode() + b"\n\n" + json.dumps({**RECORD, "text": "\u2028 x"}).encode() + b"\n"
ALL_FIELDS = (
    Fields("text"),
    Fields("text", class_="class"),
    Fields(messages="messages"),
    Fields(chosen="chosen", rejected="rejected"),
)


@cache
def _template() -> ChatTemplate:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_tokenizer(Path(folder))
    tokenizer.chat_template = HEADERS
    return ChatTemplate(tokenizer, "model")


def read_texts(name: str, fields: Iterable[Fields] = ALL_FIELDS[:2]) -> Callable[[Path], object]:
    def read(directory: Path) -> object:
        found, refused = [], []
        for each in fields:
            try:
                for record in read_records([directory / name], each.needed, each.optional, refused.append):
                    try:
                        found += documents_of(record, each, 1, _template().render)
                    except UsageError as error:
                        refused.append(error)
            except UsageError as error:
                refused.append(error)
        if refused:
            raise refused[0]
        return found

    return read


def parquet(**options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({"text": ["It was good.", "x" * 50] * 4, "class": [1, -1] * 4, "messages": [TURNS] * 8})
    pq.write_table(table, sink, **options)
    return sink.getvalue().to_pybytes()


# ---- runs and caches ------------------------------------------------------------------------------------------------

STATE = {"format": CHECKPOINT_FORMAT,
         "position": {"step": 3, "sequences": 24, "tokens": 10, "seconds": 1.5, "best_loss": None, "evaluated": -1},
         "facts": {"seed": 1}, "settings": {"lr": 1e-3}}  # fmt: skip


def manifest_of(directory: Path) -> bytes:
    import hashlib

    files = {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "manifest.json"}
    return in_json(
        {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    )


def lay_out_checkpoint(directory: Path) -> None:
    step = directory / "step-000003"
    step.mkdir()
    (step / "state.json").write_bytes(in_json(STATE))
    (step / "optimizer-00001.safetensors").write_bytes(tensors_in_bytes({"layers.0.control_A.exp_avg": torch.ones(2)}))
    (step / "manifest.json").write_bytes(manifest_of(step))


def read_checkpoints(directory: Path) -> object:
    newest_checkpoint(directory)
    fault_of(directory / "step-000003")
    saved = load_checkpoint(directory / "step-000003")
    return saved.moments(["layers.0.control_A.exp_avg"])


CACHE_MANIFEST = {
    "format": data_cache.FORMAT, "key": "0" * 64, "created": 1.0, "sources": ["/a.jsonl"],
    "files": [{"/a.jsonl": "1" * 64}], "states": {"/a.jsonl": [1, 2, 3, 4]}, "tokenizer": "2" * 64,
    "options": {"sequence_len": 64, "datasets": [{"control_class": 1}]},
    "sizes": dict.fromkeys(data_cache.FILES, 0), "statistics": {"datasets": []},
}  # fmt: skip
RECIPE = data_cache.Recipe(
    ["/a.jsonl"], [{"/a.jsonl": data_cache.FileState("1" * 64, ())}], "2" * 64,
    {"sequence_len": 64, "datasets": [{"control_class": 1}]},
)  # fmt: skip


def lay_out_cache(directory: Path) -> None:
    entry = directory / f"{RECIPE.key[:32]}-01234567"
    (directory / "entry").symlink_to(entry.name)
    entry.mkdir()
    for name in data_cache.FILES:
        (entry / name).touch()


def read_cache(directory: Path) -> object:
    store = data_cache.Cache(directory, lambda text: None)
    store.known_files()
    return store.find(RECIPE)


def nothing(directory: Path) -> None:
    """Lay out no file besides the one that is fuzzed."""


def lay_out_tokenizer(directory: Path) -> None:
    make_tokenizer(directory)


@cache
def tokenizer_json() -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        make_tokenizer(Path(folder))
        return (Path(folder) / "tokenizer.json").read_bytes()


def read_tokenizer(directory: Path) -> object:
    tokenizer = Tokenizer(directory)
    return tokenizer.encode(["The film."]), tokenizer.special_ids


JSON_WORDS = ("NaN", "Infinity", "1e999", "null", "true", "[]", "{}", '""', "-1", "99999999999999999999", '"\\u0000"',
              '"../x"', '"/etc/passwd"', '"\\ud800"', "[[[[[[")  # fmt: skip
ADAPTER_WORDS = (*JSON_WORDS, *(f'"{key}"' for key in {**CONTROL_CONFIG, **LORA_CONFIG}))
SHARD_WORDS = ('"F32"', '"BF16"', '"F8_E4M3"', '"I64"', '"F4"', '"shape"', '"dtype"', '"data_offsets"', "[0,0]", "[]")

TARGETS: dict[str, Target] = {
    "config": Target(nothing, "config.toml", read_config, (CONFIG,), ("[[datasets]]", "'''", '"""', "1979-05-27")),
    "layers": Target(nothing, "layers", read_layers, (b"16:31", b"0:10,20:25,30"), (":", ",", "99999999999")),
    "safetensors": Target(
        lay_out_single, "model.safetensors", read_model,
        (tensors_in_bytes({"a": torch.ones(2, 3), "b": torch.zeros(0), "c": torch.ones((), dtype=torch.bfloat16)}),),
        SHARD_WORDS,
    ),
    "index": Target(
        lay_out_shards, "model.safetensors.index.json", read_model, (in_json(INDEX),), (*JSON_WORDS, '"weight_map"')
    ),
    "model-config": Target(
        nothing, "config.json", load_model_config, (in_json(MODEL_CONFIG),),
        (*JSON_WORDS, '"qwen2"', '"auto_map"', '"quantization_config"', '"layer_types"'), slow=True,
    ),
    "tokenizer": Target(
        lay_out_tokenizer, "tokenizer.json", read_tokenizer, (tokenizer_json(),), JSON_WORDS, slow=True
    ),
    "control-config": Target(
        adapter_files(CONTROL_CONFIG, CONTROL_TENSORS), "adapter_config.json", read_control,
        (in_json(CONTROL_CONFIG),), ADAPTER_WORDS,
    ),
    "control-weights": Target(
        adapter_files({**CONTROL_CONFIG, "layers": None}, CONTROL_TENSORS), "adapter_model.safetensors", read_control,
        (tensors_in_bytes(CONTROL_TENSORS), tensors_in_bytes({k: v.double() for k, v in CONTROL_TENSORS.items()})),
        SHARD_WORDS,
    ),
    "symmetric-weights": Target(
        adapter_files({"peft_type": "CONTROL_ADAPTER", "r": RANK}, SYMMETRIC_TENSORS), "adapter_model.safetensors",
        read_control, (tensors_in_bytes(SYMMETRIC_TENSORS),), SHARD_WORDS,
    ),
    "lora-config": Target(
        adapter_files(LORA_CONFIG, LORA_TENSORS), "adapter_config.json", read_either_lora,
        (in_json(LORA_CONFIG), in_json(PLAIN_LORA_CONFIG)), (*ADAPTER_WORDS, ".*", "(", "[", "(?P<"),
    ),
    "lora-weights": Target(
        adapter_files(PLAIN_LORA_CONFIG, LORA_TENSORS), "adapter_model.safetensors", read_either_lora,
        (tensors_in_bytes(LORA_TENSORS),), SHARD_WORDS,
    ),
    "jsonl": Target(nothing, "x.jsonl", read_texts("x.jsonl"), (LINES,), JSON_WORDS),
    "json": Target(nothing, "x.json", read_texts("x.json"), (in_json([RECORD, RECORD]),), JSON_WORDS),
    "gzip": Target(nothing, "x.jsonl.gz", read_texts("x.jsonl.gz"), (gzip.compress(LINES),)),
    "zstd": Target(
        nothing, "x.txt.zst", read_texts("x.txt.zst", ALL_FIELDS[:1]), (pa.compress(LINES, "zstd", asbytes=True),)
    ),
    "parquet": Target(
        nothing, "x.parquet", read_texts("x.parquet", ALL_FIELDS[:3]),
        (parquet(), parquet(compression="none", use_dictionary=False), parquet(store_schema=False)),
    ),
    "chat": Target(nothing, "x.jsonl", read_texts("x.jsonl", ALL_FIELDS[2:]), (LINES,), (*JSON_WORDS, '"system"')),
    "manifest": Target(
        lay_out_checkpoint, "step-000003/manifest.json", read_checkpoints,
        (b'{"state.json": {"bytes": 1, "sha256": "0"}}',), (*JSON_WORDS, '"bytes"', '"sha256"'),
    ),
    "state": Target(
        lay_out_checkpoint, "step-000003/state.json", read_checkpoints, (in_json(STATE),), (*JSON_WORDS, '"position"')
    ),
    "moments": Target(
        lay_out_checkpoint, "step-000003/optimizer-00001.safetensors", read_checkpoints,
        (tensors_in_bytes({"layers.0.control_A.exp_avg": torch.ones(2)}),), SHARD_WORDS,
    ),
    "cache": Target(lay_out_cache, "entry/manifest.json", read_cache, (
        in_json({**CACHE_MANIFEST, "key": RECIPE.key}), in_json(CACHE_MANIFEST)), JSON_WORDS),
    "hostfile": Target(
        nothing, "hosts", lambda directory: read_hostfile(str(directory / "hosts")),
        (b"node-a slots=8\nnode-b slots=4 # two\n",), (" slots=", "-F", "localhost"),
    ),
    "metrics": Target(
        nothing, "metrics.jsonl", lambda directory: trim_metrics(directory / "metrics.jsonl", 3),
        (b'{"step": 1, "train/loss": 0.5}\n{"step": 4}\n',), JSON_WORDS,
    ),
}  # fmt: skip
"""By name. Those that are ``slow`` take milliseconds a call."""
