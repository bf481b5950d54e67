"""The fused loss on plain torch: values and gradients of the plain loss, and which tokens it never reads."""

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
    multiply_by_the_mask,
    plain,
    relative_error,
)
from hypothesis import strategies as st
from strategies import Claim, alphas, name_of, seeds
from torch import Tensor

import sdpo


@st.composite
def cases(draw: st.DrawFn) -> Case:
    v = draw(st.sampled_from([7, 64, 123, 507]))
    support = draw(st.sampled_from(["student", "student", "teacher", "full", "sampled"]))
    topk: dict[str, Any] = {}
    if support in ("student", "teacher"):
        k, tail = draw(st.sampled_from([1, 3, v - 1, v])), draw(st.sampled_from(["bucket", "renormalize"]))
        topk = {"k": k, "tail": tail}
    return make_case(
        draw(seeds),
        n=draw(st.sampled_from([1, 5, 33, (2, 3)])),
        d=draw(st.sampled_from([1, 17])),
        teacher_d=draw(st.sampled_from([None, 5])),
        v=v,
        scale=draw(st.sampled_from([0.5, 3.0, 20.0])),
        weights=draw(st.booleans()),
        biases=draw(st.booleans()),
        support=support,
        **topk,
        alpha=1.0 if support == "sampled" else draw(alphas),
        temperature=draw(st.sampled_from([1.0, 0.6, 1.7])),
        softcap=draw(st.sampled_from([None, 10.0])),
        logit_scale=draw(st.sampled_from([1.0, 0.4])),
    )


def property_equals_the_plain_loss(implementation: Callable[..., Result], case: Case, chunk: int) -> None:
    assert_same(implementation(case, 1.7, chunk_size=chunk), plain(case, 1.7))


def without_temperature(case: Case, factor: float, **options: Any) -> Result:
    result = fused(case, factor, **options)
    return result | {"student_hidden": result["student_hidden"] * case.scalars["temperature"]}


def softcap_after_temperature(case: Case, factor: float, **options: Any) -> Result:
    t, cap = case.scalars["temperature"], case.scalars["softcap"]
    return fused(case.with_(softcap=None if cap is None else cap * t), factor, **options)


