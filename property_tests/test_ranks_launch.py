"""The launch files in examples/accelerate are what Accelerate reads, and the script runs on two ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "accelerate"
KINDS = {
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "zero2": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
}


def test_every_file_is_named_in_the_script() -> None:
    commands = (FOLDER / "train.py").read_text()
    files = sorted(file.stem for file in FOLDER.glob("*.yaml"))
    assert files == sorted(KINDS)
    assert all(f"examples/accelerate/{name}.yaml" in commands for name in files)


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_every_file(name: str) -> None:
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert config.distributed_type == KINDS[name]
    assert config.num_processes == 2
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    if name.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(name[-1])


def test_the_script_runs_on_two_ranks(tmp_path: Path) -> None:
    run = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *(str(FOLDER / "train.py"), "--steps", "2", "--rows", "16", "--output", str(tmp_path)),
        ],
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'adapters'}",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert "on 2 ranks: reward" in run.stdout
