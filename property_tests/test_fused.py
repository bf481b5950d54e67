"""The fused loss on plain torch: the numbers of the plain losses, their gradients, and what it never does."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fused_cases import LEARNING, Case, make_case, relative_error
from hypothesis import strategies as st
from strategies import Claim, alphas, name_of, seeds
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import sdpo

Answer = dict[str, Tensor]


def fused(case: Case, factor: float = 1.0, **options: Any) -> Answer:
    """Everything that must equal the plain losses: total, per-token values, gradients of ``factor · total``."""
    case, leaves = case.leaves()
    out = case.fused(backend="torch", **options)
    gradients = torch.autograd.grad(out.total * factor, leaves)
    names = [name for name in LEARNING if name in case.tensors]
    return {"total": out.total, "per_token": out.per_token} | dict(zip(names, gradients, strict=True))


def plain(case: Case, factor: float = 1.0) -> Answer:
    case, leaves = case.leaves()
    total = case.plain_total()
    divergence, _ = case.plain_per_token()
    names = [name for name in LEARNING if name in case.tensors]
    gradients = dict(zip(names, torch.autograd.grad(total * factor, leaves), strict=True))
    per_token = torch.where(case.tensors["loss_mask"], divergence, 0.0)
    return {"total": total, "per_token": per_token} | gradients


def assert_same(got: Answer, expected: Answer, tolerance: float = 1e-9) -> None:
    """Relative to the norm; what vanishes up to rounding may do so differently."""
    for name, value in expected.items():
        assert (got[name].double() - value.double()).norm() <= tolerance * value.norm() + 1e-12, name


@st.composite
def cases(draw: st.DrawFn) -> Case:
    v = draw(st.sampled_from([7, 64, 123, 507]))
    support = draw(st.sampled_from(["student", "student", "teacher", "full", "sampled"]))
    k = None if support in ("full", "sampled") else draw(st.sampled_from([1, 3, v - 1, v]))
    return make_case(
        draw(seeds),
        n=draw(st.sampled_from([1, 5, 33, (2, 3)])),
        d=draw(st.sampled_from([1, 17])),
        teacher_d=draw(st.sampled_from([None, 5])),
        v=v,
        scale=draw(st.sampled_from([0.5, 3.0, 20.0])),
        weights=draw(st.booleans()),
        biases=draw(st.booleans()),
        k=k,
        support="student" if support == "full" else support,
        alpha=1.0 if support == "sampled" else draw(alphas),
        tail=draw(st.sampled_from(["bucket", "renormalize"])),
        temperature=draw(st.sampled_from([1.0, 0.6, 1.7])),
        softcap=draw(st.sampled_from([None, 10.0])),
        logit_scale=draw(st.sampled_from([1.0, 0.4])),
    )


def property_equals_the_plain_loss(implementation: Callable[..., Answer], case: Case, chunk: int) -> None:
    assert_same(implementation(case, 1.7, chunk_size=chunk), plain(case, 1.7))


def without_temperature(case: Case, factor: float, **options: Any) -> Answer:
    answer = fused(case, factor, **options)
    return answer | {"student_hidden": answer["student_hidden"] * case.scalars["temperature"]}


def softcap_after_temperature(case: Case, factor: float, **options: Any) -> Answer:
    t, cap = case.scalars["temperature"], case.scalars["softcap"]
    return fused(case.with_(softcap=None if cap is None else cap * t), factor, **options)


def without_last_chunk(case: Case, factor: float, chunk_size: int) -> Answer:
    active = case.tensors["loss_mask"].flatten().nonzero().flatten()
    mask = case.tensors["loss_mask"].clone()
    mask.view(-1)[active[len(active) // chunk_size * chunk_size :]] = False
    return fused(case.with_(loss_mask=mask), factor, chunk_size=chunk_size)


def gradient_of_the_support_alone(case: Case, factor: float, **options: Any) -> Answer:
    return fused(case.with_(tail="renormalize"), factor, **options)


def property_statistics_equal_their_definitions(
    implementation: Callable[[Case], sdpo.FusedOutput], case: Case
) -> None:
    out = implementation(case)
    mask = case.tensors["loss_mask"]
    student, teacher = case.logits("student").log_softmax(-1), case.logits("teacher").log_softmax(-1)
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
    reduce: Callable[..., Tensor], seed: int, learning: tuple[str, ...]
) -> None:
    case = make_case(seed, n=(3, 4), v=123)
    factors = torch.rand(3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def gradients(case: Case, reduced: Callable[[sdpo.FusedOutput], Tensor], **options: str) -> list[Tensor]:
        leaves = [case.tensors[name].clone().requires_grad_() for name in learning]
        case = case.with_(**dict(zip(learning, leaves, strict=True)))
        out = case.fused(backend="torch", chunk_size=5, **options)
        return list(torch.autograd.grad(reduced(out), leaves))

    weighted = case.with_(extra_weights=case.tensors["extra_weights"] * factors)
    expected = gradients(weighted, lambda out: out.total)
    got = gradients(case, lambda out: reduce(out, factors), reduction="none")
    for left, right in zip(expected, got, strict=True):
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
        [without_temperature, softcap_after_temperature, without_last_chunk, gradient_of_the_support_alone],
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
        {"seed": seeds, "learning": st.sampled_from([LEARNING, LEARNING[:1], LEARNING[1:2]])},
        [reduced_without_weights, reduced_and_totalled],
    ),
]
CLAIMS = [
    Claim(check, right, wrong, drawn) for check, right, drawn, twins in RIGHT_AND_WRONG for wrong in twins
]


@pytest.mark.parametrize("claim", {claim.check: claim for claim in CLAIMS}.values(), ids=name_of)
def test_holds(claim: Claim) -> None:
    claim.holds()


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: f"{name_of(claim)}-{claim.wrong.__name__}")
def test_wrong_twins_are_rejected(claim: Claim) -> None:
    claim.rejects_wrong_twin()


def test_with_reduction_none_the_total_keeps_a_gradient_of_its_own() -> None:
    case, leaves = make_case(21, n=9, v=64).leaves()
    out = case.fused(backend="torch", reduction="none")
    of_total = torch.autograd.grad(out.total, leaves, retain_graph=True)
    of_both = torch.autograd.grad(out.total + (out.weights * out.per_token).sum(), leaves)
    for name, alone, both in zip(LEARNING, of_total, of_both, strict=True):
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


def divide_by_the_mask(case: Case, **options: Any) -> Answer:
    """The twin that projects everything and multiplies by the mask afterwards: 0 · NaN is NaN."""
    mask = case.tensors["loss_mask"]
    whole = case.with_(loss_mask=torch.ones_like(mask))
    answer = fused(whole, **options)
    hidden = answer["student_hidden"] * mask[:, None]
    return answer | {"student_hidden": hidden, "per_token": answer["per_token"] * mask}


@pytest.mark.parametrize("implementation", [fused, divide_by_the_mask])
def test_what_masked_tokens_hold_is_never_read(implementation: Callable[[Case], Answer]) -> None:
    case = make_case(5, n=20, v=64)
    mask = case.tensors["loss_mask"]
    poisoned = case.with_(
        student_hidden=case.tensors["student_hidden"].masked_fill(~mask[:, None], math.nan),
        teacher_hidden=case.tensors["teacher_hidden"].masked_fill(~mask[:, None], math.inf),
        extra_weights=case.tensors["extra_weights"].masked_fill(~mask, math.nan),
    )
    answer = implementation(poisoned)
    same = all(relative_error(answer[name], value) < 1e-12 for name, value in fused(case).items())
    assert same == (implementation is fused)
    if implementation is fused:
        assert not answer["student_hidden"][~mask].any()


@pytest.mark.parametrize("n", [0, 7])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_nothing_active_gives_zero_and_a_legal_backward(n: int, reduction: str) -> None:
    case, leaves = make_case(6, n=n, v=64).leaves()
    case = case.with_(loss_mask=torch.zeros(n, dtype=torch.bool))
    out = case.fused(reduction=reduction)
    out.total.backward()
    assert out.total == 0.0
    assert out.count == 0
    for leaf in leaves:
        assert leaf.grad is not None
        assert leaf.grad.shape == leaf.shape
        assert not leaf.grad.any()
    assert all(torch.isfinite(value.float()).all() for value in out.metrics.values())


def hidden_lerp(case: Case, coef: float) -> Tensor:
    """The twin that always mixes hidden states, right only through a head without soft-cap."""
    reference, live = case.tensors["reference_hidden"], case.tensors["teacher_hidden"]
    tensors = {name: value for name, value in case.tensors.items() if not name.startswith("reference")}
    mixed = Case(tensors, case.scalars | {"trust_region_coef": None})
    return mixed.with_(teacher_hidden=reference.lerp(live, coef)).fused().total


@pytest.mark.parametrize("coef", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("own_head", [False, True])
def test_trust_region_mixes_logits(coef: float, softcap: float | None, own_head: bool) -> None:
    case = make_case(7, n=9, v=64, k=5, softcap=softcap)
    other = make_case(8, n=9, v=64).tensors
    reference = Case(
        {
            "teacher_hidden": other["teacher_hidden"],
            "teacher_head": other["teacher_head"] if own_head else case.tensors["teacher_head"],
            "teacher_bias": other["teacher_bias"] if own_head else case.tensors["teacher_bias"],
        },
        case.scalars,
    )
    mixed = (1 - coef) * reference.logits("teacher") + coef * case.logits("teacher")
    divergence = sdpo.topk_distillation_loss(case.logits("student"), mixed, k=5, alpha=0.5, tail="bucket")
    with_reference = case.with_(reference_hidden=reference.tensors["teacher_hidden"], trust_region_coef=coef)
    if own_head:
        with_reference = with_reference.with_(
            reference_head=reference.tensors["teacher_head"], reference_bias=reference.tensors["teacher_bias"]
        )
    out = with_reference.fused(backend="torch")
    mask = case.tensors["loss_mask"]
    torch.testing.assert_close(out.per_token[mask], divergence[mask])
    if softcap is not None and coef == 0.3:
        assert relative_error(hidden_lerp(with_reference, coef), out.total) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_low_precision_inputs_lose_nothing_but_their_own_rounding(dtype: torch.dtype) -> None:
    rounded = make_case(9, n=33, d=64, v=507).cast(dtype)
    expected, got = plain(rounded.cast(torch.float64)), fused(rounded)
    assert relative_error(got["total"], expected["total"]) < 1e-5
    assert relative_error(got["per_token"], expected["per_token"]) < 1e-5
    for name in LEARNING:
        assert got[name].dtype == dtype
        assert relative_error(got[name], expected[name]) < max(torch.finfo(dtype).eps / 2, 1e-5)
    plain_low = plain(rounded)
    if dtype != torch.float32:
        assert relative_error(plain_low["per_token"], expected["per_token"]) > 1e-4, "bf16 logits would do"


def test_ties_and_impossible_tokens() -> None:
    case = make_case(10, n=12, v=60, k=8, weights=False)
    shut = torch.arange(60) % 3 == 0
    tied = case.tensors["student_head"].clone()
    tied[20:50] = tied[20]
    case = case.with_(student_head=tied)
    for side in ("student", "teacher"):
        bias = torch.zeros(60, dtype=torch.float64).masked_fill(shut, -math.inf)
        case = case.with_(**{f"{side}_bias": bias})
    for alpha in (0.0, 0.5, 1.0):
        answer = fused(case.with_(alpha=alpha))
        divergence, _ = case.with_(alpha=alpha).plain_per_token()
        assert torch.isfinite(answer["student_hidden"]).all()
        assert torch.isfinite(answer["student_head"]).all()
        torch.testing.assert_close(answer["total"], divergence[case.tensors["loss_mask"]].sum())
    # More tokens asked for than there are possible ones: nothing is outside.
    assert torch.isfinite(fused(case.with_(k=50))["student_head"]).all()


@pytest.mark.parametrize(("alpha", "shut_side"), [(1.0, "teacher"), (0.0, "student")])
def test_an_infinite_divergence_sends_a_finite_gradient(alpha: float, shut_side: str) -> None:
    case = make_case(11, n=6, v=30, k=30, alpha=alpha, weights=False, biases=False)
    case = case.with_(
        **{f"{shut_side}_bias": torch.zeros(30).double().index_fill(0, torch.tensor([4]), -math.inf)}
    )
    answer, expected = fused(case), plain(case)
    assert answer["total"] == math.inf == expected["total"]
    assert relative_error(answer["student_hidden"], expected["student_hidden"]) < 1e-9


class Watch(TorchDispatchMode):
    """The sizes of every product of matrices, and the largest tensor any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[int, int, int]] = []  # [a, b] @ [b, c]
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        aten = torch.ops.aten
        first = {aten.mm: 0, aten.addmm: 1, aten.addmm_: 1, aten.bmm: 0, aten.baddbmm: 1}.get(
            func.overloadpacket
        )
        if first is not None:
            left, right = args[first : first + 2]
            self.products.append((left.shape[-2], left.shape[-1], right.shape[-1]))
        made = [result] if isinstance(result, Tensor) else []
        self.largest = max([self.largest, *(tensor.numel() for tensor in made)])
        return result


