"""LoRAs for tiny models, made and merged by PEFT itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from cadapter.convert.gguf import GgufSummary, OutType, lay_out, write_gguf


def linear_layers(base: Path, head: bool = False) -> list[str]:
    """Last parts of the names of all linear layers of the model in ``base``."""
    model = AutoModelForCausalLM.from_pretrained(base)
    names = {name.rpartition(".")[2] for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)}
    return sorted(names if head else names - {"lm_head"})


def save_lora(base: Path, directory: Path, size: float = 0.3, **settings: Any) -> Path:
    """Let PEFT save a random LoRA of the model in ``base``; both factors have entries of ``size``.

    The config gets ``settings`` as they are given: PEFT writes lists of names in any order.
    """
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **{"r": 4, **settings})
    )
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(size * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory, save_embedding_layers=False)  # pairs only, also of a head
    file = directory / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return directory


def to_gguf(
    lora: Path, output: Path, outtype: OutType = "f32", base: Path | None = None, force: bool = False
) -> GgufSummary:
    """What the command does, without printing."""
    return write_gguf(lay_out(lora, str(base) if base else None), output, outtype, force)


def merged_model(base: Path, lora: Path) -> Any:
    """The model in ``base`` with the LoRA in its weights, as PEFT merges it."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), lora).merge_and_unload()


def changes(base: Path, lora: Path) -> dict[str, Tensor]:
    """What the LoRA adds to which tensors of the model, by their names in memory; all others stay as they are."""
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    after = merged_model(base, lora).state_dict()
    assert before.keys() == after.keys()
    return {name: after[name] - before[name] for name in before if not torch.equal(before[name], after[name])}
