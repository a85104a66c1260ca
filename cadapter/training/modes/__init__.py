"""The ways to train a model: Control Adapters, LoRA, full fine-tuning."""

from __future__ import annotations

from cadapter.adapters.lora_targets import match_model
from cadapter.config import Config
from cadapter.config.layers import parse_layers
from cadapter.models.checkpoint import resolve_model
from cadapter.models.loading import DTYPES, CausalLM
from cadapter.training.modes.base import Mode
from cadapter.training.modes.control import ControlMode, control_settings
from cadapter.training.modes.full import FullMode
from cadapter.training.modes.lora import LoraMode, lora_settings


def mode_of(config: Config, model: CausalLM) -> Mode:
    """How ``config`` trains ``model``.

    Raises:
        UsageError: it names layers or modules that the model does not have.
    """
    layers = parse_layers(config.layers_to_transform, model.layer_count)
    if config.full_fine_tune:
        chosen = None if config.layers_to_transform is None else layers
        companions, gradient_dtype = resolve_model(config.model_dir), DTYPES[config.gradient_dtype]
        return FullMode(model, chosen, config.target_modules, companions, config.dtype, gradient_dtype)
    decay = config.lora_weight_decay
    if config.use_control_adapters:
        return ControlMode(
            model, layers, control_settings(config), config.seed, decay, config.control_gamma, config.model_dir
        )
    settings = lora_settings(config)
    blocks = [model.skeleton_block(index) for index in range(model.layer_count)]
    targets = match_model(blocks, layers, settings.targets, settings.dropout, model.four_bit)
    return LoraMode(model, targets, settings, config.seed, decay, config.model_dir)