@pytest.mark.parametrize(("head_learns", "products"), [(False, 3), (True, 4)])
@pytest.mark.parametrize(
    "scalars", [{}, {"k": None}, {"k": None, "support": "sampled", "alpha": 1.0}], ids=str
)
def test_no_product_is_made_twice(scalars: dict[str, Any], head_learns: bool, products: int) -> None:
    case = make_case(12, n=16, v=507, d=5, biases=False, **scalars)
    hidden = case.tensors["student_hidden"].requires_grad_()
    head = case.tensors["student_head"].requires_grad_(head_learns)
    with Watch() as watch:
        case.fused(backend="torch").total.backward()
    assert len(watch.products) == products
    hidden.grad = head.grad = None
    with Watch() as watch:
        case.plain_total().backward()
    assert watch.largest >= 16 * 507


@pytest.mark.parametrize("options", [{}, {"chunk_size": 6}, {"reduction": "none"}], ids=str)
@pytest.mark.parametrize("implementation", [fused, divide_by_the_mask])
def test_masked_tokens_enter_no_product(
    implementation: Callable[..., Answer], options: dict[str, Any]
) -> None:
    """The tokens of a product are that one of its sizes which is neither V nor D."""
    case = make_case(5, n=20, v=507, d=31, teacher_d=29)
    active = int(case.tensors["loss_mask"].sum())
    with Watch() as watch:
        implementation(case, **options)
    tokens = [size for sizes in watch.products for size in sizes if size not in (507, 31, 29)]
    assert len(tokens) == len(watch.products)
    # Logits of both models, gradients of hidden states and head; without a sum the pass runs again in backward.
    passes = 2 if options.get("reduction") == "none" else 1
    expected = active * (2 * passes + 2)
    assert (sum(tokens) == expected) == (implementation is fused)


