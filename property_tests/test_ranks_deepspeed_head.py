"""Under DeepSpeed ZeRO-3 the fused loss has the gradients of the loss from whole logits, without whole logits.

Skipped where DeepSpeed is not installed. Two ranks under ZeRO-3 are compared with one rank without it that computes
whole logits. DeepSpeed keeps the gradients to itself: a step of plain gradient descent shows them.
"""

from __future__ import annotations

from typing import Any

import pytest
import rank_driver as driver
import rank_head_observations as head
import torch

pytest.importorskip("deepspeed")

TOLERANCE = 1e-5


@pytest.fixture(scope="session")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("head")
    driver.launch(folder, "zero3", "rank_head_observations.py")
    return {name: torch.load(folder / f"{name}.pt", weights_only=False) for name in ("1-0", "2-0", "2-1")}


@pytest.mark.parametrize("name", head.RUNS)
def test_the_fused_loss_has_the_gradients_of_whole_logits(seen: dict[str, Any], name: str) -> None:
    expected = seen["1-0"][name]
    for rank in ("2-0", "2-1"):
        run = seen[rank][name]
        assert run["loss"] == pytest.approx(expected["loss"], rel=TOLERANCE)
        for ours, theirs in zip(run["gradients"], expected["gradients"], strict=True):
            assert ours.keys() == theirs.keys()
            for parameter, gradient in theirs.items():
                assert gradient.abs().max() > 10 * TOLERANCE
                torch.testing.assert_close(ours[parameter], gradient, rtol=TOLERANCE, atol=TOLERANCE)


def test_weights_of_16_bits_have_the_loss_of_32(seen: dict[str, Any]) -> None:
    for rank in ("2-0", "2-1"):
        assert seen[rank]["bfloat16"]["weights"] == {torch.bfloat16}
        assert seen[rank]["bfloat16"]["loss"] == pytest.approx(seen["1-0"]["bfloat16"]["loss"], rel=0.05)


@pytest.mark.parametrize("name", head.BFLOAT16)
def test_weights_of_32_bits_are_rounded_to_16_before_training(seen: dict[str, Any], name: str) -> None:
    """As docs/many-gpus.md says; if DeepSpeed keeps them, the page changes."""
    given = seen["1-0"][name]["begin"]
    for rank in ("2-0", "2-1"):
        begin = seen[rank][name]["begin"]
        assert begin.keys() == given.keys()
        for parameter, tensor in given.items():
            assert begin[parameter].dtype == torch.float32
            assert torch.equal(begin[parameter], tensor.bfloat16().float())
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in given.values())


@pytest.mark.parametrize("name", [*head.RUNS, "bfloat16"])
def test_no_tensor_has_the_logits_of_more_than_a_chunk(seen: dict[str, Any], name: str) -> None:
    for rank in ("2-0", "2-1"):
        assert seen[rank][name]["logits"] <= head.CHUNK


def test_the_count_finds_whole_logits(seen: dict[str, Any]) -> None:
    for rank in ("2-0", "2-1"):
        assert seen[rank]["whole logits"]["logits"] > 4 * head.CHUNK


def test_deepspeed_refuses_the_checkpoint_of_another_number_of_ranks(seen: dict[str, Any]) -> None:
    """As docs/many-gpus.md says; if it learns to, the page changes."""
    assert "world size" in seen["2-0"]["other number"]
    assert seen["2-1"]["other number"] != "resumed"
