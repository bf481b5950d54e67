"""The fused loss with a served teacher, whose top K are given: values and gradients of the plain loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fused_cases import (
    TRAINABLE,
    Case,
    Result,
    assert_same,
    fused,
    make_case,
    plain,
    relative_error,
    with_given_teacher,
    with_policy,
)
from hypothesis import strategies as st
from strategies import Claim, alphas, name_of, seeds
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sdpo


@st.composite
def cases(draw: st.DrawFn) -> Case:
    v = draw(st.sampled_from([7, 64]))
    case = make_case(
        draw(seeds),
        n=draw(st.sampled_from([(5,), (2, 4)])),
        d=draw(st.sampled_from([1, 5])),
        teacher_d=4,
        v=v,
        scale=draw(st.sampled_from([0.5, 3.0])),
        weights=draw(st.booleans()),
        biases=draw(st.booleans()),
        alpha=draw(alphas),
        temperature=draw(st.sampled_from([1.0, 0.6])),
        softcap=draw(st.sampled_from([None, 10.0])),
    )
    k, tail = draw(st.sampled_from([1, 3, v - 1, v])), draw(st.sampled_from(["bucket", "renormalize"]))
    case = with_given_teacher(case, k, tail)
    if draw(st.booleans()):  # as a server rounds them, which may give a sum above 1
        rounded = (case.tensors["teacher_log_probs"] + 0.002).clamp(max=0.0)
        case = case.with_(teacher_log_probs=rounded)
    return with_policy(case, draw(seeds)) if draw(st.booleans()) else case


def property_equals_the_plain_loss(implementation: Callable[..., Result], case: Case, chunk: int) -> None:
    assert_same(implementation(case, 1.7, chunk_size=chunk), plain(case, 1.7))


def with_a_tempered_teacher(case: Case, factor: float, **options: Any) -> Result:
    tempered = case.tensors["teacher_log_probs"] * 1.3
    return fused(case.with_(teacher_log_probs=tempered), factor, **options)


def without_the_tail(case: Case, factor: float, **options: Any) -> Result:
    return fused(case.with_(tail="renormalize"), factor, **options)


def with_the_ids_in_another_order(case: Case, factor: float, **options: Any) -> Result:
    return fused(case.with_(teacher_ids=case.tensors["teacher_ids"].flip(-1)), factor, **options)


def property_statistics_are_those_of_an_evenly_spread_tail(
    implementation: Callable[[Case], sdpo.FusedOutput], case: Case
) -> None:
    out, t = implementation(case), case.tensors
    vocabulary = t["student_weight"].shape[0]
    for index in t["loss_mask"].nonzero().tolist():
        at = tuple(index)
        served = t["teacher_log_probs"][at].exp()
        served = served / max(1.0, served.sum().item())
        ids, others = t["teacher_ids"][at], vocabulary - len(served)
        q = torch.zeros(vocabulary, dtype=torch.float64)
        if others:
            q += max(1e-6, 1.0 - served.sum().item()) / others
        q[ids] = served
        q /= q.sum()
        inside = q[ids].sum()
        assert out.teacher_topk_mass[at] == pytest.approx(inside.item(), rel=1e-9)
        assert out.teacher_log_tail[at].exp() == pytest.approx(1.0 - inside.item(), abs=1e-12)
        assert out.teacher_entropy[at] == pytest.approx(torch.special.entr(q).sum().item(), rel=1e-6)
        assert out.teacher_log_probs[at] == pytest.approx(q[t["tokens"][at]].log().item(), abs=2e-6)
    log_p = case.log_probs("student").gather(-1, t["tokens"][..., None])[..., 0]
    torch.testing.assert_close(out.log_probs[t["loss_mask"]], log_p[t["loss_mask"]])
    assert all(torch.isfinite(value.float()).all() for value in out.metrics.values())


def statistics(case: Case) -> sdpo.FusedOutput:
    return case.fused(backend="torch")


def statistics_of_the_next_token(case: Case) -> sdpo.FusedOutput:
    return statistics(case.with_(tokens=case.tensors["tokens"].roll(-1, 0)))


RIGHT_AND_WRONG: list[tuple[Callable[..., None], Callable[..., Any], dict[str, Any], list[Any]]] = [
    (
        property_equals_the_plain_loss,
        fused,
        {"case": cases(), "chunk": st.sampled_from([1, 3, 1000])},
        [with_a_tempered_teacher, without_the_tail, with_the_ids_in_another_order],
    ),
    (
        property_statistics_are_those_of_an_evenly_spread_tail,
        statistics,
        {"case": cases()},
        [statistics_of_the_next_token],
    ),
]
CLAIMS = [
    Claim(check, right, wrong, drawn)
    for check, right, drawn, counter_examples in RIGHT_AND_WRONG
    for wrong in counter_examples
]


@pytest.mark.parametrize("claim", {claim.check: claim for claim in CLAIMS}.values(), ids=name_of)
def test_holds(claim: Claim) -> None:
    claim.holds()


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: f"{name_of(claim)}-{claim.wrong.__name__}")
def test_counter_examples_are_rejected(claim: Claim) -> None:
    claim.rejects_counter_example()


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_a_teachers_own_top_k_is_the_support_teacher(tail: str) -> None:
    case = make_case(1, n=9, v=64, support="teacher", k=8, tail=tail, temperature=0.7)
    given = fused(with_given_teacher(case, 8, tail), chunk_size=4)
    # The tail of a difference has the accuracy of float64, not its digits.
    assert_same(given, fused(case), 1e-9)


def test_without_a_sum_each_token_has_a_gradient() -> None:
    case = with_given_teacher(make_case(2, n=9, v=64, weights=False), 5)
    expected = fused(case)
    leafed, leaves = case.leaves()
    out = leafed.fused(backend="torch", reduction="none")
    for name, gradient in zip(TRAINABLE, torch.autograd.grad(out.per_token.sum(), leaves), strict=True):
        assert relative_error(gradient, expected[name]) < 1e-12


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("trains_head", "products"), [(False, 2), (True, 3)])
def test_only_the_student_is_projected(trains_head: bool, products: int) -> None:
    case = make_case(3, n=16, v=64, biases=False)
    for model, expected in ((with_given_teacher(case, 5), products), (case, products + 1)):
        model.tensors["student_hidden"].requires_grad_()
        model.tensors["student_weight"].requires_grad_(trains_head)
        with Products() as counted:
            model.fused(backend="torch").total.backward()
        assert counted.count == expected


def test_masked_tokens_are_never_read() -> None:
    case = with_given_teacher(make_case(4, n=20, v=64), 5)
    masked = ~case.tensors["loss_mask"][:, None]
    poisoned = case.with_(
        teacher_ids=case.tensors["teacher_ids"].masked_fill(masked, -100),
        teacher_log_probs=case.tensors["teacher_log_probs"].masked_fill(masked, math.nan),
    )
    assert_same(fused(poisoned), fused(case), 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_low_precision_inputs_are_rounded_once(dtype: torch.dtype) -> None:
    case = with_given_teacher(make_case(5, n=33, d=32, v=507), 20)
    case = case.cast(dtype).with_(teacher_ids=case.tensors["teacher_ids"].int())
    expected = plain(case.cast(torch.float64))
    actual = fused(case)
    assert relative_error(actual["total"], expected["total"]) < 1e-5
    for name in TRAINABLE:
        assert actual[name].dtype == dtype
        assert relative_error(actual[name], expected[name]) < max(torch.finfo(dtype).eps / 2, 1e-5)


def test_a_student_that_excludes_all_other_tokens() -> None:
    """Nothing is outside for the student: the loss is finite, no metric is NaN, whatever was sampled."""
    case = make_case(6, n=9, v=30, k=6, biases=False, weights=False)
    same: Tensor = torch.arange(6).expand(9, 6)
    bias = torch.full((30,), -math.inf, dtype=torch.float64).index_fill(0, torch.arange(6), 0.0)
    given = with_given_teacher(case, 6).with_(student_bias=bias, teacher_ids=same)
    out = given.with_(tokens=torch.zeros(9, dtype=torch.long)).fused()
    assert all(torch.isfinite(value.float()).all() for value in out.metrics.values())
    assert (out.student_log_tail[given.tensors["loss_mask"]] == -math.inf).all()
    assert_same(fused(given), plain(given))
    impossible = given.with_(tokens=torch.full((9,), 20)).fused()
    assert not any(value.isnan() for value in impossible.metrics.values())


GIVEN_K = torch.tensor([[1, 2, 3]]).expand(9, 3)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"k": 3}, ValueError, "k: expected None with support='given', got 3"),
    ({"tail": None}, TypeError, "tail: expected one of"),
    (
        {"support": "teacher"},
        TypeError,
        "teacher: expected an LMHead with support='teacher', got a TeacherTopK",
    ),
    ({"teacher_ids": GIVEN_K.double()}, TypeError, "teacher.ids: expected a tensor of integer dtype"),
    ({"teacher_ids": GIVEN_K[:, :2]}, ValueError, "teacher.log_probs: expected shape"),
    ({"teacher_ids": GIVEN_K[:4]}, ValueError, "teacher.ids: expected shape"),
    (
        {"teacher_ids": torch.ones(9, 3).long()},
        ValueError,
        "ids: expected distinct ids at each position, got 1",
    ),
    ({"teacher_ids": GIVEN_K + 62}, ValueError, r"ids: expected ids in \[0, 64\)"),
    ({"teacher_ids": GIVEN_K[:, :0]}, ValueError, r"teacher.ids.shape\[-1\]: expected an int in \[1, 64\]"),
    ({"teacher_ids": GIVEN_K.to("meta")}, ValueError, "teacher.ids: expected a tensor on cpu"),
    (
        {"teacher_log_probs": torch.zeros(9, 3)},
        ValueError,
        "log_probs: expected probabilities that sum to at most",
    ),
    ({"teacher_log_probs": torch.ones(9, 3)}, ValueError, "log_probs: expected log-probabilities, at most 0"),
    (
        {"teacher_log_probs": torch.full((9, 3), math.nan)},
        ValueError,
        "log_probs: expected log-probabilities",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=str)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    case = with_given_teacher(make_case(20, n=9, v=64), 3)
    with pytest.raises(error, match=message):
        case.with_(**change).fused()


def test_the_teacher_fits_the_support() -> None:
    case = make_case(20, n=9, v=64)
    with pytest.raises(
        TypeError, match=r"teacher: expected a TeacherTopK with support='given', got sdpo.LMHead"
    ):
        case.with_(support="given", k=None).fused()
    given = with_given_teacher(case, 3)
    arguments = given.arguments() | {"reference": case.arguments()["teacher"], "trust_region_coef": 0.5}
    with pytest.raises(ValueError, match="reference: expected None with support='given'"):
        sdpo.fused_distillation_loss(**arguments)