def test_no_tensor_of_all_logits_ever_exists() -> None:
    case, _ = make_case(13, n=64, v=507, d=5).leaves()
    with Watch() as watch:
        case.fused(backend="torch", chunk_size=4).total.backward()
    assert watch.largest <= 8 * 507


def test_same_inputs_same_bits() -> None:
    case = make_case(14).cast(torch.float32)
    for name, value in fused(case, chunk_size=5).items():
        assert torch.equal(value, fused(case, chunk_size=5)[name])


def test_functional_gradient_equals_autograd() -> None:
    case = make_case(15, n=9, v=64)
    expected = fused(case)

    def total(learning: dict[str, Tensor]) -> Tensor:
        # Teachers that share the parameters must not receive a gradient through them.
        return case.with_(**learning).fused(backend="torch").total

    learning = {name: case.tensors[name] for name in LEARNING}
    assert_same(torch.func.grad(total)(learning), {name: expected[name] for name in LEARNING})


@pytest.mark.parametrize("learning", [LEARNING, LEARNING[:1], LEARNING[1:2]])
def test_functional_gradient_of_the_per_token_form(learning: tuple[str, ...]) -> None:
    case = make_case(15, n=9, v=64)
    expected = fused(case)

    def loss(tensors: dict[str, Tensor]) -> Tensor:
        out = case.with_(**tensors).fused(backend="torch", reduction="none")
        return (out.weights * out.per_token).sum()

    gradients = torch.func.grad(loss)({name: case.tensors[name] for name in learning})
    assert_same(gradients, {name: expected[name] for name in learning})


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("learning", [LEARNING, LEARNING[:1], LEARNING[1:2]])
def test_a_teacher_may_come_from_inference_mode(learning: tuple[str, ...], reduction: str) -> None:
    case = make_case(22, n=9, v=64)
    expected = fused(case)
    with torch.inference_mode():
        states = {name: case.tensors[name].clone() for name in ("teacher_hidden", "old_log_probs")}
    assert all(tensor.is_inference() for tensor in states.values())
    leaves = {name: case.tensors[name].clone().requires_grad_() for name in learning}
    out = case.with_(**states, **leaves).fused(backend="torch", reduction=reduction)
    loss = out.total if reduction == "sum" else (out.weights * out.per_token).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    assert_same(
        dict(zip(learning, gradients, strict=True)), {name: expected[name] for name in learning}, 1e-12
    )


