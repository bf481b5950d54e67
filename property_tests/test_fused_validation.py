"""Validation of the fused loss's arguments, and its choice of a chunk size."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fused_cases import HEAD_PARTS, make_case

import sdpo
from sdpo.fused import _plan

GIB = 2**30


def fitting(monkeypatch: pytest.MonkeyPatch, bytes_per_token: int, *, total: int = 80 * GIB) -> int:
    """The chunk size on a GPU with so much memory."""
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=total)
    )
    return _plan.fitting_chunk_size(bytes_per_token, torch.device("cuda"))


def test_a_chunk_fits_into_its_share_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    token = 8 * 152_064
    for total in (8 * GIB, 16 * GIB, 24 * GIB, 40 * GIB):
        size = fitting(monkeypatch, token, total=total)
        assert size * token <= total // 32
        assert (size + (128 if size < 768 else 768)) * token > total // 32


def test_a_chunk_size_does_not_follow_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the same inputs give the same bits whatever else is on the device."""
    for name in ("mem_get_info", "memory_reserved", "memory_allocated"):
        monkeypatch.delattr(torch.cuda, name)
    assert fitting(monkeypatch, 8 * 152_064) == 768


def test_a_chunk_has_whole_tiles_a_floor_and_a_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    for token in (1, 1000, 12_345, 999_999, 8 * 152_064):
        size = fitting(monkeypatch, token)
        assert size % 768 == 0
        assert size * token <= 2 * GIB
    assert fitting(monkeypatch, 1) == fitting(monkeypatch, 2) == 7680
    # A vocabulary wider than the budget is still computed, a token at a time; a few tokens are not rounded to none.
    assert fitting(monkeypatch, 2 * GIB) == 1
    assert fitting(monkeypatch, 2 * GIB, total=GIB) == 1
    assert fitting(monkeypatch, GIB // 400, total=8 * GIB) == 100


def test_a_cpu_is_not_asked_for_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cuda, "get_device_properties")
    assert _plan.fitting_chunk_size(2**20, torch.device("cpu")) == 96


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"k": 0}, ValueError, "k: expected"),
    ({"k": 65}, ValueError, r"k: expected .* min\(k, 64\)"),
    ({"k": 2.0}, TypeError, "k: expected"),
    ({"k": None}, TypeError, "k: expected an int, got None .*; pass a number of tokens"),
    ({"tail": None}, TypeError, r"tail: expected one of \('bucket', 'renormalize'\), got None"),
    ({"support": "teacher", "k": None}, TypeError, "k: expected an int, got None"),
    (
        {"support": "full", "k": 64},
        ValueError,
        "k: expected None with support='full', got 64; only the top-K",
    ),
    (
        {"support": "full", "tail": "bucket"},
        ValueError,
        "tail: expected None with support='full', got 'bucket'",
    ),
    ({"support": "sampled", "k": 1, "alpha": 1.0}, ValueError, "k: expected None with support='sampled'"),
    ({"support": "sampled"}, ValueError, "alpha: expected 1 with support='sampled', got 0.5"),
    ({"support": "both"}, ValueError, "support: expected"),
    ({"alpha": 1.5}, ValueError, "alpha: expected"),
    ({"tail": "none"}, ValueError, "tail: expected"),
    ({"temperature": 0.0}, ValueError, "temperature: expected"),
    # Of an infinite number the logits are NaN, or all equal.
    ({"temperature": math.inf}, ValueError, r"temperature: expected a number in \(0, inf\), got inf"),
    ({"softcap": math.inf}, ValueError, r"softcap: expected a number in \(0, inf\), got inf"),
    ({"logit_scale": math.inf}, ValueError, r"logit_scale: expected a number in \(0, inf\), got inf"),
    ({"is_clip": -1.0}, ValueError, "is_clip: expected"),
    ({"is_clip": None}, ValueError, "is_clip: expected together with old_log_probs, got None; pass both"),
    (
        {"old_log_probs": None},
        ValueError,
        "old_log_probs: expected together with is_clip, got None; pass both",
    ),
    ({"softcap": 0.0}, ValueError, "softcap: expected"),
    ({"chunk_size": 0}, ValueError, "chunk_size: expected"),
    ({"backend": "cuda"}, ValueError, "backend: expected"),
    ({"backend": "triton"}, ValueError, "backend: expected"),
    ({"reduction": "mean"}, ValueError, "reduction: expected"),
    ({"trust_region_coef": 0.5}, ValueError, "reference: expected together with trust_region_coef"),
    (
        {"reference_hidden": torch.zeros(9, 17)},
        ValueError,
        "trust_region_coef: expected together with reference",
    ),
    ({"tokens": torch.zeros(9)}, TypeError, "tokens: expected"),
    ({"loss_mask": torch.ones(9)}, TypeError, "loss_mask: expected"),
    ({"loss_mask": torch.ones(8, dtype=torch.bool)}, ValueError, "loss_mask: expected"),
    ({"old_log_probs": torch.zeros(8)}, ValueError, "old_log_probs: expected shape"),
    ({"weights": torch.zeros(9, 1)}, ValueError, "weights: expected"),
    ({"weights": torch.full((9,), -1.0)}, ValueError, "weights: expected finite numbers >= 0.*got -1.0"),
    ({"weights": torch.full((9,), torch.nan)}, ValueError, "weights: expected finite numbers >= 0.*got nan"),
    ({"student_hidden": torch.zeros(9, 16)}, ValueError, "student.hidden: expected"),
    ({"teacher_weight": torch.zeros(65, 17)}, ValueError, "teacher.weight: expected"),
    ({"student_weight": torch.zeros(64)}, ValueError, "student.weight: expected"),
    ({"student_weight": torch.zeros(0, 17)}, ValueError, "student.weight: expected"),
    ({"student_bias": torch.zeros(63)}, ValueError, "student.bias: expected"),
    ({"teacher_bias": torch.zeros(64, dtype=torch.long)}, TypeError, "teacher.bias: expected"),
    ({"tokens": torch.full((9,), 64)}, ValueError, r"tokens: expected ids in \[0, 64\).* got 64; mask"),
    ({"tokens": torch.full((9,), -100)}, ValueError, "tokens: .* got -100; mask"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=str)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    case = make_case(20, n=9, v=64)
    with pytest.raises(error, match=message):
        case.with_(**change).fused()


