"""The files of a run that the report reads: one JSON object a line, in the order they were written.

* `sdpo_log.jsonl`: the options of the run, every entry of its log, and every warning, each with its step.
* `sdpo_credit.jsonl`: the rows of `SDPOConfig(credit_rows=...)`, at most `CREDIT_LIMIT` bytes.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

LOG, CREDIT = "sdpo_log.jsonl", "sdpo_credit.jsonl"
CREDIT_LIMIT = 16 * 2**20  # bytes
logger = logging.getLogger("sdpo_rl")

# What rows that are thinned out leave, so that not every later row rewrites the file.
_THINNED = 0.75

Entry = dict[str, Any]


class RunLog:
    """Writes the log of a run while it trains; a file that cannot be written is a warning and ends the log.

    Args:
        folder: of the run.
        writes: whether this process does.
    """

    def __init__(self, folder: str | Path, *, writes: bool) -> None:
        self._path = Path(folder) / LOG
        self._writes = writes
        self._began = False

    def begin(self, step: int, *, options: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> None:
        """Start new files, or continue those of the run that is resumed after `step`: the log, and the rows.

        The files of an earlier run are kept under other names.

        Args:
            step: optimizer steps before the checkpoint; 0 starts again.
            options: of the run, by name.
            history: what the checkpoint knows of the log, for a folder without one.
        """
        self._began = True
        if not self._writes:
            return
        try:
            self._start(step, options, history)
        except OSError as error:
            self._stop(step, error)

    def _start(self, step: int, options: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> None:
        for path in (self._path, self._path.with_name(CREDIT)):
            if step and path.is_file():
                keep_until(path, step)
            else:
                set_aside(path)
        if not self._path.is_file():
            append(self._path, history)
        append(self._path, [{"step": step, "options": options}])

    def add(self, step: int, logs: Mapping[str, Any], warnings: Mapping[str, str]) -> None:
        """An entry of the log and the warnings since the last, by name; nothing before training begins."""
        if self._writes and self._began:
            entries: list[Mapping[str, Any]] = [{**logs, "step": step}]
            entries += [{"step": step, "warning": name, "message": text} for name, text in warnings.items()]
            try:
                append(self._path, entries)
            except OSError as error:
                self._stop(step, error)

    def _stop(self, step: int, error: OSError) -> None:
        self._writes = False  # a later entry would follow what there is of this one
        warn_of_end(self._path, step, error)


def warn_of_end(path: Path, step: int, error: Exception) -> None:
    """Warn that a file of the report cannot be written further; the run goes on.

    Args:
        path: the file.
        step: the optimizer step that it does not have.
        error: why.
    """
    logger.warning(
        "%s ends before step %d, and so does the report of this run: it cannot be written (%s). Free space or "
        "correct the permissions, and resume from a checkpoint, to have the rest.",
        path,
        step,
        error,
    )


def set_aside(path: Path) -> None:
    """Rename a file of an earlier run, `x.jsonl`, to the first free name of `x.1.jsonl`, `x.2.jsonl`, ..."""
    if path.is_file():
        names = (path.with_suffix(f".{number}{path.suffix}") for number in itertools.count(1))
        path.rename(next(name for name in names if not name.exists()))


def append(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Add lines to a file, which is made if it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="ascii") as file:
        file.writelines(map(_line, entries))


def append_bounded(path: Path, entries: Sequence[Entry], *, limit: int = CREDIT_LIMIT) -> None:
    """Add lines to a file that never has more than `limit` bytes.

    Where they do not fit, steps are left out until the file has three quarters of that: each time the one whose
    neighbours are closest, so that what stays is spread over the run; never the first and the last.

    Args:
        path: the file, made if it does not exist.
        entries: lines, each with its `step`.
        limit: bytes.
    """
    size = path.stat().st_size if path.is_file() else 0
    if size + sum(len(_line(entry)) for entry in entries) <= limit:
        append(path, entries)
        return
    lines = [(entry["step"], _line(entry)) for entry in [*(read(path) if size else []), *entries]]
    by_step: dict[int, list[str]] = {}
    for step, line in lines:
        by_step.setdefault(step, []).append(line)
    sizes = {step: sum(map(len, texts)) for step, texts in by_step.items()}
    steps, total = sorted(sizes), sum(sizes.values())
    while total > _THINNED * limit and len(steps) > 2:
        index = min(range(1, len(steps) - 1), key=lambda i: steps[i + 1] - steps[i - 1])
        total -= sizes[steps.pop(index)]
    kept: list[str] = []
    left = limit
    for line in (line for step in reversed(steps) for line in reversed(by_step[step])):
        if len(line) <= left:
            kept.append(line)
            left -= len(line)
    _replace(path, reversed(kept))


def keep_until(path: Path, step: int) -> None:
    """Remove the entries after a step, which a run that is resumed there writes again."""
    _replace(path, (_line(entry) for entry in read(path) if entry["step"] <= step))


def read(path: Path) -> list[Entry]:
    """The entries of a file; a last line that a killed run left unfinished is not one.

    Raises:
        ValueError: another line is not a JSON object with a `step`.
    """
    entries = []
    # A byte that is no text makes its line no JSON, or is shown as such.
    text = path.read_text(encoding="utf-8", errors="backslashreplace")
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            entry = json.loads(line)
            if not isinstance(entry["step"], int) or ("warning" in entry and "message" not in entry):
                raise TypeError
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path}, line {number}: expected a JSON object with a step, got {line[:60]!r}; remove the line"
            ) from error
        entries.append(entry)
    return entries


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(_plain(entry), allow_nan=False, separators=(",", ":")) + "\n"


def _plain(value: Any) -> Any:
    """A value that JSON has: no infinite number, and the text of what it does not know."""
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else str(value)


def _replace(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text("".join(lines), encoding="ascii")
    os.replace(unfinished, path)
