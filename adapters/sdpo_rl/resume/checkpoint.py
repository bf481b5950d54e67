"""What a checkpoint of the Hugging Face Trainer gains from SDPO, and when one may be resumed from.

Everything of ours lies in `checkpoint-N/sdpo/`, because some tools read every `*.safetensors` next to a
model's own:

* `teacher.safetensors`: the whole teacher by parameter name; its metadata hold rule and tick count.
* `progress-R.safetensors`: where rank R stands within its generation batch (module `progress`).

The Trainer writes a folder in place and `trainer_state.json` last, before it deletes an older checkpoint. That
file is removed before a folder is written again, so a folder is complete exactly if the file is whole.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..teacher.store import TeacherStore

logger = logging.getLogger("sdpo_rl")

FOLDER = "sdpo"
TEACHER = "teacher.safetensors"

_STATE = "trainer_state.json"
_ADAPTER = "adapter_config.json"
_NAMED = 8
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16}
_WAY_OUT = (
    "Resume with what the checkpoint was made with, or begin the teacher again from the resumed student with "
    "SDPOConfig(teacher_on_resume='restart')"
)


# --- folders ----------------------------------------------------------------------------------------------


def is_complete(folder: str | Path) -> bool:
    """Whether the Trainer finished writing the folder."""
    return _trainer_state(folder) is not None


def resolve(choice: Any, output_dir: str | Path) -> Any:
    """`resume_from_checkpoint` as the Trainer should get it: `True` becomes the last complete folder.

    Raises:
        ValueError: the chosen folder does not exist, or it, or every one there is, was not finished.
    """
    if isinstance(choice, (str, os.PathLike)):
        chosen = Path(choice)
        if not chosen.is_dir():
            other = next(filter(is_complete, _checkpoints(Path(output_dir))), None)
            known = (
                f"{output_dir} holds no complete checkpoint"
                if other is None
                else f"the last complete one of this run is {other}"
            )
            raise ValueError(f"resume_from_checkpoint={str(choice)!r} is no folder; {known}")
        if not is_complete(chosen):
            other = next(filter(is_complete, _checkpoints(chosen.resolve().parent)), None)
            raise ValueError(
                f"{chosen} is incomplete: its {_STATE}, which is written last, is missing or cut short, so the "
                f"run ended while it was being saved. {_instead(other)}"
            )
        return str(chosen)
    folders = _checkpoints(Path(output_dir)) if choice is True else []
    for folder in folders:
        if is_complete(folder):
            return str(folder)
        logger.warning("Skipping %s: the run ended while it was being saved.", folder)
    if folders:
        raise ValueError(f"no checkpoint in {output_dir} is complete. {_instead(None)}")
    return choice


def epochs_done(folder: str) -> int:
    """How often the run had gone through its data."""
    state = _trainer_state(folder)
    return 0 if state is None else int(state.get("epoch") or 0)


def begin(folder: str) -> None:
    """Make a folder that is written again incomplete, until the Trainer has written its state."""
    (Path(folder) / _STATE).unlink(missing_ok=True)


@contextmanager
def dtypes_kept(model: nn.Module) -> Iterator[None]:
    """What trains keeps its dtype while a checkpoint is loaded; PEFT makes a bfloat16 adapter float32."""
    dtypes = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    yield
    for name, p in model.named_parameters():
        if p.dtype != dtypes.get(name, p.dtype):
            p.data = p.data.to(dtypes[name])


def load_adapter_beside_others(folder: str, model: Any) -> None:
    """Load the trained adapter, which the Trainer passes over where other adapters lie in subfolders.

    A model may carry further adapters, a frozen copy of its first one, say; its student would start again.
    """
    if (Path(folder) / _ADAPTER).is_file() and any(Path(folder).glob(f"*/{_ADAPTER}")):
        model.load_adapter(folder, model.active_adapters[0], is_trainable=True)


def write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    save_file(dict(tensors), unfinished, metadata)
    os.replace(unfinished, path)


def _checkpoints(parent: Path) -> list[Path]:
    """The checkpoint folders, newest first."""
    found = [path for path in parent.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(filter(Path.is_dir, found), key=lambda path: int(path.name.split("-")[1]), reverse=True)


def _trainer_state(folder: str | Path) -> dict[str, Any] | None:
    try:
        return json.loads((Path(folder) / _STATE).read_text())
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None


def _instead(folder: Path | None) -> str:
    return "Start afresh" if folder is None else f"The last complete one beside it is {folder}"


# --- the teacher ------------------------------------------------------------------------------------------


def save_teacher(folder: str, store: TeacherStore, model: nn.Module, *, writes: bool) -> None:
    """Write the whole teacher from the rank that `writes`; every rank takes part."""
    tensors = store.full_state(model, keep=writes)
    if writes:
        about = {"rule": store.rule, "ticks": store.state.ticks}
        write(Path(folder) / FOLDER / TEACHER, tensors, {"format": "pt", "sdpo_teacher": json.dumps(about)})


def check_teacher(folder: str, store: TeacherStore, model: nn.Module) -> None:
    """The checkpoint's teacher could take the place of the run's.

    Raises:
        ValueError: there is none, or its rule, names, shapes or dtypes are others; each difference is named.
    """
    path = Path(folder) / FOLDER / TEACHER
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no teacher ({FOLDER}/{TEACHER}); SDPOTrainer did not write it. {_WAY_OUT}"
        )
    layout = store.layout(model)
    with safe_open(path, "pt") as file:
        rule, saved = _about(file)["rule"], set(file.keys())
        differences = [] if rule == store.rule else [f"its rule is {rule!r}, this run's {store.rule!r}"]
        differences += [f"it lacks {name!r}" for name in layout if name not in saved]
        differences += [
            f"it has {name!r}, which does not train here" for name in sorted(saved - layout.keys())
        ]
        for name in sorted(saved & layout.keys()):
            shape, dtype = layout[name]
            entry = file.get_slice(name)
            found_shape, found_dtype = tuple(entry.get_shape()), _DTYPES.get(entry.get_dtype())
            if shape is not None and found_shape != shape:
                differences.append(f"its {name!r} has shape {found_shape}, not {shape}")
            if found_dtype != dtype:
                differences.append(f"its {name!r} is {found_dtype}, not {dtype}")
    if differences:
        more = len(differences) - _NAMED
        listed = "; ".join(differences[:_NAMED]) + (f"; and {more} more" if more > 0 else "")
        raise ValueError(f"the teacher in {folder} is not this run's: {listed}. {_WAY_OUT}")


def load_teacher(folder: str, store: TeacherStore, model: nn.Module) -> None:
    """Take up the checkpoint's teacher, reading one tensor at a time.

    Raises:
        ValueError: as `check_teacher`.
    """
    check_teacher(folder, store, model)
    with safe_open(Path(folder) / FOLDER / TEACHER, "pt") as file:
        tensors = ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118 - no mapping
        store.load(model, tensors, ticks=_about(file)["ticks"])


def _about(file: Any) -> dict[str, Any]:
    return json.loads(file.metadata()["sdpo_teacher"])