@pytest.mark.parametrize("model", ["student", "teacher", "reference"])
def test_a_head_is_an_lm_head(model: str) -> None:
    case = make_case(20, n=9, v=64, trust_region_coef=0.5)
    arguments = case.with_(reference_hidden=case.tensors["teacher_hidden"]).arguments()
    arguments[model] = tuple(arguments[model])
    with pytest.raises(TypeError, match=rf"{model}: expected an LMHead, got tuple; pass sdpo\.LMHead"):
        sdpo.fused_distillation_loss(**arguments)


@pytest.mark.parametrize(
    ("weight", "fix"),
    [(torch.nn.Linear(4, 64), r"pass its `.weight`"), ([[1.0]], "wrap it in torch.as_tensor")],
)
def test_a_weight_is_a_tensor(weight: Any, fix: str) -> None:
    arguments = make_case(20, n=9, v=64).arguments()
    arguments["student"] = arguments["student"]._replace(weight=weight)
    with pytest.raises(TypeError, match=f"student.weight: expected a tensor .*; {fix}"):
        sdpo.fused_distillation_loss(**arguments)


def test_ids_of_masked_tokens_may_be_anything() -> None:
    case = make_case(20, n=9, v=64)
    marked = case.tensors["tokens"].masked_fill(~case.tensors["loss_mask"], -100)
    assert torch.equal(case.with_(tokens=marked).fused().total, case.fused().total)


@pytest.mark.parametrize("name", [*make_case().tensors, "reference_hidden", "reference_weight"])
def test_a_tensor_on_another_device_is_named(name: str) -> None:
    """A meta tensor holds no numbers: torch's product with one has whatever the memory contained."""
    case = make_case(23, n=9, v=64, trust_region_coef=0.5)
    case = case.with_(
        reference_hidden=case.tensors["teacher_hidden"], reference_weight=case.tensors["teacher_weight"]
    )
    moved = case.with_(**{name: case.tensors[name].to("meta")})
    model, _, part = name.partition("_")
    argument = f"{model}.{part}" if part in HEAD_PARTS else name
    # The student's hidden states define the device: the next tensor is the one that differs.
    argument, here, there = (
        ("student.weight", "meta", "cpu") if name == "student_hidden" else (argument, "cpu", "meta")
    )
    message = (
        rf"{argument}: expected a tensor on {here} .*got one on {there}; move it with `\.to\('{here}'\)`"
    )
    with pytest.raises(ValueError, match=message):
        moved.fused()
