"""DeepSpeed's engine gathers the weights that were written last, and the benchmark lets go of it after a run.

Skipped where DeepSpeed is not installed.
"""

from __future__ import annotations

from typing import Any

import pytest
import rank_driver as driver
import torch

pytest.importorskip("deepspeed")

RANKS = ("2-0", "2-1")


@pytest.fixture(scope="session")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("engine")
    driver.launch(folder, "deepspeed", "rank_engine_observations.py")
    return {name: torch.load(folder / f"{name}.pt", weights_only=False) for name in RANKS}


def test_the_next_forward_waits_for_what_was_written_to_partitions(seen: dict[str, Any]) -> None:
    """Otherwise the student's forward may gather the teacher's weights, and the teacher's the student's."""
    for rank in RANKS:
        late, plain = seen[rank]["late writes"], seen[rank]["plain"]
        assert late["loss"] == plain["loss"]
        for model in ("student", "teacher"):
            assert any(shard.numel() for shard in plain[model].values())
            assert all(torch.equal(late[model][name], shard) for name, shard in plain[model].items())


@pytest.mark.parametrize("stage", driver.DEEPSPEED)
def test_a_run_of_the_benchmark_leaves_nothing_of_the_engine(seen: dict[str, Any], stage: str) -> None:
    """By itself DeepSpeed leaves all of it but the teacher, which is not its own."""
    for rank in RANKS:
        assert seen[rank]["freed", stage] == {"kept": {"engine", "optimizer", "weight"}, "freed": set()}
