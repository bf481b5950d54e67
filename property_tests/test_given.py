"""Teachers from elsewhere: top-K ids and log-probabilities in place of logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
from hypothesis import strategies as st
from strategies import Claim, alphas, assert_near, generator, logit_pairs, name_of
from torch import Tensor
from torch.func import grad, vmap

from sdpo import (
    GatheredLogProbs,
    add_tail_bucket,
    check_teacher_topk,
    distillation_loss,
    gather_log_probs,
    generalized_jsd,
    given_topk_distillation_loss,
    renormalize,
    safe_tail,
)

Pair = tuple[Tensor, Tensor]
tails = st.sampled_from(["bucket", "renormalize"])


def served(teacher_logits: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """What a server would return: ids and log-probabilities of the K likeliest tokens."""
    ids = teacher_logits.topk(k, dim=-1).indices
    return ids, torch.log_softmax(teacher_logits / temperature, -1).gather(-1, ids)


# ---- the tail ------------------------------------------------------------------------------------------------


def property_tail_is_what_is_left(tail: Any, pair: Pair, k: int) -> None:
    _, log_probs = served(pair[0], min(k, pair[0].shape[-1]))
    got = tail(log_probs)
    for row, masses, left in zip(
        log_probs.exp().flatten(0, -2).tolist(),
        got.log_probs.exp().flatten(0, -2).tolist(),
        got.log_tail.exp().flatten().tolist(),
        strict=True,
    ):
        assert math.fsum([*masses, left]) == pytest.approx(1.0, abs=1e-12)
        assert left == pytest.approx(max(0.0, 1.0 - math.fsum(row)), abs=1e-12)


def property_too_much_mass_is_scaled_down(tail: Any, pair: Pair, excess: float) -> None:
    log_p = torch.log_softmax(pair[0], -1)
    got = tail(log_p + math.log1p(excess))
    assert_near(got.log_probs, log_p)
    assert (got.log_tail == -math.inf).all()
    gradients = grad(lambda x: tail(x).log_probs.exp().sum() + tail(x).log_tail.exp().sum())(
        log_p + math.log1p(excess)
    )
    assert gradients.isfinite().all()


def tail_by_subtraction(log_probs: Tensor) -> GatheredLogProbs:
    return GatheredLogProbs(log_probs, torch.log(1.0 - log_probs.exp().sum(-1)))


def tail_by_clamping(log_probs: Tensor) -> GatheredLogProbs:
    """The clamp of the reference implementation: never empty, and a sum above 1 stays."""
    log_mass = log_probs.logsumexp(-1).clamp(max=-1e-7)
    return GatheredLogProbs(log_probs, torch.log(-torch.expm1(log_mass)))


# ---- the loss ------------------------------------------------------------------------------------------------


def property_given_is_the_loss_of_the_logits(
    loss: Any, pair: Pair, k: int, alpha: float, tail: str, temperature: float
) -> None:
    student, teacher = pair
    k = min(k, student.shape[-1])
    ids, log_probs = served(teacher, k, temperature)
    expected = [
        oracles.topk_loss(
            [z / temperature for z in s.tolist()],
            [z / temperature for z in t.tolist()],
            row.tolist(),
            alpha,
            tail,
        )
        for s, t, row in zip(*(x.flatten(0, -2) for x in (student, teacher, ids)), strict=True)
    ]
    got = loss(student, ids, log_probs, tail=tail, alpha=alpha, temperature=temperature)
    assert_near(got.flatten(), expected, 1e-8)


def property_the_student_alone_gets_a_gradient(
    loss: Any, pair: Pair, k: int, alpha: float, tail: str
) -> None:
    student, teacher = pair
    ids, log_probs = served(teacher, min(k, student.shape[-1]), 0.7)
    options = {"tail": tail, "alpha": alpha, "temperature": 0.7}
    got = grad(lambda x: loss(x, ids, log_probs, **options).sum())(student)
    for z, w, row, derivative in zip(*(x.flatten(0, -2) for x in (student, teacher, ids, got)), strict=True):
        tempered, chosen = [x / 0.7 for x in w.tolist()], row.tolist()

        def value(point: list[float], tempered: Any = tempered, chosen: Any = chosen) -> float:
            return oracles.topk_loss([x / 0.7 for x in point], tempered, chosen, alpha, tail)

        assert_near(derivative, oracles.numerical_gradient(value, z.tolist()), 1e-6)
    assert (grad(lambda q: loss(student, ids, q, **options).sum())(log_probs) == 0.0).all()


def property_rounded_numbers_stay_usable(loss: Any, pair: Pair, k: int, alpha: float) -> None:
    """As a server sends them: float32, bfloat16 or four decimals; sums above 1 included."""
    student, teacher = pair
    ids, log_probs = served(teacher, min(k, student.shape[-1]))
    options = {"tail": "bucket", "alpha": alpha, "temperature": 1.0}
    exact = loss(student, ids, log_probs, **options)
    for rounded in (log_probs.float(), log_probs.bfloat16(), (log_probs * 1e4).round() / 1e4):
        got = loss(student, ids, rounded.clamp(max=0.0), **options)
        assert got.isfinite().all()
        if rounded.dtype == torch.float32:
            assert ((got - exact).abs() <= 1e-4).all()


def without_temperature(student: Tensor, ids: Tensor, log_probs: Tensor, **options: Any) -> Tensor:
    return given_topk_distillation_loss(student, ids, log_probs, **{**options, "temperature": 1.0})


def with_a_trainable_teacher(student: Tensor, ids: Tensor, log_probs: Tensor, **options: Any) -> Tensor:
    p = renormalize(gather_log_probs(student / options["temperature"], ids).log_probs)
    return generalized_jsd(p, renormalize(log_probs), alpha=options["alpha"])


def with_an_empty_tail(student: Tensor, ids: Tensor, log_probs: Tensor, **options: Any) -> Tensor:
    p, q = gather_log_probs(student, ids), safe_tail(log_probs)
    return generalized_jsd(add_tail_bucket(*p), add_tail_bucket(*q), alpha=options["alpha"])


pairs = logit_pairs(masked=False, max_scale=5.0, min_vocabulary=2).map(
    lambda p: (p[0].clamp(-3, 3), p[1].clamp(-3, 3))
)
batched = pairs.map(lambda p: (p[0][None], p[1][None]))
ks = st.integers(1, 9)
CLAIMS = [
    Claim(property_tail_is_what_is_left, safe_tail, tail_by_clamping, {"pair": batched, "k": ks}),
    Claim(
        property_too_much_mass_is_scaled_down,
        safe_tail,
        tail_by_subtraction,
        {"pair": batched, "excess": st.floats(1e-6, 9e-3)},
    ),
    Claim(
        property_given_is_the_loss_of_the_logits,
        given_topk_distillation_loss,
        without_temperature,
        {"pair": batched, "k": ks, "alpha": alphas, "tail": tails, "temperature": st.floats(0.5, 2.0)},
    ),
    Claim(
        property_the_student_alone_gets_a_gradient,
        given_topk_distillation_loss,
        with_a_trainable_teacher,
        {"pair": batched, "k": ks, "alpha": alphas, "tail": tails},
    ),
    Claim(
        property_rounded_numbers_stay_usable,
        given_topk_distillation_loss,
        with_an_empty_tail,
        {"pair": pairs, "k": ks, "alpha": alphas},
    ),
]


@pytest.mark.parametrize("claim", CLAIMS, ids=name_of)
def test_holds(claim: Claim) -> None:
    claim.holds()


@pytest.mark.parametrize("claim", CLAIMS, ids=name_of)
def test_rejects_its_counter_example(claim: Claim) -> None:
    claim.rejects_counter_example()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_a_certain_teacher_is_no_teacher_that_excludes(alpha: float, tail: Any) -> None:
    """All mass on the K after rounding, masked vocabulary, and K = V: finite in value and gradient."""
    student = torch.tensor([[1.0, 0.0, -1.0, 0.5], [1.0, 0.0, -math.inf, -math.inf]], requires_grad=True)
    ids = torch.tensor([[0, 1], [1, 0]])
    log_probs = torch.tensor([[0.7, 0.3], [0.502, 0.5]]).log()
    loss = given_topk_distillation_loss(student, ids, log_probs, tail=tail, alpha=alpha, temperature=1.0)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert (loss >= 0).all()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    everything = torch.arange(4).expand(2, 4)
    uniform = torch.full((2, 4), 0.25).log()
    full = given_topk_distillation_loss(
        student, everything, uniform, tail="bucket", alpha=1.0, temperature=1.0
    )
    p = student.detach().softmax(-1)
    assert_near(full, (p * (p * 4).log().nan_to_num(neginf=0.0)).sum(-1), 1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_a_teacher_s_top_k_is_the_support_of_the_teacher(alpha: float, tail: Any) -> None:
    student, teacher = torch.randn(2, 3, 4, 9, generator=generator(4), dtype=torch.float64)
    ids, log_probs = served(teacher, 5, temperature=0.7)
    options = {"tail": tail, "alpha": alpha, "temperature": 0.7}
    expected = distillation_loss(student, teacher, support="teacher", k=5, **options)
    assert_near(given_topk_distillation_loss(student, ids, log_probs, **options), expected)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("filler", [0, -1, 10**9])
def test_positions_without_a_loss_may_hold_anything(alpha: float, tail: Any, filler: int) -> None:
    mask = torch.tensor([[True, True, False, True], [False] * 4, [True] * 4])
    options = {"tail": tail, "alpha": alpha, "temperature": 0.8}
    student = STUDENT.masked_fill(~mask[..., None], math.nan).requires_grad_()
    ids = IDS.masked_fill(~mask[..., None], filler)
    log_probs = LOG_PROBS.masked_fill(~mask[..., None], math.nan if filler < 0 else 0.0)
    found = given_topk_distillation_loss(student, ids, log_probs, **options, loss_mask=mask)
    expected = given_topk_distillation_loss(STUDENT[mask], IDS[mask], LOG_PROBS[mask], **options)
    assert_near(found[mask], expected)
    assert found[~mask].eq(0.0).all()
    (gradient,) = torch.autograd.grad(found.sum(), student)
    assert gradient[~mask].eq(0.0).all()
    assert gradient[mask].ne(0.0).any(-1).all()


# ---- transforms, dtypes --------------------------------------------------------------------------------------

STUDENT, TEACHER = torch.randn(2, 3, 4, 9, generator=generator(0), dtype=torch.float64)
IDS, LOG_PROBS = served(TEACHER, 4)


def loss_of(tail: Any, alpha: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda x, i, q: given_topk_distillation_loss(x, i, q, tail=tail, alpha=alpha, temperature=0.8)


cases = pytest.mark.parametrize(
    "loss", [loss_of(t, a) for t in ("bucket", "renormalize") for a in (0.0, 0.5, 1.0)]
)


@cases
def test_transforms(loss: Callable[..., Tensor]) -> None:
    whole = loss(STUDENT, IDS, LOG_PROBS)
    assert_near(vmap(loss)(STUDENT, IDS, LOG_PROBS), whole)
    assert_near(vmap(vmap(loss))(STUDENT, IDS, LOG_PROBS), whole)
    together = grad(lambda x: loss(x, IDS, LOG_PROBS).sum())(STUDENT)
    assert_near(vmap(grad(lambda x, i, q: loss(x, i, q).sum()))(STUDENT, IDS, LOG_PROBS), together)
    leaf = STUDENT.clone().requires_grad_()
    loss(leaf, IDS, LOG_PROBS).sum().backward()
    assert leaf.grad is not None
    assert_near(together, leaf.grad, 1e-14)


@cases
def test_compiles_without_a_graph_break(loss: Callable[..., Tensor]) -> None:
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_near(compiled(STUDENT, IDS, LOG_PROBS), loss(STUDENT, IDS, LOG_PROBS))


@cases
def test_low_precision_is_rounded_once(loss: Callable[..., Tensor]) -> None:
    student = STUDENT.bfloat16()
    got = loss(student, IDS.int(), LOG_PROBS.float())
    assert got.dtype == torch.float32
    assert_near(got, loss(student.double(), IDS, LOG_PROBS.float().double()), 1e-5)


def test_empty_batches() -> None:
    student = torch.zeros(0, 9, requires_grad=True)
    loss_of("bucket", 0.5)(student, torch.zeros(0, 4, dtype=torch.long), torch.zeros(0, 4)).sum().backward()
    assert student.grad is not None


# ---- bad input -------------------------------------------------------------------------------------------------


def check(ids: Any = IDS, log_probs: Any = LOG_PROBS, vocabulary: Any = 9) -> None:
    check_teacher_topk(ids, log_probs, vocabulary)


def loss(**changes: Any) -> Tensor:
    options: dict[str, Any] = {"tail": "bucket", "alpha": 0.5, "temperature": 1.0, **changes}
    return given_topk_distillation_loss(STUDENT, IDS, LOG_PROBS, **options)


def changed(values: Tensor, index: int, value: Any) -> Tensor:
    values = values.clone()
    values.view(-1)[index] = value
    return values


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "float ids": (lambda: check(IDS.float()), TypeError, "ids: .*integer.*float32"),
    "ids of another shape": (lambda: check(IDS[..., :2]), ValueError, r"log_probs: .*\(3, 4, 2\)"),
    "more ids than tokens": (lambda: check(vocabulary=3), ValueError, r"ids.shape\[-1\]: .*\[1, 3\], got 4"),
    "an id beyond the vocabulary": (lambda: check(changed(IDS, 5, 9)), ValueError, r"ids: .*\[0, 9\), got 9"),
    "a padding id": (lambda: check(changed(IDS, 5, -1)), ValueError, r"ids: .*\[0, 9\), got -1"),
    "an id twice": (
        lambda: check(changed(IDS, 25, int(IDS.view(-1)[24]))),
        ValueError,
        r"ids: .*distinct.*twice at position \(1, 2\)",
    ),
    "a mask of numbers": (lambda: loss(loss_mask=torch.ones(3, 4)), TypeError, "loss_mask: .*bool"),
    "a mask of another shape": (
        lambda: loss(loss_mask=torch.ones(3, 5).bool()),
        ValueError,
        r"loss_mask: .*\(3, 4\).*\(3, 5\)",
    ),
    "ids of other positions, with a mask": (
        lambda: given_topk_distillation_loss(
            STUDENT[:, :3],
            IDS[0],
            LOG_PROBS[0],
            loss_mask=torch.ones(3, 3).bool(),
            tail="bucket",
            alpha=0.5,
            temperature=1.0,
        ),
        ValueError,
        "teacher_ids: .*K entries for each position",
    ),
    "NaN": (
        lambda: check(log_probs=changed(LOG_PROBS, 3, math.nan)),
        ValueError,
        "log_probs: .*at most 0, got nan",
    ),
    "probabilities": (lambda: check(log_probs=LOG_PROBS.exp()), ValueError, "log_probs: .*at most 0, got"),
    "conditioned on more": (
        lambda: check(log_probs=LOG_PROBS / 2),
        ValueError,
        "log_probs: .*sum to at most 1.01",
    ),
    "tail of too much": (lambda: safe_tail(torch.zeros(2, 3)), ValueError, "log_probs: .*got a sum of 3"),
    "tail of nothing": (lambda: safe_tail(torch.zeros(2, 0)), ValueError, "log_probs: .*at least one"),
    "unknown tail": (lambda: loss(tail="clamp"), ValueError, "tail: .*got 'clamp'"),
    "alpha above one": (lambda: loss(alpha=2.0), ValueError, "alpha: .*got 2.0"),
    "no temperature": (lambda: loss(temperature=0.0), ValueError, r"temperature: .*\(0, inf\), got 0.0"),
    "vocabulary as text": (lambda: check(vocabulary="9"), TypeError, "vocabulary: .*got '9'"),
    "the loss checks its teacher": (
        lambda: given_topk_distillation_loss(
            STUDENT[..., :5], IDS, LOG_PROBS, tail="bucket", alpha=0.5, temperature=1.0
        ),
        ValueError,
        r"ids: .*\[0, 5\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


def test_values_are_left_alone_where_reading_them_would_wait() -> None:
    check(IDS.to("meta"), LOG_PROBS.to("meta"))
    vmap(lambda i, q: loss_of("bucket", 0.5)(STUDENT[0], i, q))(IDS, LOG_PROBS - 1.0)
