"""Payloads that leave a file behind when they are run, in every kind of file that a stranger may hand over.

Each payload touches a file of its own in one directory: what is there afterwards tells which of them were run.
"""

from __future__ import annotations

import gzip
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SPOKEN_FOR = ("modeling_mine", "configuration_mine", "tokenization_mine")
"""Modules that the configs of :func:`poison_model` name as the model's own code."""


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (self._path, "w")


class Canaries:
    """Makes payloads that touch files in the directory ``fired``."""

    def __init__(self, fired: Path) -> None:
        self.fired = fired
        self.made: list[str] = []
        fired.mkdir()

    def _new(self, name: str) -> Path:
        self.made.append(name)
        return self.fired / name

    def pickled(self, name: str) -> bytes:
        return pickle.dumps(Touch(self._new(name)))

    def torch_archive(self, path: Path, name: str) -> None:
        """What ``torch.save`` writes, an archive with a pickle in it."""
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", self.pickled(name))
            archive.writestr("archive/version", "3\n")

    def code(self, name: str) -> str:
        return f"open({str(self._new(name))!r}, 'w').close()\n"

    def template(self, name: str) -> str:
        """A chat template that leaves jinja's sandbox, where there is none."""
        path = str(self._new(name))
        return f"{{{{ cycler.__init__.__globals__.os.mkdir('{path}') }}}}{{{{ messages[0]['content'] }}}}"


def poison_model(directory: Path, canaries: Canaries) -> None:
    """Put beside a model's own files all that others might run, and have its configs ask for it."""
    for name in SPOKEN_FOR:
        (directory / f"{name}.py").write_text(canaries.code(name))
    for name in ("__init__.py", "setup.py", "torch.py", "sitecustomize.py", "handler.py"):
        (directory / name).write_text(canaries.code(f"model-{name}"))
    (directory / "custom_generate").mkdir()
    (directory / "custom_generate" / "generate.py").write_text(canaries.code("custom_generate"))
    for name in ("pytorch_model.bin", "pytorch_model-00001-of-00001.bin", "training_args.bin", "optimizer.pt",
                 "tokenizer.pkl", "vocab.pkl", "rng_state.pth"):  # fmt: skip
        (directory / name).write_bytes(canaries.pickled(f"model-{name}"))
    canaries.torch_archive(directory / "scheduler.pt", "model-scheduler.pt")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "pytorch_model-00001-of-00001.bin"}}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    named = {
        "config.json": {
            "AutoConfig": "configuration_mine.Mine",
            "AutoModelForCausalLM": "modeling_mine.Mine",
            "AutoModel": "modeling_mine.Mine",
        },
        "tokenizer_config.json": {"AutoTokenizer": ["tokenization_mine.Mine", "tokenization_mine.Mine"]},
    }
    for file, classes in named.items():
        edit_json(directory / file, auto_map=classes)


def poison_checkpoints(run: Path, canaries: Canaries) -> None:
    """Put what other programs keep in their checkpoints into those of a run, which is then resumed."""
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    for number, place in enumerate((run, run / "checkpoints", checkpoint)):
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "pytorch_model.bin",
                     "adapter_model.bin", "mp_rank_00_model_states.pt", "layer_00-model_states.pt"):  # fmt: skip
            (place / name).write_bytes(canaries.pickled(f"{number}-{name}"))
        (place / "latest").write_text("global_step1")
        (place / "global_step1").mkdir()
        canaries.torch_archive(place / "global_step1" / "module.pt", f"{number}-global_step1")
    (run / "checkpoints" / "zero_to_fp32.py").write_text(canaries.code("zero_to_fp32"))


def poison_adapter(directory: Path, canaries: Canaries) -> None:
    """Put pickles and code beside an adapter's own files."""
    (directory / "adapter_model.bin").write_bytes(canaries.pickled(f"{directory.name}-adapter_model.bin"))
    canaries.torch_archive(directory / "adapter_model.pt", f"{directory.name}-adapter_model.pt")
    (directory / "modeling_mine.py").write_text(canaries.code(f"{directory.name}-modeling"))
    edit_json(
        directory / "adapter_config.json",
        auto_mapping={"base_model_class": "Mine", "parent_library": "modeling_mine"},
        runtime_config={"py/object": "modeling_mine.Mine"},
    )


def parquet_with_pickles(path: Path, texts: list[str], canaries: Canaries) -> None:
    """A column of an extension type whose metadata is a pickle, as old versions of pyarrow wrote them, and pandas'."""
    field = pa.field(
        "text",
        pa.string(),
        metadata={
            b"ARROW:extension:name": b"arrow.py_extension_type",
            b"ARROW:extension:metadata": canaries.pickled("parquet-extension"),
        },
    )
    note = {"columns": [{"name": "text", "pandas_type": "object", "numpy_type": "object"}], "index_columns": []}
    schema = pa.schema(
        [field, pa.field("blob", pa.binary())],
        metadata={b"pandas": json.dumps(note).encode(), b"pickle": canaries.pickled("parquet-schema")},
    )
    blobs = [canaries.pickled("parquet-value")] * len(texts)
    pq.write_table(pa.table([pa.array(texts), pa.array(blobs)], schema=schema), path)


def poison_texts(directory: Path, canaries: Canaries) -> None:
    """Put pickles among a dataset's files, and into its cache."""
    array = np.empty(1, dtype=object)
    array[0] = Touch(canaries._new("array.npy"))
    np.save(directory / "array.npy", array, allow_pickle=True)
    for name in ("dataset_info.pkl", "state.pt", "data.bin"):
        (directory / name).write_bytes(canaries.pickled(f"texts-{name}"))
    for name in ("dataset.py", "torch.py"):
        (directory / name).write_text(canaries.code(f"texts-{name}"))
    cache = directory / ".cadapter-cache"
    cache.mkdir(exist_ok=True)
    (cache / "index.pkl").write_bytes(canaries.pickled("cache-index"))


def files_that_are_pickles(directory: Path, canaries: Canaries) -> list[Path]:
    """Datasets by their names, pickles by their bytes."""
    found = []
    for name in ("pickle.jsonl", "pickle.json", "pickle.parquet"):
        (directory / name).write_bytes(canaries.pickled(name))
        found.append(directory / name)
    (directory / "pickle.jsonl.gz").write_bytes(gzip.compress(canaries.pickled("pickle.jsonl.gz")))
    return [*found, directory / "pickle.jsonl.gz"]


def edit_json(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file; ``...`` removes one."""
    content = {**json.loads(file.read_text("utf-8")), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}), "utf-8")
