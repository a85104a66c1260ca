"""Offline work on tensors: adapters to LoRA directories, and merging into a model. Imports no training code."""
