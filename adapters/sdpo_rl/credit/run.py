"""A run's folder as the report reads it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from . import files

_STATE = "trainer_state.json"


class Warned(NamedTuple):
    """A warning of the run."""

    step: int
    name: str
    message: str


class State(NamedTuple):
    """What the report reads of a state that the Trainer saved."""

    step: int
    history: list[dict[str, Any]]


class Run(NamedTuple):
    """What a run left.

    Args:
        name: of its folder.
        options: the SDPO options by name; empty where the run wrote none.
        history: the entries of its log, in order.
        warnings: those of its monitors.
        rows: those of `SDPOConfig(credit_rows=...)`.
    """

    name: str
    options: dict[str, Any]
    history: list[dict[str, Any]]
    warnings: list[Warned]
    rows: list[dict[str, Any]]


def read_run(folder: Path) -> Run:
    """Everything in a run's folder that the report shows.

    The log is `sdpo_log.jsonl`; a run without one, of GRPO for example, has its history in the `trainer_state.json`
    of its last checkpoint.

    Args:
        folder: the `output_dir` of the run.

    Raises:
        ValueError: no folder, nothing of a run in it, or a file that is not what a run writes.
    """
    if not folder.is_dir():
        raise ValueError(f"RUN_DIR: expected the output_dir of a run, got {str(folder)!r}; pass a folder")
    log, credit = folder / files.LOG, folder / files.CREDIT
    entries = files.read(log) if log.is_file() else _trainer_history(folder)
    rows = files.read(credit) if credit.is_file() else []
    if not entries and not rows:
        raise ValueError(
            f"RUN_DIR: expected {files.LOG}, or a checkpoint with {_STATE}, in {str(folder)!r}, got neither; pass "
            "the output_dir of a run that has logged"
        )
    options = [entry["options"] for entry in entries if "options" in entry]
    return Run(
        name=folder.resolve().name,
        options=options[-1] if options else {},
        history=[entry for entry in entries if not {"options", "warning"} & entry.keys()],
        warnings=[
            Warned(entry["step"], entry["warning"], entry["message"])
            for entry in entries
            if "warning" in entry
        ],
        rows=rows,
    )


def _trainer_history(folder: Path) -> list[dict[str, Any]]:
    """The history of the last state that the Trainer saved; empty without one."""
    return max(_trainer_states(folder), key=lambda state: state.step, default=State(0, [])).history


def _trainer_states(folder: Path) -> Iterator[State]:
    checkpoints = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for path in (each / _STATE for each in [folder, *checkpoints]):
        if not path.is_file():
            continue
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError):  # the run ended while it wrote this
            continue
        try:
            found = State(state["global_step"], state["log_history"])
            complete = all(isinstance(entry["step"], int) for entry in found.history)
        except (TypeError, KeyError):
            complete = False
        if not complete:
            raise ValueError(
                f"{path}: expected global_step, and log_history with a step in each entry, as the Trainer writes "
                "them; remove the file"
            )
        yield found
