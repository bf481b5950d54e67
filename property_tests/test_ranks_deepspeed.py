"""Two ranks under DeepSpeed do what one rank does without it; skipped where DeepSpeed is not installed.

DeepSpeed keeps the gradients to itself: what is compared is the loss of every step and, as steps of plain
gradient descent add them up, the student and the teacher afterwards.
"""

from __future__ import annotations

from typing import Any

import pytest
import rank_driver as driver
import torch

pytest.importorskip("deepspeed")

TOLERANCE = 1e-5
KINDS = [(stage, name) for stage in driver.DEEPSPEED for name in driver.DEEPSPEED_RUNS]


@pytest.fixture(scope="session")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("deepspeed")
    driver.launch(folder, "deepspeed")
    return {name: torch.load(folder / f"{name}.pt", weights_only=False) for name in ("1-0", "2-0", "2-1")}


@pytest.mark.parametrize(("stage", "name"), KINDS, ids=[f"{stage}: {name}" for stage, name in KINDS])
def test_deepspeed_trains_as_one_rank_does(seen: dict[str, Any], stage: str, name: str) -> None:
    expected = seen["1-0"]["ddp", name]
    for rank in ("2-0", "2-1"):
        run = seen[rank][stage, name]
        for metric in ("loss", "self_distillation/divergence", "self_distillation/teacher_distance"):
            ours, theirs = (
                [entry[metric] for entry in one["log"] if metric in entry] for one in (run, expected)
            )
            assert ours == pytest.approx(theirs, rel=TOLERANCE, abs=1e-9)
        for shown, wanted in zip(
            [*run["teacher"], run["student"]], [*expected["teacher"], expected["student"]], strict=True
        ):
            torch.testing.assert_close(shown, wanted, rtol=TOLERANCE, atol=TOLERANCE)
        assert run["student came back"]
