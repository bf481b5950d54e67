"""Accelerate reads the launch files in examples/accelerate, and the script runs on two ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from programs import EXAMPLES, launch
from trl import GRPOConfig

FOLDER = EXAMPLES / "accelerate"
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


def test_zero3_gathers_the_model_for_generation_unless_told_otherwise() -> None:
    """As docs/many-gpus.md says."""
    fields = {field.name: field for field in dataclasses.fields(GRPOConfig)}
    option = fields["ds3_gather_for_generation"]
    assert option.default is True
    assert "single GPU" in option.metadata["help"]


def test_the_script_runs_on_two_ranks(tmp_path: Path) -> None:
    command = (str(FOLDER / "train.py"), "--steps", "2", "--rows", "16", "--output", str(tmp_path))
    printed = launch(tmp_path, 2, *command)
    assert "on 2 ranks: reward" in printed
