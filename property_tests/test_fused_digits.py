"""The accuracy of the fused loss with 16-bit gradients and inputs, on a CPU with stand-ins for a GPU's products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fused_cases import (
    Case,
    bf16_length_errors,
    certain_student_error,
    hidden_nan_share,
    make_case,
    relative_error,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sdpo.fused import _chunks, _matmul, _torch
from sdpo.fused._matmul import split_k

SUPPORTS = pytest.mark.parametrize("objective", [{"k": 100}, {"support": "full"}], ids=str)


@SUPPORTS
def test_a_gradient_keeps_its_length_in_bf16(objective: dict[str, Any]) -> None:
    scaled, unscaled = bf16_length_errors(_torch.chunk_loss, **objective)
    assert scaled < 2e-4
    assert unscaled > 2e-3


@SUPPORTS
def test_the_gradient_of_a_nearly_certain_token_keeps_its_digits(
    monkeypatch: pytest.MonkeyPatch, objective: dict[str, Any]
) -> None:
    assert certain_student_error(_torch.chunk_loss, **objective) < 1e-4
    # A counter-example: g − G·p, here a difference of near equals.
    monkeypatch.setattr(_torch, "_without_cancellation", lambda grad, p: grad)
    assert certain_student_error(_torch.chunk_loss, **objective) > 2e-4


def test_a_nan_logit_shows() -> None:
    assert hidden_nan_share(_torch.chunk_loss) == 0.0


@given(st.integers(1, 300_000))
def test_split_k_covers_a_vocabulary(vocabulary: int) -> None:
    count, width = split_k(vocabulary)
    assert width * count <= vocabulary < (width + 8) * count
    assert width <= 20_000


# --- products of 16-bit inputs with a float32 result, which only a GPU has ---------------------------------


@pytest.fixture
def mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such products on a CPU: 16-bit inputs and gradients, without the GPU's own rounding."""
    mm = torch.mm

    def product(left: Tensor, right: Tensor, out_dtype: Any = None, out: Any = None) -> Tensor:
        result = mm(left.to(out_dtype), right.to(out_dtype)) if out_dtype else mm(left, right)
        return result if out is None else out.copy_(result)

    def products(left: Tensor, right: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> Tensor:
        return out.copy_(torch.stack([product(a, b, out_dtype) for a, b in zip(left, right, strict=True)]))

    def added(
        total: Tensor, left: Tensor, right: Tensor, *, beta: float = 1.0, out: Tensor, out_dtype: Any = None
    ) -> Tensor:
        before = torch.zeros_like(total) if beta == 0.0 else beta * total
        return out.copy_(before + product(left, right, out_dtype or torch.float32))

    for name, stand_in in {"mm": product, "bmm": products, "addmm": added}.items():
        monkeypatch.setattr(torch, name, stand_in)
    halves = (torch.bfloat16, torch.float16)
    monkeypatch.setattr(_matmul, "has_mixed_product", lambda device, operand: operand in halves)


HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def relative_errors(case: Case, dtype: torch.dtype, **options: Any) -> list[float]:
    """Of total and gradients in 16 bits, against float64 on the same inputs."""
    exact, exact_leaves = case.cast(dtype).cast(torch.float64).leaves()
    ours, leaves = case.cast(dtype).leaves()
    total, expected = ours.fused(chunk_size=8, **options).total, exact.plain_total()
    pairs = zip(torch.autograd.grad(total, leaves), torch.autograd.grad(expected, exact_leaves), strict=True)
    return [relative_error(total, expected), *(relative_error(left, right) for left, right in pairs)]


@HALVES
@pytest.mark.usefixtures("mixed")
@pytest.mark.parametrize(
    "scalars", [{}, {"support": "full"}, {"support": "teacher", "tail": "renormalize"}], ids=str
)
@pytest.mark.parametrize("min_outputs", [0, 2**21], ids=["split", "whole"])
def test_mixed_products_add_no_error_to_that_of_their_inputs(
    monkeypatch: pytest.MonkeyPatch, min_outputs: int, scalars: dict[str, Any], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(_matmul, "MIN_SPLIT_K_OUTPUTS", min_outputs)
    monkeypatch.setattr(_matmul, "SPLIT_K_SUMMANDS", 100)
    value, *gradients = relative_errors(make_case(31, n=33, d=17, v=507, **scalars), dtype)
    assert value < 1e-5
    assert max(gradients) < 2 * torch.finfo(dtype).eps


@pytest.mark.usefixtures("mixed")
def test_the_accumulation_bias_is_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    def biased(left: Tensor, right: Tensor, out_dtype: Any = None, out: Any = None) -> Tensor:
        result = exact(left, right, out_dtype, out)
        return result.mul_(0.999) if out_dtype else result

    exact = torch.mm
    monkeypatch.setattr(torch, "mm", biased)
    _matmul._measure_accumulation_bias.cache_clear()
    try:
        measured = _matmul.accumulation_bias(torch.device("cpu"), torch.bfloat16, 17)
        assert measured == pytest.approx(1e-3, rel=1e-3)
        # Values alone: the product that makes the gradient is not corrected.
        case = make_case(38, n=33, d=17, v=507)
        assert relative_errors(case, torch.bfloat16)[0] < 1e-5
        # A counter-example: the products as they are.
        monkeypatch.setattr(_chunks, "accumulation_bias", lambda device, operand, summands: 0.0)
        assert relative_errors(case, torch.bfloat16)[0] > 1e-4
    finally:
        _matmul._measure_accumulation_bias.cache_clear()


def test_a_cpu_has_no_accumulation_bias() -> None:
    assert _matmul.accumulation_bias(torch.device("cpu"), torch.bfloat16, 3584) == 0.0


@pytest.mark.usefixtures("mixed")
def test_mixed_products_mix_a_trust_region_before_they_round() -> None:
    case = make_case(32, n=33, d=17, v=507, k=20, trust_region_coef=0.5, weights=False, biases=False)
    other = make_case(33, n=33, d=17, v=507).tensors["teacher_hidden"]
    case = case.with_(reference_hidden=other).cast(torch.bfloat16)
    ours = case.fused(backend="torch").per_token
    exact = case.cast(torch.float64).fused(backend="torch").per_token
    mask = case.tensors["loss_mask"]
    assert relative_error(ours[mask], exact[mask]) < 1e-5
    # A counter-example: the mixed hidden states, rounded to the dtype of the weight.
    mixed = case.tensors["reference_hidden"].float().lerp(case.tensors["teacher_hidden"].float(), 0.5)
    rounded = case.with_(teacher_hidden=mixed.bfloat16(), reference_hidden=None, trust_region_coef=None)
    assert relative_error(rounded.fused(backend="torch").per_token[mask], exact[mask]) > 1e-4


@HALVES
@pytest.mark.usefixtures("mixed")
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_weights_of_zero_give_gradients_of_zero(reduction: str, dtype: torch.dtype) -> None:
    case = make_case(34, n=9, d=17, v=130)
    case, leaves = case.with_(weights=torch.zeros(9), old_log_probs=None, is_clip=None).cast(dtype).leaves()
    out = case.fused(reduction=reduction)
    loss = out.total if reduction == "sum" else (out.per_token * 0.0).sum()
    assert all(torch.equal(g, torch.zeros_like(g)) for g in torch.autograd.grad(loss, leaves))


@HALVES
@pytest.mark.usefixtures("mixed")
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_mixed_products_of_nothing(reduction: str, dtype: torch.dtype) -> None:
    case = make_case(35, n=9, d=17, v=130)
    case.tensors["loss_mask"].fill_(False)
    case.tensors["weights"].fill_(torch.nan)
    case, leaves = case.cast(dtype).leaves()
    out = case.fused(reduction=reduction)
    loss = out.total if reduction == "sum" else out.per_token.sum()
    assert all(torch.equal(g, torch.zeros_like(g)) for g in torch.autograd.grad(loss, leaves))


@pytest.mark.usefixtures("mixed")
def test_a_nan_weight_of_a_masked_token_is_never_read() -> None:
    case = make_case(36, n=9, d=17, v=130).cast(torch.float16)
    case.tensors["weights"][~case.tensors["loss_mask"]] = torch.nan
    case, leaves = case.leaves()
    assert all(g.isfinite().all() for g in torch.autograd.grad(case.fused().total, leaves))


def test_a_transposed_weight_is_another_weight() -> None:
    """Both are converted, and share memory and shape: only their strides differ."""
    case = make_case(37, n=9, d=40, v=40, k=5, weights=False, biases=False).cast(torch.float32)
    weight = case.tensors["student_weight"].bfloat16()
    shared = case.with_(student_weight=weight, teacher_weight=weight.t())
    separate = case.with_(student_weight=weight, teacher_weight=weight.t().clone())
    assert torch.equal(shared.fused().per_token, separate.fused().per_token)
