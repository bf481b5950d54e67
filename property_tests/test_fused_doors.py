"""What the fused loss refuses, and how many tokens it takes at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fused_cases import make_case

from sdpo.fused import _plan

GIB = 2**30


def fitting(
    monkeypatch: pytest.MonkeyPatch, bytes_per_row: int, *, free: int, reserved: int = 0, allocated: int = 0
) -> int:
    """Rows of a chunk on a GPU of which so much memory is free or held by the allocator."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated)
    return _plan._rows_that_fit(bytes_per_row, torch.device("cuda"))


def test_a_chunk_fits_into_a_quarter_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    row = 8 * 152_064
    for free in (GIB // 4, GIB, 4 * GIB):
        rows = fitting(monkeypatch, row, free=free)
        assert rows * row <= free // 4
        assert (rows + (128 if rows < 768 else 768)) * row > free // 4
    # What the allocator holds unused is free as well, what it has given away is not.
    held = fitting(monkeypatch, row, free=0, reserved=3 * GIB, allocated=2 * GIB)
    assert held == fitting(monkeypatch, row, free=GIB)
    assert held > fitting(monkeypatch, row, free=GIB // 2)


def test_a_chunk_has_whole_tiles_a_floor_and_a_ceiling(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for row in (1, 1000, 12_345, 999_999, 8 * 152_064):
        rows = fitting(monkeypatch, row, free=64 * GIB)
        assert rows % 768 == 0
        assert rows * row <= 2 * GIB
    assert fitting(monkeypatch, 1, free=64 * GIB) == fitting(monkeypatch, 2, free=64 * GIB) == 7680
    # A vocabulary wider than the budget is still computed, a row at a time; a few rows are not rounded to none.
    assert fitting(monkeypatch, 2 * GIB, free=GIB) == 1
    assert fitting(monkeypatch, 2 * GIB, free=0) == 1
    assert fitting(monkeypatch, GIB // 400, free=GIB) == 100


def test_a_cpu_is_not_asked_for_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mem_get_info", "memory_reserved", "memory_allocated"):
        monkeypatch.delattr(torch.cuda, name)
    assert _plan._rows_that_fit(2**20, torch.device("cpu")) == 96


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"k": 0}, ValueError, "k"),
    ({"k": 65}, ValueError, "k"),
    ({"k": 2.0}, TypeError, "k"),
    ({"alpha": 1.5}, ValueError, "alpha"),
    ({"tail": "none"}, ValueError, "tail"),
    ({"support": "both"}, ValueError, "support"),
    ({"support": "sampled"}, ValueError, "support"),
    ({"temperature": 0.0}, ValueError, "temperature"),
    ({"is_clip": -1.0}, ValueError, "is_clip"),
    ({"softcap": 0.0}, ValueError, "softcap"),
    ({"chunk_size": 0}, ValueError, "chunk_size"),
    ({"backend": "cuda"}, ValueError, "backend"),
    ({"backend": "triton"}, ValueError, "backend"),
    ({"reduction": "mean"}, ValueError, "reduction"),
    ({"trust_region_coef": 0.5}, ValueError, "reference_hidden"),
    ({"tokens": torch.zeros(9)}, TypeError, "tokens"),
    ({"loss_mask": torch.ones(9)}, TypeError, "loss_mask"),
    ({"loss_mask": torch.ones(8, dtype=torch.bool)}, ValueError, "loss_mask"),
    ({"old_log_probs": torch.zeros(8)}, ValueError, "old_log_probs"),
    ({"extra_weights": torch.zeros(9, 1)}, ValueError, "extra_weights"),
    ({"student_hidden": torch.zeros(9, 16)}, ValueError, "student_hidden"),
    ({"teacher_head": torch.zeros(65, 17)}, ValueError, "teacher_head"),
    ({"student_head": torch.zeros(64)}, ValueError, "student_head"),
    ({"student_bias": torch.zeros(63)}, ValueError, "student_bias"),
    ({"tokens": torch.full((9,), 64)}, ValueError, r"tokens: expected ids in \[0, 64\).* got 64; mask"),
    ({"tokens": torch.full((9,), -100)}, ValueError, "tokens: .* got -100; mask"),
]


@pytest.mark.parametrize(("change", "error", "name"), BAD, ids=str)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], name: str) -> None:
    case = make_case(20, n=9, v=64)
    with pytest.raises(error, match=name):
        case.with_(**change).fused()


def test_ids_of_masked_tokens_may_be_anything() -> None:
    case = make_case(20, n=9, v=64)
    marked = case.tensors["tokens"].masked_fill(~case.tensors["loss_mask"], -100)
    assert torch.equal(case.with_(tokens=marked).fused().total, case.fused().total)


@pytest.mark.parametrize("name", [*make_case().tensors, "reference_hidden", "reference_head"])
def test_a_tensor_on_another_device_is_named(name: str) -> None:
    """A meta tensor holds no numbers: torch's product with one is made of whatever the memory held."""
    case = make_case(23, n=9, v=64, trust_region_coef=0.5)
    case = case.with_(
        reference_hidden=case.tensors["teacher_hidden"], reference_head=case.tensors["teacher_head"]
    )
    moved = case.with_(**{name: case.tensors[name].to("meta")})
    # The student's hidden states say where the call is: it is the next tensor that is elsewhere.
    named, here, there = (
        ("student_head", "meta", "cpu") if name == "student_hidden" else (name, "cpu", "meta")
    )
    message = rf"{named}: expected a tensor on {here} .*got one on {there}; move it with `\.to\('{here}'\)`"
    with pytest.raises(ValueError, match=message):
        moved.fused()
