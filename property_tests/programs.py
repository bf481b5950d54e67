"""Runs a program of the repository in a subprocess."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def run(folder: Path, *command: str) -> str:
    """The output of `python *command` on a CPU, with `folder` as working directory."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "adapters", EXAMPLES / "benchmarks"))),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


# On a machine under load, a thread of gloo can still hold a tensor of Python when the interpreter ends, even after
# a barrier: DistributedDataParallel keeps gloo's threads alive after `destroy_process_group`.
GLOO_AT_EXIT = "terminate called without an active exception"


def launch(folder: Path, processes: int, *command: str, tries: int = 3) -> str:
    """The output of `python *command` on several processes, started again where gloo aborts one at its end."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    try:
        return run(folder, *torchrun, *command)
    except AssertionError as error:
        if GLOO_AT_EXIT not in str(error) or tries == 1:
            raise
        return launch(folder, processes, *command, tries=tries - 1)
