"""The record of a run: what it is, the log of its steps, and how it is written.

A module of `train.py`; nothing to run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import trl
from arms import Arm
from curves import JUDGED, model_name

import sdpo_rl

LOGGED_STEPS = 200  # of a record that does not keep every step: of a longer run it has every second, third, …
# Metrics of each step that a record keeps: what shows whether a run learns, and whether it is about to collapse.
LOGGED = (
    "reward",
    "completions/mean_length",
    "completions/clipped_ratio",
    "grad_norm",
    "self_distillation/divergence",
    "self_distillation/student_entropy",
    "self_distillation/teacher_entropy",
    "self_distillation/sampled_token_agreement",
    "self_distillation/success_sample_fraction",
    "self_distillation/reprompt_sample_fraction",
    "self_distillation/teacher_distance",
    "self_distillation/answer_in_feedback_fraction",
    "self_distillation/reprompt_text_fraction",
    "self_distillation/step_without_signal",
)


def log_columns(log: Sequence[dict[str, float]], *, every_step: bool) -> dict[str, list[float | None]]:
    """The log by metric, with `None` where a step did not have it; of a long one every second, third, … step.

    Args:
        log: the metrics of each step.
        every_step: keep all, however many.

    Examples:
        >>> log_columns([{"step": 1, "reward": 0.0}, {"step": 2, "reward": 0.5}], every_step=False)
        {'step': [1, 2], 'reward': [0.0, 0.5]}
    """
    kept = log if every_step else log[:: -(-len(log) // LOGGED_STEPS) or 1]
    names = [name for name in ("step", *LOGGED) if any(name in entry for entry in kept)]
    return {name: [entry.get(name) for entry in kept] for name in names}


def write(path: Path, record: dict[str, Any]) -> None:
    """Write a record at once: a reader, or a run that is stopped, finds the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(record, ensure_ascii=False) + "\n")
    os.replace(unfinished, path)


def description(options: argparse.Namespace, arm: Arm) -> dict[str, Any]:
    """What a record says about its run before it starts."""
    model = model_name(options.model)
    command = ["python", "examples/private_api/train.py", "--model", model, "--task", options.task]
    command += ["--question", options.question, "--arm", arm.name, "--seed", str(options.seed)]
    command += ["--samples", str(options.samples), "--points", str(options.points)]
    command += ["--every-step"] if options.every_step else []
    command += ["--sampling", options.sampling] if options.sampling != "generate" else []
    return {
        "task": options.task,
        "question": options.question,
        "arm": arm.name,
        **arm.recorded(),
        "seed": options.seed,
        "samples": options.samples * arm.length,
        "command": shlex.join([*command, "--output", "FILE"]),
        "model": model,
        "weights_sha256": weights_hash(Path(options.model)),
        "accuracy": JUDGED,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "python": platform.python_version(),
        "versions": {
            module.__name__: module.__version__ for module in (torch, transformers, trl, peft, sdpo_rl)
        },
    }


def weights_hash(folder: Path) -> str | None:
    """SHA-256 of a model folder's weights; `None` for a hub id."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()
