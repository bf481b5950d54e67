"""Where a run stands between two optimizer steps, as far as a resumed run needs it to repeat every number.

A generation batch may feed several optimizer steps. Its micro-batches, TRL's count of them and the metrics not
logged yet are in no checkpoint of TRL's. Kept here, in one file per rank:

* tensors: the generation batch, if it is not used up, in the smallest integers that hold it; the sums behind
  the metrics of the steps not logged yet.
* JSON: TRL's count of micro-batches, the values TRL has gathered but not logged, the Trainer's running loss,
  what the diagnostics have seen, and the batch sizes under which all this means anything.

The random generators are the Trainer's to save. The table of completions is not kept: it fills again with the
next generation batch.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .checkpoint import FOLDER, write

logger = logging.getLogger("sdpo_rl")

Batch = dict[str, Any]

_SUMS = "sums/"
_SMALLER = (torch.uint8, torch.int16, torch.int32)
# The Trainer's running loss: a tensor, a float and the step they count from.
_LOSS = ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged")


def save(folder: str, trainer: Any) -> None:
    """Write this rank's progress."""
    tensors = {_SUMS + name: pair.cpu() for name, pair in trainer._sums["train"].state().items()}
    batches = None
    if trainer._step % _generate_every(trainer) and trainer._buffered_inputs is not None:
        packed = _pack(trainer._buffered_inputs)
        if packed is not None:
            batches = packed[0]
            tensors |= packed[1]
    progress = {
        "schedule": _schedule(trainer),
        "step": trainer._step,
        "batches": batches,
        "loss": {name: float(getattr(trainer, name)) for name in _LOSS if hasattr(trainer, name)},
        "metrics": trainer._metrics["train"],
        "diagnostics": trainer._diagnostics.state(),
    }
    write(_path(folder, trainer), tensors, {"sdpo_progress": json.dumps(progress, default=float)})


def load(folder: str, trainer: Any) -> None:
    """Take up this rank's progress, or say why the generation batch begins anew."""
    path = _path(folder, trainer)
    if not path.is_file():
        logger.warning("%s is missing; the generation batch and its metrics begin anew.", path)
        return
    device = trainer.accelerator.device
    with safe_open(path, "pt") as file:
        progress = json.loads(file.metadata()["sdpo_progress"])
        tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118 - no mapping
    then, now = progress["schedule"], _schedule(trainer)
    if then != now:
        changed = ", ".join(
            f"{name} {then.get(name)} -> {now[name]}" for name in now if then.get(name) != now[name]
        )
        logger.warning(
            "Since %s was saved: %s. The generation batch and its metrics begin anew.", folder, changed
        )
        return
    trainer._step = progress["step"]
    trainer._generations_done = trainer._step // _generate_every(trainer)
    if progress["batches"] is not None:
        trainer._buffered_inputs = _unpack(progress["batches"], tensors)
    for name in _LOSS:
        if name in progress["loss"] and hasattr(trainer, name):
            kept, value = getattr(trainer, name), progress["loss"][name]
            setattr(trainer, name, kept.new_tensor(value) if isinstance(kept, Tensor) else type(kept)(value))
    trainer._metrics["train"].update(progress["metrics"])
    trainer._sums["train"].load_state(
        {name.removeprefix(_SUMS): pair for name, pair in tensors.items() if name.startswith(_SUMS)}
    )
    trainer._diagnostics.load_state(progress["diagnostics"])


def _path(folder: str, trainer: Any) -> Path:
    return Path(folder) / FOLDER / f"progress-{trainer.accelerator.process_index}.safetensors"


def _generate_every(trainer: Any) -> int:
    return trainer.args.steps_per_generation * trainer.num_iterations


def _schedule(trainer: Any) -> dict[str, int]:
    """What decides which rows a micro-batch holds."""
    args = trainer.args
    return {
        "world_size": trainer.accelerator.num_processes,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "steps_per_generation": args.steps_per_generation,
        "num_iterations": trainer.num_iterations,
        "num_generations": trainer.num_generations,
    }


def _pack(batches: Sequence[Batch]) -> tuple[list[Batch], dict[str, Tensor]] | None:
    """Batches as JSON, in which a tensor is its dtype and stands under `batch/key` among the tensors."""
    written: list[Batch] = []
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
                    "%r of the generation batch is a %s, which a checkpoint does not keep; a run resumed from here "
                    "samples this generation batch again.",
                    key,
                    type(value).__name__,
                )
                return None
        written.append(entry)
    return written, tensors


def _unpack(written: Sequence[Batch], tensors: Mapping[str, Tensor]) -> list[Batch]:
    return [
        {
            key: tensors[f"{index}/{key}"].to(getattr(torch, kept["dtype"]))
            if "dtype" in kept
            else kept["value"]
            for key, kept in entry.items()
        }
        for index, entry in enumerate(written)
    ]


def _smallest(tensor: Tensor) -> Tensor:
    """The same numbers in memory of their own, integers in the smallest dtype that holds them."""
    if tensor.dtype in (torch.int64, torch.int32) and tensor.numel():
        low, high = (int(end) for end in tensor.aminmax())
        for dtype in _SMALLER:
            if torch.iinfo(dtype).min <= low and high <= torch.iinfo(dtype).max:
                return tensor.to(dtype, copy=True).contiguous()
    return tensor.clone(memory_format=torch.contiguous_format)