def without_last_chunk(case: Case, factor: float, chunk_size: int) -> Result:
    active = case.tensors["loss_mask"].flatten().nonzero().flatten()
    mask = case.tensors["loss_mask"].clone()
    mask.view(-1)[active[len(active) // chunk_size * chunk_size :]] = False
    return fused(case.with_(loss_mask=mask), factor, chunk_size=chunk_size)


def without_the_tail(case: Case, factor: float, **options: Any) -> Result:
    tail = None if case.scalars["tail"] is None else "renormalize"
    return fused(case.with_(tail=tail), factor, **options)


def property_statistics_equal_their_definitions(
    implementation: Callable[[Case], sdpo.FusedOutput], case: Case
) -> None:
    out = implementation(case)
    mask = case.tensors["loss_mask"]
    student, teacher = case.log_probs("student"), case.log_probs("teacher")
    tokens = case.tensors["tokens"][..., None]
    torch.testing.assert_close(out.log_probs[mask], student.gather(-1, tokens)[..., 0][mask])
    torch.testing.assert_close(out.teacher_log_probs[mask], teacher.gather(-1, tokens)[..., 0][mask])
    torch.testing.assert_close(out.student_entropy[mask], torch.special.entr(student.exp()).sum(-1)[mask])
    torch.testing.assert_close(out.teacher_entropy[mask], torch.special.entr(teacher.exp()).sum(-1)[mask])
    torch.testing.assert_close(
        (out.student_topk_mass + out.student_log_tail.exp())[mask], torch.ones(int(mask.sum())).double()
    )
    torch.testing.assert_close(out.weights[mask], case.plain_per_token()[1][mask])
    p, q = (model.exp().gather(-1, tokens)[..., 0][mask] for model in (student, teacher))
    overlap = (torch.minimum(p, q) / torch.maximum(p, q)).sum() / max(len(p), 1)
    torch.testing.assert_close(out.metrics["sampled_token_overlap"], overlap)
    assert out.count == mask.sum()
    for values in (out.per_token, out.weights, out.log_probs, out.student_entropy):
        assert not values[~mask].any()
        assert values.shape == mask.shape
        assert not values.requires_grad


def statistics(case: Case) -> sdpo.FusedOutput:
    return case.fused(backend="torch")


def statistics_of_the_next_token(case: Case) -> sdpo.FusedOutput:
    return statistics(case.with_(tokens=case.tensors["tokens"].roll(-1, 0)))


def statistics_without_temperature(case: Case) -> sdpo.FusedOutput:
    return statistics(case.with_(temperature=1.0))


def statistics_of_masked_tokens_too(case: Case) -> sdpo.FusedOutput:
    return statistics(case.with_(loss_mask=torch.ones_like(case.tensors["loss_mask"])))


def property_per_token_form_lets_the_caller_reduce(
    reduce: Callable[..., Tensor], seed: int, trainable: tuple[str, ...]
) -> None:
    case = make_case(seed, n=(3, 4), v=123)
    factors = torch.rand(3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def gradients(case: Case, reduced: Callable[[sdpo.FusedOutput], Tensor], **options: str) -> list[Tensor]:
        leaves = [case.tensors[name].clone().requires_grad_() for name in trainable]
        case = case.with_(**dict(zip(trainable, leaves, strict=True)))
        out = case.fused(backend="torch", chunk_size=5, **options)
        return list(torch.autograd.grad(reduced(out), leaves))

    weighted = case.with_(weights=case.tensors["weights"] * factors)
    expected = gradients(weighted, lambda out: out.total)
    actual = gradients(case, lambda out: reduce(out, factors), reduction="none")
    for left, right in zip(expected, actual, strict=True):
        assert relative_error(right, left) < 1e-12


def reduced(out: sdpo.FusedOutput, factors: Tensor) -> Tensor:
    return (factors * out.per_token * out.weights).sum()


def reduced_without_weights(out: sdpo.FusedOutput, factors: Tensor) -> Tensor:
    return (factors * out.per_token).sum()


def reduced_and_totalled(out: sdpo.FusedOutput, factors: Tensor) -> Tensor:
    return reduced(out, factors) + out.total


RIGHT_AND_WRONG: list[tuple[Callable[..., None], Callable[..., Any], dict[str, Any], list[Any]]] = [
    (
        property_equals_the_plain_loss,
        fused,
        {"case": cases(), "chunk": st.sampled_from([1, 4, 1000])},
        [without_temperature, softcap_after_temperature, without_last_chunk, without_the_tail],
    ),
    (
        property_statistics_equal_their_definitions,
        statistics,
        {"case": cases()},
        [
            statistics_of_the_next_token,
            statistics_without_temperature,
            statistics_of_masked_tokens_too,
        ],
    ),
    (
        property_per_token_form_lets_the_caller_reduce,
        reduced,
        {"seed": seeds, "trainable": st.sampled_from([TRAINABLE, TRAINABLE[:1], TRAINABLE[1:2]])},
        [reduced_without_weights, reduced_and_totalled],
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


def test_with_reduction_none_the_total_keeps_a_gradient_of_its_own() -> None:
    case, leaves = make_case(21, n=9, v=64).leaves()
    out = case.fused(backend="torch", reduction="none")
    of_total = torch.autograd.grad(out.total, leaves, retain_graph=True)
    of_both = torch.autograd.grad(out.total + (out.weights * out.per_token).sum(), leaves)
    for name, alone, both in zip(TRAINABLE, of_total, of_both, strict=True):
        assert relative_error(alone, fused(case)[name]) < 1e-12
        assert relative_error(both, 2.0 * alone) < 1e-12


def one_minus_mass(log_mass: Tensor) -> Tensor:
    return torch.log(-torch.expm1(log_mass.clamp(max=-1e-7)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_tail_is_exact_where_the_support_holds_nearly_all(alpha: float, dtype: torch.dtype) -> None:
    """Supports of mass 0.999999 or so: per-token error at most 1e-5, which 1 − Σp misses by far."""
    case = make_case(3, n=200, d=32, v=507, k=20, scale=9.0, alpha=alpha, weights=False, biases=False)
    # Of two models that agree the divergence is small: errors of the logits would drown those of the tail.
    case = case.cast(dtype)
    out, exact = case.fused(backend="torch"), case.cast(torch.float64)
    mask = case.tensors["loss_mask"]
    reference = sdpo.topk_log_probs(exact.logits("student"), k=20)
    deep = mask & (reference.log_tail < math.log(1e-5)) & (reference.log_tail > math.log(1e-12))
    assert deep.sum() > 20
    ours = (out.student_log_tail - reference.log_tail)[deep].abs().max()
    naive = (one_minus_mass(out.student_topk_mass.log()) - reference.log_tail)[deep].abs().max()
    assert ours < 2e-5 < 1e-2 < naive
    divergence, _ = exact.plain_per_token()
    error = (out.per_token - divergence)[deep].abs() / divergence[deep]
    assert error.max() < 1e-5


@pytest.mark.parametrize("implementation", [fused, multiply_by_the_mask])
def test_masked_tokens_are_never_read(implementation: Callable[[Case], Result]) -> None:
    case = make_case(5, n=20, v=64)
    mask = case.tensors["loss_mask"]
    poisoned = case.with_(
        student_hidden=case.tensors["student_hidden"].masked_fill(~mask[:, None], math.nan),
        teacher_hidden=case.tensors["teacher_hidden"].masked_fill(~mask[:, None], math.inf),
        weights=case.tensors["weights"].masked_fill(~mask, math.nan),
    )
    result = implementation(poisoned)
    same = all(relative_error(result[name], value) < 1e-12 for name, value in fused(case).items())
    assert same == (implementation is fused)
    if implementation is fused:
        assert not result["student_hidden"][~mask].any()


@pytest.mark.parametrize("n", [0, 7])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_nothing_active_gives_zero_and_a_legal_backward(n: int, reduction: str) -> None:
    case, leaves = make_case(6, n=n, v=64).leaves()
    case = case.with_(loss_mask=torch.zeros(n, dtype=torch.bool))
    out = case.fused(reduction=reduction)
    out.mean().backward()
    assert out.total == out.mean() == 0.0
    assert out.count == 0
    for leaf in leaves:
        assert leaf.grad is not None
        assert leaf.grad.shape == leaf.shape
        assert not leaf.grad.any()
    assert all(torch.isfinite(value.float()).all() for value in out.metrics.values())


CENTRE = ("centre_hidden", "centre_weight", "centre_bias")


@pytest.mark.parametrize("support", ["student", "full"])
def test_the_mean_is_the_total_over_the_count(support: str) -> None:
    case, leaves = make_case(6, n=9, v=64, support=support).leaves()
    out = case.fused(backend="torch")
    assert out.mean() == out.total / out.count
    for left, right in zip(
        torch.autograd.grad(out.mean(), leaves, retain_graph=True),
        torch.autograd.grad(out.total, leaves),
        strict=True,
    ):
        assert relative_error(left * out.count, right) < 1e-12


def mixed_hidden_states(case: Case, coef: float) -> Tensor:
    """A counter-example: always mixes the hidden states, which is right only through a head without soft-cap."""
    reference, live = case.tensors["reference_hidden"], case.tensors["teacher_hidden"]
    tensors = {name: value for name, value in case.tensors.items() if not name.startswith("reference")}
    mixed = Case(tensors, case.scalars | {"trust_region_coef": None})
    return mixed.with_(teacher_hidden=reference.lerp(live, coef)).fused().total


@pytest.mark.parametrize("coef", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("head", ["shared", "equal", "other"])
def test_trust_region_mixes_logits(coef: float, softcap: float | None, head: str) -> None:
    case = make_case(7, n=9, v=64, k=5, softcap=softcap)
    other = make_case(8, n=9, v=64).tensors
    reference = {"reference_hidden": other["teacher_hidden"]}
    if head != "shared":
        source = other if head == "other" else case.tensors
        reference |= {f"reference_{part}": source[f"teacher_{part}"].clone() for part in ("weight", "bias")}
    mixed_case = case.with_(**reference, trust_region_coef=coef)
    heads = mixed_case.arguments()
    centre = Case(dict(zip(CENTRE, heads["reference"], strict=True)), case.scalars)
    mixed = (1 - coef) * centre.logits("centre") + coef * case.logits("teacher")
    expected = sdpo.distillation_loss(
        case.logits("student"), mixed, support="student", k=5, tail="bucket", alpha=0.5, temperature=1.0
    )
    out = mixed_case.fused(backend="torch")
    mask = case.tensors["loss_mask"]
    torch.testing.assert_close(out.per_token[mask], expected[mask])
    if softcap is not None and coef == 0.3:
        assert relative_error(mixed_hidden_states(mixed_case, coef), out.total) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_low_precision_inputs_are_rounded_once(dtype: torch.dtype) -> None:
    rounded = make_case(9, n=33, d=64, v=507).cast(dtype)
    expected, actual = plain(rounded.cast(torch.float64)), fused(rounded)
    assert relative_error(actual["total"], expected["total"]) < 1e-5
    assert relative_error(actual["per_token"], expected["per_token"]) < 1e-5
    for name in TRAINABLE:
        assert actual[name].dtype == dtype
        assert relative_error(actual[name], expected[name]) < max(torch.finfo(dtype).eps / 2, 1e-5)
    plain_low = plain(rounded)
    if dtype != torch.float32:
        assert relative_error(plain_low["per_token"], expected["per_token"]) > 1e-4, (
            "16-bit logits would be enough"
        )


def test_ties_and_impossible_tokens() -> None:
    case = make_case(10, n=12, v=60, k=8, weights=False)
    impossible = torch.arange(60) % 3 == 0
    tied = case.tensors["student_weight"].clone()
    tied[20:50] = tied[20]
    case = case.with_(student_weight=tied)
    for side in ("student", "teacher"):
        bias = torch.zeros(60, dtype=torch.float64).masked_fill(impossible, -math.inf)
        case = case.with_(**{f"{side}_bias": bias})
    for alpha in (0.0, 0.5, 1.0):
        result = fused(case.with_(alpha=alpha))
        divergence, _ = case.with_(alpha=alpha).plain_per_token()
        assert torch.isfinite(result["student_hidden"]).all()
        assert torch.isfinite(result["student_weight"]).all()
        torch.testing.assert_close(result["total"], divergence[case.tensors["loss_mask"]].sum())
    # More tokens asked for than there are possible ones: nothing is outside.
    assert torch.isfinite(fused(case.with_(k=50))["student_weight"]).all()


@pytest.mark.parametrize(("alpha", "excluding_model"), [(1.0, "teacher"), (0.0, "student")])
def test_an_infinite_divergence_sends_a_finite_gradient(alpha: float, excluding_model: str) -> None:
    case = make_case(11, n=6, v=30, k=30, alpha=alpha, weights=False, biases=False)
    case = case.with_(
        **{f"{excluding_model}_bias": torch.zeros(30).double().index_fill(0, torch.tensor([4]), -math.inf)}
    )
    result, expected = fused(case), plain(case)
    assert result["total"] == math.inf == expected["total"]
    assert relative_error(result["student_hidden"], expected["student_hidden"]) < 1e-9


def test_same_inputs_same_bits() -> None:
    case = make_case(14).cast(torch.float32)
    for name, value in fused(case, chunk_size=5).items():
        assert torch.equal(value, fused(case, chunk_size=5)[name])


def test_a_teacher_that_shares_the_head_sends_no_gradient() -> None:
    case = make_case(16, n=9, v=64, biases=False)
    apart = case.with_(teacher_weight=case.tensors["student_weight"].clone())
    head = case.tensors["student_weight"].clone().requires_grad_()
    tied = case.with_(student_weight=head, teacher_weight=head)
    (gradient,) = torch.autograd.grad(tied.fused(backend="torch").total, head)
    assert relative_error(gradient, fused(apart)["student_weight"]) < 1e-12
