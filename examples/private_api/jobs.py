"""Runs of `train.py` as processes: several on a device at a time, under a time limit.

A module of `run.py`; nothing to run.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from curves import Run, one_line

TRAIN = Path(__file__).with_name("train.py")
SECONDS_TO_STOP = 10.0


@dataclass(frozen=True)
class Job:
    """One run of `train.py`."""

    arm: str  # as the question calls it, which may not be the name in the record
    seed: int
    record: Path
    arguments: tuple[str, ...]
    length: int = 1  # its samples, as a multiple of those of others


def read(path: Path) -> Run | None:
    """A record, also of a run that was stopped; `None` without one."""
    return json.loads(path.read_text()) if path.exists() else None


def run_one(job: Job, device: str | None, threads: int, deadline: float) -> str | None:
    """Run `train.py` unless its record is complete.

    Args:
        job: the run.
        device: number of its GPU; `None`: what is visible.
        threads: of the CPU.
        deadline: when to stop, by `time.monotonic`.

    Returns:
        The end of its output if it failed.
    """
    if (known := read(job.record)) is not None and known["complete"]:
        return None
    if time.monotonic() >= deadline:
        return None
    job.record.parent.mkdir(parents=True, exist_ok=True)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    log = job.record.with_suffix(".log")
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, str(TRAIN), *job.arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            stop(process)
            return None
        finally:
            if process.poll() is None:  # an interrupt, for example
                stop(process)
    return None if process.returncode == 0 else log.read_text()[-2000:]


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a run; its record stays as the last evaluation left it."""
    process.terminate()
    try:
        process.wait(SECONDS_TO_STOP)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def run_all(
    todo: Sequence[Job], *, devices: Sequence[str | None], per_device: int, minutes: float | None
) -> int:
    """Run jobs, longest first.

    Args:
        todo: the runs.
        devices: numbers of GPUs; `None`: what is visible.
        per_device: runs at a time on each.
        minutes: after which none starts, and those that run are stopped; `None`: no limit.

    Returns:
        The number of runs that failed.
    """
    deadline = time.monotonic() + (60 * minutes if minutes is not None else float("inf"))
    places: queue.Queue[str | None] = queue.Queue()
    for _ in range(per_device):
        for device in devices:
            places.put(device)
    threads = max(1, (os.cpu_count() or 1) // places.qsize())

    def at_a_place(job: Job) -> bool:
        device = places.get()
        try:
            error = run_one(job, device, threads, deadline)
        finally:
            places.put(device)
        record = read(job.record)
        if error is not None:
            print(f"{job.arm}, seed {job.seed}: failed\n{error}", file=sys.stderr, flush=True)
        elif record is None:
            print(f"{job.arm}, seed {job.seed}: no time left", flush=True)
        else:
            print(one_line({**record, "arm": job.arm}), flush=True)
        return error is not None

    with ThreadPoolExecutor(places.qsize()) as pool:
        return sum(pool.map(at_a_place, sorted(todo, key=lambda job: -job.length)))
