"""The digits of the fused loss: what 16-bit slopes and inputs cost, a CPU standing in for a GPU's products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fused_cases import Case, hidden_breaks, lost_length, make_case, relative_error, saturated_error
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sdpo.fused import _chunks, _matmul, _torch
from sdpo.fused._matmul import pieces


@pytest.mark.parametrize("k", [100, None])
def test_a_row_of_slopes_keeps_its_length_in_bf16(k: int | None) -> None:
    with_gain, without = lost_length(_torch.chunk, k)
    assert with_gain < 2e-4
    assert without > 2e-3


@pytest.mark.parametrize("k", [100, None])
def test_the_slope_of_a_nearly_certain_token_keeps_its_digits(
    monkeypatch: pytest.MonkeyPatch, k: int | None
) -> None:
    assert saturated_error(_torch.chunk, k) < 1e-4
    # A wrong twin: g − G·p, here a difference of near equals.
    monkeypatch.setattr(_torch, "_balanced", lambda slopes, p: slopes)
    assert saturated_error(_torch.chunk, k) > 2e-4


def test_a_broken_logit_shows() -> None:
    assert hidden_breaks(_torch.chunk) == 0.0


@given(st.integers(1, 300_000))
def test_pieces_cover_a_vocabulary(vocabulary: int) -> None:
    count, width = pieces(vocabulary)
    assert width * count <= vocabulary < (width + 8) * count
    assert width <= 20_000


# --- 16-bit products with a float32 result, which only a GPU has ------------------------------------------


@pytest.fixture
def mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such products on a CPU: what 16 bits do to inputs and slopes, without the GPU's own rounding."""
    mm = torch.mm

    def product(left: Tensor, right: Tensor, out_dtype: Any = None, out: Any = None) -> Tensor:
        made = mm(left.to(out_dtype), right.to(out_dtype)) if out_dtype else mm(left, right)
        return made if out is None else out.copy_(made)

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
@pytest.mark.parametrize("scalars", [{}, {"k": None}, {"support": "teacher", "tail": "renormalize"}], ids=str)
@pytest.mark.parametrize("fills", [0, 2**21], ids=["in pieces", "at once"])
def test_mixed_products_lose_what_their_inputs_lack(
    monkeypatch: pytest.MonkeyPatch, fills: int, scalars: dict[str, Any], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(_matmul, "_FILLS", fills)
    monkeypatch.setattr(_matmul, "_TERMS", 100)
    value, *gradients = relative_errors(make_case(31, n=33, d=17, v=507, **scalars), dtype)
    assert value < 1e-5
    assert max(gradients) < 2 * torch.finfo(dtype).eps


@pytest.mark.usefixtures("mixed")
def test_what_a_product_loses_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def lossy(left: Tensor, right: Tensor, out_dtype: Any = None, out: Any = None) -> Tensor:
        made = whole(left, right, out_dtype, out)
        return made.mul_(0.999) if out_dtype else made

    whole = torch.mm
    monkeypatch.setattr(torch, "mm", lossy)
    _matmul._measured_loss.cache_clear()
    try:
        assert _matmul.accumulation_bias(torch.device("cpu"), torch.bfloat16, 17) == pytest.approx(
            1e-3, rel=1e-3
        )
        # Values alone: the gradient's own product is as short as it was.
        case = make_case(38, n=33, d=17, v=507)
        assert relative_errors(case, torch.bfloat16)[0] < 1e-5
        monkeypatch.setattr(_chunks, "accumulation_bias", lambda device, operand, width: 0.0)
        assert relative_errors(case, torch.bfloat16)[0] > 1e-4, "a wrong twin"
    finally:
        _matmul._measured_loss.cache_clear()


def test_a_cpu_loses_nothing() -> None:
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
    # A wrong twin: the states in between, rounded as the head is.
    between = case.tensors["reference_hidden"].float().lerp(case.tensors["teacher_hidden"].float(), 0.5)
    twin = case.with_(teacher_hidden=between.bfloat16(), reference_hidden=None, trust_region_coef=None)
    assert relative_error(twin.fused(backend="torch").per_token[mask], exact[mask]) > 1e-4


@HALVES
@pytest.mark.usefixtures("mixed")
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_weights_of_zero_give_gradients_of_zero(reduction: str, dtype: torch.dtype) -> None:
    case = make_case(34, n=9, d=17, v=130)
    case, leaves = (
        case.with_(extra_weights=torch.zeros(9), old_log_probs=None, is_clip=None).cast(dtype).leaves()
    )
    out = case.fused(reduction=reduction)
    loss = out.total if reduction == "sum" else (out.per_token * 0.0).sum()
    assert all(torch.equal(g, torch.zeros_like(g)) for g in torch.autograd.grad(loss, leaves))


@HALVES
@pytest.mark.usefixtures("mixed")
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_mixed_products_of_nothing(reduction: str, dtype: torch.dtype) -> None:
    case = make_case(35, n=9, d=17, v=130)
    case.tensors["loss_mask"].fill_(False)
    case.tensors["extra_weights"].fill_(torch.nan)
    case, leaves = case.cast(dtype).leaves()
    out = case.fused(reduction=reduction)
    loss = out.total if reduction == "sum" else out.per_token.sum()
    assert all(torch.equal(g, torch.zeros_like(g)) for g in torch.autograd.grad(loss, leaves))


@pytest.mark.usefixtures("mixed")
def test_a_broken_weight_of_a_masked_token_is_never_read() -> None:
    case = make_case(36, n=9, d=17, v=130).cast(torch.float16)
    case.tensors["extra_weights"][~case.tensors["loss_mask"]] = torch.nan
    case, leaves = case.leaves()
    assert all(g.isfinite().all() for g in torch.autograd.grad(case.fused().total, leaves))


def test_a_transposed_head_is_another_head() -> None:
    """Both converted, of one memory and one shape: told apart by their strides."""
    case = make_case(37, n=9, d=40, v=40, k=5, weights=False, biases=False).cast(torch.float32)
    head = case.tensors["student_head"].bfloat16()
    shared = case.with_(student_head=head, teacher_head=head.t())
    apart = case.with_(student_head=head, teacher_head=head.t().clone())
    assert torch.equal(shared.fused().per_token, apart.fused().per_token)