def test_a_teacher_that_shares_the_head_sends_no_gradient() -> None:
    case = make_case(16, n=9, v=64, biases=False)
    apart = case.with_(teacher_head=case.tensors["student_head"].clone())
    head = case.tensors["student_head"].clone().requires_grad_()
    tied = case.with_(student_head=head, teacher_head=head)
    (gradient,) = torch.autograd.grad(tied.fused(backend="torch").total, head)
    assert relative_error(gradient, fused(apart)["student_head"]) < 1e-12


def test_under_gradient_checkpointing() -> None:
    case, leaves = make_case(17, n=9, v=64).leaves()
    total = checkpoint(
        lambda hidden: case.with_(student_hidden=hidden).fused().total, leaves[0], use_reentrant=False
    )
    expected = fused(case)
    for name, gradient in zip(LEARNING, torch.autograd.grad(total, leaves), strict=True):
        assert relative_error(gradient, expected[name]) < 1e-12


def test_autocast_decides_the_dtype_of_the_products() -> None:
    case = make_case(18, n=9, d=64, v=64).cast(torch.float32)
    states = {name: value for name, value in case.tensors.items() if name.endswith(("hidden", "head"))}
    rounded = fused(case.with_(**{name: value.bfloat16().float() for name, value in states.items()}))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        answer = fused(case)
    assert_same(answer, rounded, 1e-6)
    assert all(answer[name].dtype == torch.float32 for name in LEARNING)
    assert relative_error(answer["total"], fused(case)["total"]) > 1e-5, "autocast changed nothing"


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_in_a_compiled_caller() -> None:
    """The graph breaks around the fused loss; what surrounds it is compiled."""
    case, leaves = make_case(19, n=9, v=64).leaves()
    rest = {name: value for name, value in case.tensors.items() if name != "student_hidden"} | case.scalars

    def step(hidden: Tensor) -> Tensor:
        out = sdpo.fused_topk_distillation_loss(student_hidden=hidden * 2.0, backend="torch", **rest)
        return out.total * 3.0

    compiled = torch.compile(step, backend="aot_eager")
    (expected,) = torch.autograd.grad(step(leaves[0]), leaves[0])
    (got,) = torch.autograd.grad(compiled(leaves[0]), leaves[0])
    assert relative_error(got, expected) < 1e-12
