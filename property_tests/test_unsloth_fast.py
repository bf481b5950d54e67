"""SDPO steps over FastLanguageModel, against plain transformers, and every layout of its rows against rows alone.

The runs are those of test_unsloth_sdpo.py; on a CPU Unsloth's kernels run in Triton's interpreter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import unsloth_driver as driver
import unsloth_layouts
from test_unsloth_sdpo import MAX_SEQ_LENGTH, RUNS, TOLERANCE, differences, long_remark, record, sdpo_trainer

pytestmark = pytest.mark.skipif(driver.missing() is not None, reason=str(driver.missing()))


def observe(
    runs: list[str], device: str = "cpu", micro_batches: int | None = None
) -> dict[str, list[dict[str, Any]]]:
    """In the fresh process: each run, and its first micro-batches by every layout."""
    seen = {}
    for name in runs:
        changes, options, _ = RUNS[name]
        trainer = sdpo_trainer(changes, options, fast=True, device=device)
        seen[name] = unsloth_layouts.watch(trainer, micro_batches)
        record(trainer, Path(f"{name}.pt"))
    return seen


def check_layouts(seen: list[dict[str, Any]], *, tolerance: float) -> None:
    """Loss and gradient are those of rows alone, also where packed rows exceed `max_seq_length`."""
    shown = unsloth_layouts.summary(seen)
    print(shown)
    assert {tuple(each["layout"]) for each in seen} == {("packed", "")}, shown
    one_call = [each["teacher_positions"] for each in seen if each["teacher_forwards"] == 1]
    assert max(one_call) > MAX_SEQ_LENGTH, shown
    gaps = [gap for each in seen for layout in each["gaps"].values() for gap in layout.values()]
    assert max(gaps) < tolerance, shown


@pytest.mark.parametrize(
    "wrong",
    [
        {"layout": ["groups", "a row's hidden states change"]},
        {"teacher_positions": MAX_SEQ_LENGTH},
        {"gaps": {"packed": {"loss": 0.0, "gradient": 1e-3}}},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_the_check_of_layouts_detects(wrong: dict[str, Any]) -> None:
    right: dict[str, Any] = {
        "layout": ["packed", ""],
        "teacher_forwards": 1,
        "teacher_positions": MAX_SEQ_LENGTH + 1,
        "gaps": {"packed": {"loss": 0.0, "gradient": 1e-7}},
        "attention": {"packed": ["training packed float32 sdpa: _training_sdpa"]},
    }
    check_layouts([right], tolerance=TOLERANCE)
    with pytest.raises(AssertionError, match="micro-batch 0"):
        check_layouts([right | wrong], tolerance=TOLERANCE)


def test_a_run_with_a_shortened_reprompt_is_refused(tmp_path: Path) -> None:
    torch.save({"shortened": 0.375}, tmp_path / "run.pt")
    with pytest.raises(AssertionError, match="shortens no reprompt"):
        differences(tmp_path / "run.pt", RUNS["two passes"][2])


@pytest.mark.slow
def test_a_step_equals_plain_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "remark", long_remark)
    name = "two passes"
    # In the interpreter a layout takes half a minute.
    seen = driver.run(
        "test_unsloth_fast:observe", tmp_path, interpreter=True, timeout=1200, runs=[name], micro_batches=1
    )
    difference = differences(tmp_path / f"{name}.pt", RUNS[name][2])
    assert difference.gradient < TOLERANCE
    assert difference.loss < TOLERANCE
    check_layouts(seen[name], tolerance=TOLERANCE)
