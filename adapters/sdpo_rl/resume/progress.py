"""The state of a run between two optimizer steps that a resumed run needs to repeat every number.

A generation batch may feed several optimizer steps. TRL's checkpoints contain neither its micro-batches, nor their
count, nor the metrics that are not logged yet. These are saved here, in one file per process:

* tensors: the generation batch, if it is not used up, in the smallest integers that hold it; the sums of the
  metrics that are not logged yet.
* JSON in the metadata: the rest of `RunState`.

The Trainer saves the random generators. The table of completions is not saved: it fills again with the next
generation batch.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..teacher import shards
from .checkpoint import FOLDER, write

logger = logging.getLogger("sdpo_rl")

Batch = dict[str, Any]

# The Trainer's loss since the last log: a tensor, a float and the step they count from.
RUNNING_LOSS = ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged")
# The step that `train_loss` is a mean from, which newer releases of transformers set to that of the checkpoint. The
# total is that of the whole run.
_FIRST_STEP = "_initial_global_step"

_SUMS = "sums/"
_SMALL_DTYPES = (torch.uint8, torch.int16, torch.int32)


@dataclass
class RunState:
    """What is saved of one process.

    Attributes:
        schedule: what decides which rows a micro-batch contains, by name; with another the state cannot be used.
        step: micro-batches so far, TRL's count.
        student_moved: whether an optimizer step had a signal since the last generation batch that ended.
        batches: the micro-batches of the generation batch; `None` if it is used up.
        running_loss: the Trainer's loss since the last log, by attribute.
        metrics: values that TRL has gathered but not logged, by name.
        sums: sum and weight [2] of metrics that are not logged yet, by name.
        diagnostics: what the diagnostics have seen, for JSON.
        rollout_texts: of the generation batch, for JSON; empty without `SDPOConfig.credit_rows`.
    """

    schedule: dict[str, int]
    step: int
    student_moved: bool
    batches: Sequence[Batch] | None
    running_loss: dict[str, float]
    metrics: dict[str, list[float]]
    sums: dict[str, Tensor]
    diagnostics: dict[str, Any]
    rollout_texts: list[dict[str, Any]]


def save(folder: str, state: RunState, *, process: int) -> None:
    """Write one process's state.

    Args:
        folder: of the checkpoint.
        state: what to save.
        process: its index.
    """
    tensors = {_SUMS + name: pair.cpu() for name, pair in state.sums.items()}
    packed = None if state.batches is None else _pack(state.batches)
    if packed is not None:
        tensors |= packed[1]
    progress = {
        "schedule": state.schedule,
        "step": state.step,
        "student_moved": state.student_moved,
        "batches": None if packed is None else packed[0],
        "loss": state.running_loss,
        "metrics": state.metrics,
        "diagnostics": state.diagnostics,
        "rollout_texts": state.rollout_texts,
    }
    write(_path(folder, process), tensors, {"sdpo_progress": json.dumps(progress, default=float)})


def load(folder: str, *, process: int, schedule: Mapping[str, int], device: torch.device) -> RunState | None:
    """One process's state; `None`, with a warning, where the generation batch must start again.

    It starts again on all processes or on none, since they generate together; all of them must call this.

    Args:
        folder: of the checkpoint.
        process: its index.
        schedule: this run's.
        device: of the tensors.
    """
    found = _read(folder, process, schedule, device)
    if shards.any_rank(isinstance(found, str), device):
        problem = found if isinstance(found, str) else f"Another process cannot continue {folder}"
        logger.warning("%s; the generation batch and its metrics start again.", problem)
        return None
    assert isinstance(found, RunState)
    return found


def _read(folder: str, process: int, schedule: Mapping[str, int], device: torch.device) -> RunState | str:
    """One process's state, or why there is none."""
    path = _path(folder, process)
    if not path.is_file():
        return f"{path} is missing"
    try:
        with safe_open(path, "pt") as file:
            progress = json.loads(file.metadata()["sdpo_progress"])
            tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        return f"{path} is damaged ({error})"
    saved = progress["schedule"]
    if saved != schedule:
        changes = ", ".join(
            f"{name} {saved.get(name)} -> {value}"
            for name, value in schedule.items()
            if saved.get(name) != value
        )
        return f"Since {folder} was saved: {changes}"
    return RunState(
        schedule=saved,
        step=progress["step"],
        student_moved=progress["student_moved"],
        batches=None if progress["batches"] is None else _unpack(progress["batches"], tensors),
        running_loss=progress["loss"],
        metrics=progress["metrics"],
        sums={n.removeprefix(_SUMS): pair for n, pair in tensors.items() if n.startswith(_SUMS)},
        diagnostics=progress["diagnostics"],
        rollout_texts=progress["rollout_texts"],
    )


def running_loss(trainer: Any) -> dict[str, float]:
    """The Trainer's loss since the last log, by attribute, as far as it has begun."""
    names = (*RUNNING_LOSS, _FIRST_STEP)
    return {name: float(getattr(trainer, name)) for name in names if hasattr(trainer, name)}


def set_running_loss(trainer: Any, values: Mapping[str, float]) -> None:
    """Continue from what `running_loss` returned."""
    for name in (*RUNNING_LOSS, _FIRST_STEP):
        if name in values and hasattr(trainer, name):
            value, old = values[name], getattr(trainer, name)
            setattr(trainer, name, old.new_tensor(value) if isinstance(old, Tensor) else type(old)(value))


def _path(folder: str, process: int) -> Path:
    return Path(folder) / FOLDER / f"progress-{process}.safetensors"


def _pack(batches: Sequence[Batch]) -> tuple[list[Batch], dict[str, Tensor]] | None:
    """Batches as JSON, a tensor as its dtype, and the tensors by `batch/key`; `None` if a value cannot be saved."""
    entries: list[Batch] = []
    tensors: dict[str, Tensor] = {}
    for index, batch in enumerate(batches):
        entry: Batch = {}
        for key, value in batch.items():
            if isinstance(value, Tensor):
                tensors[f"{index}/{key}"] = _smallest(value.detach().cpu())
                entry[key] = {"dtype": str(value.dtype).removeprefix("torch.")}
            elif value is None or isinstance(value, (bool, int, float, str)):
                entry[key] = {"value": value}
            else:
                logger.warning(
                    "%r of the generation batch is a %s, which cannot be saved; a run resumed from here samples "
                    "this generation batch again.",
                    key,
                    type(value).__name__,
                )
                return None
        entries.append(entry)
    return entries, tensors


def _unpack(entries: Sequence[Batch], tensors: Mapping[str, Tensor]) -> list[Batch]:
    """The batches that `_pack` was given."""
    return [
        {
            key: tensors[f"{index}/{key}"].to(getattr(torch, packed["dtype"]))
            if "dtype" in packed
            else packed["value"]
            for key, packed in entry.items()
        }
        for index, entry in enumerate(entries)
    ]


def _smallest(tensor: Tensor) -> Tensor:
    """A copy with the same numbers, integers in the smallest dtype that holds them."""
    if tensor.dtype in (torch.int64, torch.int32) and tensor.numel():
        low, high = (int(end) for end in tensor.aminmax())
        for dtype in _SMALL_DTYPES:
            if torch.iinfo(dtype).min <= low and high <= torch.iinfo(dtype).max:
                return tensor.to(dtype, copy=True).contiguous()
    return tensor.clone(memory_format=torch.contiguous_format)
