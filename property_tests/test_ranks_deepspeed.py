"""Two ranks under DeepSpeed train as one rank without it, also after an interruption.

Skipped where DeepSpeed is not installed. It keeps the gradients to itself: what is compared is the loss of every
step and, as steps of plain gradient descent add them up, the student and the teacher afterwards.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import rank_driver as driver
import tiny
import torch
from peft import PeftModel
from rank_observations import fixed_batch
from transformers import AutoModelForCausalLM

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


@pytest.mark.parametrize("stage", driver.DEEPSPEED)
def test_a_step_without_signal_changes_nothing_within_the_engine(seen: dict[str, Any], stage: str) -> None:
    """DeepSpeed steps in its backward pass; the second of three steps has a signal, on the first rank alone."""
    for rank in ("2-0", "2-1"):
        run = seen[rank][stage, "steps without signal around one with"]
        first, second, third = run["steps"]
        assert any(not torch.equal(first["own"][name], shard) for name, shard in second["own"].items())
        assert [step["ticks"] for step in run["steps"]] == [0, 1, 1]
        assert len(second["moments"]) > 0
        for one, other in (
            (second["own"].values(), third["own"].values()),
            (second["averaged"].values(), third["averaged"].values()),
            (second["moments"], third["moments"]),
        ):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --- checkpoints ------------------------------------------------------------------------------------------


def differences(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    """The parts in which two runs differ in any bit, except times."""
    logs = [
        [{name: value for name, value in line.items() if name != "step_time"} for line in run["log"]]
        for run in (one, other)
    ]
    differing = {
        part
        for part in ("student", "teacher", "optimizer")
        if not all(torch.equal(a, b) for a, b in zip(one[part], other[part], strict=True))
    }
    return differing | ({"log"} if logs[0] != logs[1] else set())


@pytest.mark.parametrize("adapter", ["", "lora"], ids=["full", "lora"])
@pytest.mark.parametrize("stage", driver.DEEPSPEED)
def test_a_run_interrupted_while_deepspeed_saves_resumes_from_the_previous_checkpoint(
    seen: dict[str, Any], stage: str, adapter: str
) -> None:
    """The previous checkpoint is within a generation batch, the incomplete one has a part of DeepSpeed's files."""
    for rank in ("2-0", "2-1"):
        run = seen[rank]["resume", stage, adapter]
        assert {"global_step5", "sdpo"} < set(run["left"])
        assert "trainer_state.json" not in run["left"]
        assert len(run["whole"]["log"]) == 5
        assert len(run["whole"]["optimizer"]) > 0
        assert not torch.equal(run["whole"]["student"][:, :-1], run["whole"]["teacher"][0])
        assert differences(run["whole"], run["resumed"]) == set()


@pytest.mark.parametrize("forgotten", ["teacher", "optimizer", "progress"])
@pytest.mark.parametrize("stage", driver.DEEPSPEED)
def test_the_comparison_detects_what_is_forgotten(seen: dict[str, Any], stage: str, forgotten: str) -> None:
    """Two steps after the counter-example went wrong, nothing is what it was."""
    for rank in ("2-0", "2-1"):
        run = seen[rank]["resume", stage, ""]
        everything = {"student", "teacher", "optimizer", "log"}
        assert differences(run["whole"], run["without", forgotten]) == everything


@pytest.mark.parametrize("adapter", ["", "lora"], ids=["full", "lora"])
@pytest.mark.parametrize("stage", driver.DEEPSPEED)
def test_what_is_saved_is_a_plain_model(seen: dict[str, Any], stage: str, adapter: str) -> None:
    run = seen["2-0"]["resume", stage, adapter]
    whole = Path(run["folder"]) / "whole"
    for folder in (whole / "saved", whole / "checkpoint-5"):
        if adapter:
            model: Any = PeftModel.from_pretrained(tiny.model(), folder)
        else:
            model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
            assert not any(report.values())
        with torch.no_grad():
            shown = model.eval()(**fixed_batch(model)).logits
        torch.testing.assert_close(shown, run["whole"]["student"], rtol=TOLERANCE, atol=TOLERANCE)
        name = "adapter_model.safetensors" if adapter else "model.safetensors"
        assert [path.name for path in folder.glob("*.safetensors")] == [name]
    assert [path.name for path in (whole / "saved").rglob("*sdpo*")] == ["sdpo_config.json"]
