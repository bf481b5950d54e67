"""What SDPO adds to a checkpoint of the Hugging Face Trainer, and which checkpoints can be resumed from.

All of it is in the folder `checkpoint-N/sdpo/`, because some tools load every `*.safetensors` beside a model's own:

* `teacher.safetensors`: the full teacher by parameter name; its metadata has the rule and the number of updates.
* `reference.safetensors`: likewise the weights that training began with, where `anchor_weight` needs them.
* `progress-R.safetensors`: the progress of process R within its generation batch (module `progress`).

The SDPO options are in `checkpoint-N/sdpo_config.json`, beside the model's (module `options`).

The Trainer writes `trainer_state.json` last. That file is removed before a folder is written again, so a folder is
complete exactly if the file can be parsed.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..teacher.store import TeacherStore

logger = logging.getLogger("sdpo_rl")

FOLDER = "sdpo"
TEACHER = "teacher.safetensors"
REFERENCE = "reference.safetensors"

_STATE = "trainer_state.json"
_ADAPTER = "adapter_config.json"
_MOST_NAMED = 8  # differences in one error message
# Of parameters that torch's optimizers can train; they refuse those of 8 bits.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_FIX = (
    "resume with the configuration of the checkpoint, or start the teacher again from the loaded student with "
    "SDPOConfig(teacher_on_resume='restart')"
)


Stores = Mapping[str, TeacherStore]  # by the names of their files


# --- folders ----------------------------------------------------------------------------------------------


class ResumePoint(NamedTuple):
    """Where a run begins; of a new run the defaults.

    Attributes:
        folder: the `resume_from_checkpoint` to pass on to the Trainer.
        epochs_done: complete passes over the data.
        stream_position: see `stream_position`; `None` for data with a length.
    """

    folder: Any = None
    epochs_done: int = 0
    stream_position: tuple[int, int] | None = None


def resume_point(choice: Any, output_dir: str | Path, *, has_length: bool) -> ResumePoint:
    """Where a run begins that was asked to resume from `choice`.

    Args:
        choice: as for `resolve`.
        output_dir: of the run.
        has_length: of the training data.

    Raises:
        ValueError: as `resolve`.
    """
    folder = resolve(choice, output_dir)
    if not isinstance(folder, str):
        return ResumePoint(folder)
    return ResumePoint(folder, epochs_done(folder), None if has_length else stream_position(folder))


def is_complete(folder: str | Path) -> bool:
    """Whether the Trainer finished writing the folder."""
    return _trainer_state(folder) is not None


def resolve(choice: Any, output_dir: str | Path) -> Any:
    """The `resume_from_checkpoint` to pass on to the Trainer: `True` becomes the last complete folder.

    Args:
        choice: a folder, `True`, or anything else, which is returned.
        output_dir: of the run.

    Raises:
        ValueError: the folder does not exist or is incomplete, or all checkpoints are.
    """
    if isinstance(choice, (str, os.PathLike)):
        folder = Path(choice)
        if not folder.is_dir():
            other = _last_complete(Path(output_dir))
            fix = (
                f"use {other}, the last complete one of this run"
                if other
                else f"{output_dir} has no complete checkpoint, start a new run"
            )
            raise ValueError(f"resume_from_checkpoint: expected a folder, got {str(choice)!r}; {fix}")
        if not is_complete(folder):
            raise ValueError(
                f"resume_from_checkpoint: {folder} is incomplete, the run ended while it was saved: its {_STATE}, "
                f"written last, is missing or truncated; {_instead(_last_complete(folder.resolve().parent))}"
            )
        return str(folder)
    folders = _checkpoints(Path(output_dir)) if choice is True else []
    for folder in folders:
        if is_complete(folder):
            return str(folder)
        logger.warning("Skipping %s: the run ended while it was saved.", folder)
    if folders:
        raise ValueError(
            f"resume_from_checkpoint: expected a complete checkpoint in {output_dir}, got none; {_instead(None)}"
        )
    return choice


def epochs_done(folder: str) -> int:
    """The number of complete passes over the data when the checkpoint was saved."""
    state = _trainer_state(folder)
    return 0 if state is None else int(state.get("epoch") or 0)


def stream_position(folder: str) -> tuple[int, int]:
    """Passes over data without a length, and optimizer steps in the current one, when the checkpoint was saved.

    The Trainer takes `max_steps` for the length of such a pass: its epoch is the passes, and a fraction of that.
    """
    state = _trainer_state(folder)
    epoch = 0.0 if state is None else state.get("epoch") or 0.0
    if state is None or epoch == 0.0:
        return 0, 0
    passes = math.ceil(epoch) - 1
    return passes, round((epoch - passes) * state["max_steps"])


def mark_incomplete(folder: str) -> None:
    """Make a folder that is written again incomplete until the Trainer has written its state."""
    (Path(folder) / _STATE).unlink(missing_ok=True)


@contextmanager
def trainable_dtypes_preserved(model: nn.Module) -> Iterator[None]:
    """Trainable parameters keep their dtype while a checkpoint is loaded; PEFT makes a bfloat16 adapter float32."""
    dtypes = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    yield
    for name, p in model.named_parameters():
        if p.dtype != dtypes.get(name, p.dtype):
            p.data = p.data.to(dtypes[name])


def load_adapter_among_others(folder: str, model: Any) -> None:
    """Load the trained adapter, which the Trainer skips if the folder has other adapters in subfolders.

    A model may have further adapters, a frozen copy of the first, for example; without this the student would start
    again.
    """
    if (Path(folder) / _ADAPTER).is_file() and any(Path(folder).glob(f"*/{_ADAPTER}")):
        model.load_adapter(folder, model.active_adapters[0], is_trainable=True)


def write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    save_file(dict(tensors), unfinished, metadata)
    os.replace(unfinished, path)


def _checkpoints(parent: Path) -> list[Path]:
    """The checkpoint folders, newest first."""
    folders = [path for path in parent.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(filter(Path.is_dir, folders), key=lambda path: int(path.name.split("-")[1]), reverse=True)


def _last_complete(parent: Path) -> Path | None:
    return next(filter(is_complete, _checkpoints(parent)), None)


def _trainer_state(folder: str | Path) -> dict[str, Any] | None:
    try:
        return json.loads((Path(folder) / _STATE).read_text())
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None


def _instead(folder: Path | None) -> str:
    return "start a new run" if folder is None else f"use {folder}, the last complete one beside it"


# --- the teacher ------------------------------------------------------------------------------------------


def stores(teacher: TeacherStore, start: TeacherStore | None) -> dict[str, TeacherStore]:
    """Teacher and start of training by the names of their files; without a start the teacher alone."""
    return {TEACHER: teacher} | ({} if start is None else {REFERENCE: start})


def save_teachers(folder: str, stores: Stores, model: nn.Module, *, writes: bool) -> None:
    """`save_teacher` of every store; every process must call this."""
    for name, store in stores.items():
        save_teacher(folder, store, model, writes=writes, name=name)


def check_teachers(folder: str, stores: Stores, model: nn.Module, *, prepared: bool) -> None:
    """`check_teacher` of every store."""
    for name, store in stores.items():
        check_teacher(folder, store, model, prepared=prepared, name=name)


def continue_teachers(folder: str, stores: Stores, model: nn.Module, *, on_resume: str) -> None:
    """Load every store from the checkpoint, or start it again, by `SDPOConfig.teacher_on_resume`."""
    for name, store in stores.items():
        if on_resume == "restart":
            store.restart(model)
        else:
            load_teacher(folder, store, model, name=name)


def save_teacher(
    folder: str, store: TeacherStore, model: nn.Module, *, writes: bool, name: str = TEACHER
) -> None:
    """Write the full teacher to a file from the process that `writes`; every process must call this."""
    tensors = store.full_state(model, keep=writes)
    if writes:
        about = {"rule": store.rule, "ticks": store.state.ticks}
        write(Path(folder) / FOLDER / name, tensors, {"format": "pt", "sdpo_teacher": json.dumps(about)})


def check_teacher(
    folder: str, store: TeacherStore, model: nn.Module, *, prepared: bool, name: str = TEACHER
) -> None:
    """Check that the checkpoint's teacher can replace the run's.

    Args:
        folder: of the checkpoint.
        store: the run's.
        model: the unwrapped model.
        prepared: whether the model was prepared for training. Until then its dtypes are not compared: Accelerate
            makes trainable parameters float32 for FSDP2, DeepSpeed bfloat16 with its bf16.
        name: of the file.

    Raises:
        ValueError: there is none, its file is damaged, or its rule, names, shapes or dtypes differ; each difference
            is named.
    """
    path = Path(folder) / FOLDER / name
    if not path.is_file():
        raise ValueError(
            f"{folder}: expected a {Path(name).stem} ({FOLDER}/{name}), got none; SDPOTrainer did not write it: "
            f"{_FIX}"
        )
    layout = store.layout(model)
    with _open(path) as file:
        rule, saved = _about(file)["rule"], set(file.keys())
        differences = [] if rule == store.rule else [f"its rule is {rule!r}, this run's {store.rule!r}"]
        differences += [f"it lacks {key!r}" for key in layout if key not in saved]
        differences += [
            f"it has {key!r}, which is not trainable here" for key in sorted(saved - layout.keys())
        ]
        for key in sorted(saved & layout.keys()):
            shape, dtype = layout[key]
            entry = file.get_slice(key)
            saved_shape, saved_dtype = tuple(entry.get_shape()), entry.get_dtype()
            saved_dtype = _DTYPES.get(saved_dtype, saved_dtype)
            if shape is not None and saved_shape != shape:
                differences.append(f"its {key!r} has shape {saved_shape}, not {shape}")
            if prepared and saved_dtype != dtype:
                differences.append(f"its {key!r} is {saved_dtype}, not {dtype}")
    if differences:
        more = len(differences) - _MOST_NAMED
        listed = "; ".join(differences[:_MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")
        raise ValueError(f"{folder}: expected this run's {FOLDER}/{name}, got another: {listed}; {_FIX}")


def load_teacher(folder: str, store: TeacherStore, model: nn.Module, *, name: str = TEACHER) -> None:
    """Load the checkpoint's teacher from a file, one tensor at a time, once the model was prepared for training.

    Raises:
        ValueError: as `check_teacher`.
    """
    check_teacher(folder, store, model, prepared=True, name=name)
    with _open(Path(folder) / FOLDER / name) as file:
        tensors = ((key, file.get_tensor(key)) for key in file.keys())  # noqa: SIM118 - no mapping
        store.load(model, tensors, ticks=_about(file)["ticks"])


def _open(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(
            f"{path}: expected a whole safetensors file, got a damaged one ({error}); resume from an earlier "
            "checkpoint, or set SDPOConfig(teacher_on_resume='restart')"
        ) from error


def _about(file: Any) -> dict[str, Any]:
    return json.loads(file.metadata()["sdpo_teacher"])
