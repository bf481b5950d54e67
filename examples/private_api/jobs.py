"""Runs of `train.py` as processes: several on a device at a time, under a time limit.

A module of `run.py`; nothing to run.
"""

from __future__ import annotations

import multiprocessing
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from checks import read_record
from curves import Run, one_line

SECONDS_TO_STOP = 10.0

Train = Callable[[Sequence[str]], None]


@dataclass(frozen=True)
class Job:
    """One run of `train.py`."""

    arm: str  # as the question calls it, which may not be the name in the record
    seed: int
    record: Path
    arguments: tuple[str, ...]
    length: int = 1  # its samples, as a multiple of those of others
    memory: float = 1.0  # of its device, as a multiple of that of most others
    expected: Mapping[str, Any] = field(default_factory=dict)  # values that a record at this path must have


def check_records(todo: Sequence[Job]) -> None:
    """Refuse records of other runs at the paths of these: a complete one would be shown as the result of a job.

    Args:
        todo: the runs; `expected` of each is compared with its record, complete or not.

    Raises:
        ValueError: a file has another value or is no record; the message has a line for each such file.
    """
    found = []
    for job in todo:
        try:
            record = read_record(job.record)
        except ValueError as error:
            found.append(str(error))
            continue
        if record is not None and (differences := _differences(record, job)):
            found.append(
                f"{job.record}: expected a record of {'; of '.join(differences)}; pass another --output, or remove "
                "the file"
            )
    if found:
        raise ValueError("\n".join(found))


def _differences(record: Run, job: Job) -> list[str]:
    """What a record has other than expected; of settings only those that differ."""
    differences = []
    for name, value in job.expected.items():
        got = _points(record) if name == "points" else record.get(name)
        if got == value:
            continue
        if isinstance(value, dict) and isinstance(got, dict):
            names = [key for key in {**value, **got} if key not in value or value[key] != got.get(key, ...)]
            value, got = ({key: of[key] for key in names if key in of} for of in (value, got))
        multiple = f" ({job.length} times --samples)" if name == "samples" and job.length > 1 else ""
        differences.append(f"{name} {value!r}{multiple}, got {got!r}")
    return differences


def _points(record: Run) -> int | None:
    """The number of points that a run was to have, which only its command says."""
    words = shlex.split(record.get("command", ""))
    return int(words[words.index("--points") + 1]) if "--points" in words else None


def run_all(
    todo: Sequence[Job],
    train: Train,
    *,
    devices: Sequence[str | None],
    per_device: int,
    minutes: float | None,
) -> int:
    """Make the runs whose records are not complete, longest first.

    Args:
        todo: the runs.
        train: called in a process of its own with the arguments of a job.
        devices: numbers of GPUs; `None`: what is visible.
        per_device: runs of memory 1 at a time on each.
        minutes: after which none starts, and those that run are stopped; `None`: no limit.

    Returns:
        The number of runs that failed.
    """
    deadline = time.monotonic() + (60 * minutes if minutes is not None else float("inf"))
    threads = max(1, (os.cpu_count() or 1) // (per_device * len(devices)))
    waiting = sorted(todo, key=lambda job: -job.length)
    running: dict[BaseProcess, tuple[Job, str | None]] = {}
    failures = 0

    def free(device: str | None) -> float:
        return per_device - sum(job.memory for job, place in running.values() if place == device)

    try:
        while waiting or running:
            for job in list(waiting):
                place = max(devices, key=free)
                is_complete = (known := read_record(job.record)) is not None and known["complete"]
                if is_complete or time.monotonic() >= deadline:
                    waiting.remove(job)
                    report(job)
                elif free(place) >= min(job.memory, per_device):
                    waiting.remove(job)
                    with _without_sigterm():
                        running[start(job, train, place, threads)] = (job, place)
                else:
                    break  # a smaller one that passed it would delay it
            if running:
                seconds = min(max(0.0, deadline - time.monotonic()), 60.0)  # an infinite one overflows
                wait([process.sentinel for process in running], seconds)
            if time.monotonic() >= deadline:
                stop(running)
            for process in [process for process in running if process.exitcode is not None]:
                job, _ = running.pop(process)
                failed = process.exitcode != 0 or read_record(job.record) is None
                failed = failed and time.monotonic() < deadline
                failures += failed
                report(job, failed=failed)
    finally:
        stop(running)  # after an interrupt or SIGTERM, for example
    return failures


@contextmanager
def _without_sigterm() -> Iterator[None]:
    """Let SIGTERM wait, in a program without other threads, while a process is not yet among those to stop."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start(job: Job, train: Train, device: str | None, threads: int) -> BaseProcess:
    """Start a run, as a fork where that is possible: its imports are done, which take longer than many steps."""
    # CUDA does not work in a fork of a process that has used it.
    can_fork = sys.platform == "linux" and not torch.cuda.is_initialized()
    process = multiprocessing.get_context("fork" if can_fork else "spawn").Process(
        target=_run, args=(job, train, device, threads)
    )
    process.start()
    return process


def _run(job: Job, train: Train, device: str | None, threads: int) -> None:
    if sys.platform != "win32":  # the mask and the handler are those of the process that started this one
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    job.record.parent.mkdir(parents=True, exist_ok=True)
    log = log_of(job).open("w", buffering=1)
    for descriptor in (1, 2):  # programs that it starts write to these, not to `sys.stdout`
        os.dup2(log.fileno(), descriptor)
    sys.stdout = sys.stderr = log
    train(job.arguments)


def stop(running: Iterable[BaseProcess]) -> None:
    """End runs; their records stay as the last evaluation left them."""
    for process in running:
        process.terminate()
    for process in running:
        process.join(SECONDS_TO_STOP)
        if process.exitcode is None:
            process.kill()
            process.join()


def log_of(job: Job) -> Path:
    """What a run prints."""
    return job.record.with_suffix(".log")


def report(job: Job, *, failed: bool = False) -> None:
    """Print the result of a run."""
    record = read_record(job.record)
    if failed:
        print(
            f"{job.arm}, seed {job.seed}: failed\n{log_of(job).read_text()[-2000:]}",
            file=sys.stderr,
            flush=True,
        )
    elif record is None:
        print(f"{job.arm}, seed {job.seed}: no time left", flush=True)
    else:
        print(one_line({**record, "arm": job.arm}), flush=True)
