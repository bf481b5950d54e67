"""A trainer that is used for a while and left as it was."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

# Attributes that a generation batch writes into: it gets copies of them.
_COPIED = (
    "_diagnostics",
    "_extra_columns",
    "_logs",
    "_metrics",
    "_pending_extra_logs",
    "_pending_metrics",
    "state",
)
# Attributes that it replaces.
_REPLACED = (
    "_batch_environments",
    "_async_tool_dicts",
    "_forward_mode",
    "_last_loaded_step",
    "_rollout",
    "_signature_columns",
    "_sync_tool_dicts",
    "environments",
)


@contextmanager
def unchanged(trainer: Any) -> Iterator[None]:
    """Afterwards the trainer, its model's modes and the random numbers of this process are as before.

    What reward functions, tools and environments keep for themselves is not restored, nor what a vLLM engine draws.

    Args:
        trainer: an `SDPOTrainer`.
    """
    attributes = vars(trainer)
    names = [name for name in (*_COPIED, *_REPLACED) if name in attributes]
    missing = {*_COPIED, *_REPLACED} - {*names}
    saved = {name: attributes[name] for name in names}
    pool = getattr(trainer, "_environment_pool", {})
    instances = {name: list(each) for name, each in pool.items()}
    modes = [(module, module.training) for module in trainer.model.modules()]
    attributes.update({name: copy.deepcopy(saved[name]) for name in names if name in _COPIED})
    try:
        with _random_numbers(trainer.accelerator.device):
            yield
    finally:
        attributes.update(saved)
        for name in missing:
            attributes.pop(name, None)
        for name, each in instances.items():
            pool[name][:] = each
        for module, training in modes:
            module.training = training
        trainer._feedback.take(0)  # of a round that failed


@contextmanager
def _random_numbers(device: torch.device) -> Iterator[None]:
    """The generators of Python, NumPy and torch, on the CPU and on this device, continue where they were."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [] if device.type == "cpu" else [device]
    kind = "cuda" if device.type == "cpu" else device.type
    try:
        with torch.random.fork_rng(devices, device_type=kind):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
