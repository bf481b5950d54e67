"""Weights and masks of the papers after SDPO: each formula written out in loops, and what it must never do."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from strategies import Claim, assert_near, generator, name_of, seeds, token_batches
from torch import Tensor
from torch.func import grad, vmap

from sdpo import (
    confidence_weights,
    contrastive_evidence,
    evidence_gate,
    evidence_weights,
    pass_rate_weights,
    route_rows,
    select_tokens,
)

Batch = tuple[Tensor, Tensor]
flags = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=8)
grouped = st.lists(st.tuples(st.booleans(), st.integers(0, 3)), min_size=1, max_size=12)
masks = token_batches()


def columns(rows: list[tuple[Any, Any]]) -> tuple[Tensor, Tensor]:
    first, second = zip(*rows, strict=True)
    return torch.tensor(first), torch.tensor(second)


def log_probs(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    """Two log-probabilities per token, from almost equal to far apart."""
    values = torch.rand(2, *shape, generator=generator(seed), dtype=torch.float64)
    scale = (0.1, 1.0, 8.0)[seed % 3]
    return -scale * values[0], -scale * values[1]


def loops(values: Tensor) -> list[list[float]]:
    return values.tolist()


# ---- rows --------------------------------------------------------------------------------------------------


def property_failed_rows_with_a_teacher_are_distilled(route: Any, rows: list[tuple[bool, bool]]) -> None:
    policy_gradient, distillation = route(*columns(rows))
    assert distillation.tolist() == [has_teacher and not success for success, has_teacher in rows]
    assert policy_gradient.tolist() == [success or not has_teacher for success, has_teacher in rows]
    assert policy_gradient.dtype == distillation.dtype == torch.bool


def route_by_the_teacher_alone(success: Tensor, has_teacher: Tensor) -> tuple[Tensor, Tensor]:
    return ~has_teacher, has_teacher


def property_row_weights_are_a_loop(weigh: Any, rows: list[tuple[bool, int]]) -> None:
    raw = []
    for _, group in rows:
        peers = [float(success) for success, g in rows if g == group]
        p = statistics.fmean(peers)
        raw.append(math.sqrt(p * (1 - p)))
    mean = statistics.fmean(raw)
    assert_near(weigh(*columns(rows)), [w / mean if mean else 0.0 for w in raw], 1e-6)


def property_groups_that_agree_weigh_exactly_nothing(weigh: Any, rows: list[tuple[bool, int]]) -> None:
    weights = weigh(*columns(rows))
    assert (weights >= 0).all()
    for weight, (_, group) in zip(weights.tolist(), rows, strict=True):
        outcomes = {success for success, g in rows if g == group}
        assert (weight == 0.0) == (len(outcomes) == 1)


def weights_of_the_variance(success: Tensor, group_ids: Tensor) -> Tensor:
    p = ((group_ids[:, None] == group_ids) * success).float().sum(-1) / (group_ids[:, None] == group_ids).sum(
        -1
    )
    raw = p * (1 - p)
    return raw / raw.mean().clamp(min=1e-9)


def weights_with_a_floor(success: Tensor, group_ids: Tensor) -> Tensor:
    return pass_rate_weights(success, group_ids) + 1e-6


# ---- the teacher's entropy ---------------------------------------------------------------------------------


def property_confidence_is_a_loop(weigh: Any, batch: Batch, beta: float) -> None:
    values, mask = batch
    entropy = values.abs()
    raw = [
        [math.exp(-beta * h) if active else 0.0 for h, active in zip(*row, strict=True)]
        for row in zip(loops(entropy), loops(mask), strict=True)
    ]
    count = int(mask.sum())
    mean = math.fsum(map(math.fsum, raw)) / count if count else 1.0
    assert_near(
        weigh(entropy.masked_fill(~mask, math.nan), mask, beta=beta), [[w / mean for w in r] for r in raw]
    )


def property_confidence_survives_underflow(weigh: Any, batch: Batch, beta: float) -> None:
    """exp(−βH) of every token is 0 in floating point; the weights are those of the differences of the entropies."""
    values, mask = batch
    weights = weigh(values.abs(), mask, beta=beta)
    assert_near(weigh(values.abs() + 1e6, mask, beta=beta), weights, 1e-6)
    if mask.any():
        assert_near(weights[mask].mean(), 1.0, 1e-6)


def confidence_by_the_formula(entropy: Tensor, mask: Tensor, *, beta: float) -> Tensor:
    raw = (-beta * entropy).exp() * mask
    return raw / (raw.sum() / mask.sum().clamp(min=1)).clamp(min=1e-30)


# ---- the gap between teacher and student ---------------------------------------------------------------------


def property_evidence_is_a_loop(weigh: Any, seed: int, mix: float, clip: float) -> None:
    student, teacher = log_probs(seed, 3, 4)
    advantages = torch.tensor([1.5, 0.0, -0.5], dtype=torch.float64)
    expected = []
    for a, row_p, row_q in zip(advantages.tolist(), loops(student), loops(teacher), strict=True):
        sign = (a > 0) - (a < 0)
        factors = [
            min(max(math.exp(sign * (q - p)), 1 - clip), 1 + clip) for p, q in zip(row_p, row_q, strict=True)
        ]
        expected.append([a * ((1 - mix) + mix * factor) for factor in factors])
    assert_near(weigh(advantages, student, teacher, mix=mix, clip=clip), expected)
    per_token = advantages[:, None].expand(3, 4)
    assert_near(weigh(per_token, student, teacher, mix=mix, clip=clip), expected)


def property_evidence_flips_no_sign(weigh: Any, seed: int, mix: float, clip: float) -> None:
    student, teacher = (9.0 * values for values in log_probs(seed, 3, 4))
    advantages = torch.randn(3, 4, generator=generator(seed), dtype=torch.float64)
    got = weigh(advantages, student, teacher, mix=mix, clip=clip)
    assert (got * advantages >= 0).all()
    assert (got.abs() <= advantages.abs() * (1 + clip) + 1e-12).all()


def property_evidence_has_no_gradient(weigh: Any, seed: int, mix: float, clip: float) -> None:
    advantages = torch.ones(3, dtype=torch.float64, requires_grad=True)
    student, teacher = (values.requires_grad_() for values in log_probs(seed, 3, 4))
    assert not weigh(advantages, student, teacher, mix=mix, clip=clip).requires_grad


def evidence_without_the_sign(a: Tensor, p: Tensor, q: Tensor, *, mix: float, clip: float) -> Tensor:
    a = a if a.ndim == 2 else a[:, None]
    return a * ((1 - mix) + mix * (q - p).exp().clamp(1 - clip, 1 + clip))


def evidence_added(a: Tensor, p: Tensor, q: Tensor, *, mix: float, clip: float) -> Tensor:
    return a + mix * (q - p).clamp(-clip, clip)


def property_gate_is_a_loop(gate: Any, seed: int, beta: float) -> None:
    student, teacher = log_probs(seed, 2, 5)
    expected = [
        [1 / (1 + math.exp(-beta * (q - p))) for p, q in zip(*rows, strict=True)]
        for rows in zip(loops(student), loops(teacher), strict=True)
    ]
    got = gate(student.requires_grad_(), teacher.requires_grad_(), beta=beta)
    assert_near(got, expected)
    assert not got.requires_grad


def gate_of_the_student(p: Tensor, q: Tensor, *, beta: float) -> Tensor:
    return (beta * (p - q)).sigmoid().detach()


def contrast_cases(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    right = log_probs(seed, 3, 4)[0]
    wrong = log_probs(seed + 1, 3, 2, 4)[1]
    mask = torch.tensor([[True, True], [False, True], [False, False]])
    return right, wrong.masked_fill(~mask[..., None], math.nan), mask


def property_contrast_is_a_loop(contrast: Any, seed: int) -> None:
    right, wrong, mask = contrast_cases(seed)
    expected = []
    for row, log_right in enumerate(loops(right)):
        present = [k for k in range(2) if mask[row, k]]
        expected.append(
            [
                x - math.log(statistics.fmean(math.exp(wrong[row, k, t]) for k in present))
                if present
                else 0.0
                for t, x in enumerate(log_right)
            ]
        )
    got = contrast(right.requires_grad_(), wrong, mask)
    assert_near(got, expected)
    assert not got.requires_grad


def property_what_every_hint_says_cancels(contrast: Any, seed: int) -> None:
    """A change of style that all hints share, and the student's own opinion, leave the evidence as it is."""
    right, wrong, mask = contrast_cases(seed)
    style = log_probs(seed + 2, 3, 4)[0]
    assert_near(contrast(right + style, wrong + style[:, None], mask), contrast(right, wrong, mask))


def contrast_of_gap_means(right: Tensor, wrong: Tensor, mask: Tensor) -> Tensor:
    kept = mask[..., None]
    return (
        (right - wrong.where(kept, 0.0).sum(-2) / kept.sum(-2).clamp(min=1)).where(kept.any(-2), 0.0).detach()
    )


def contrast_with_ghosts(right: Tensor, wrong: Tensor, mask: Tensor) -> Tensor:
    return right - wrong.nan_to_num(0.0).logsumexp(-2)


# ---- tokens ------------------------------------------------------------------------------------------------


def selection(
    entropy: list[float], divergence: list[float], active: list[bool], fraction: float
) -> list[bool]:
    positions = [t for t, a in enumerate(active) if a]
    if not positions:
        return [False] * len(active)
    highest = sorted((entropy[t] for t in positions), reverse=True)[len(positions) // 50]

    def scaled(values: dict[int, float]) -> dict[int, float]:
        low, high = min(values.values()), max(values.values())
        return {t: (x - low) / (high - low) if high > low else 0.0 for t, x in values.items()}

    h = scaled({t: min(entropy[t], highest) for t in positions})
    d = scaled({t: divergence[t] for t in positions})
    score = {t: 1.0 - (1.0 - h[t]) * (1.0 - d[t]) for t in positions}
    count = math.ceil(Fraction(fraction).limit_denominator(1000) * len(positions))
    kept = sorted(positions, key=lambda t: (-score[t], t))[:count]
    return [t in kept for t in range(len(active))]


def token_cases(seed: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Small integers, so that scores tie, and a row without an active token."""
    rng = generator(seed)
    entropy, divergence = torch.randint(0, 5, (2, 3, length), generator=rng).double()
    mask = torch.rand(3, length, generator=rng) < 0.7
    mask[2] = False
    return entropy, divergence, mask


def property_selection_is_a_loop(select: Any, seed: int, length: int, fraction: float) -> None:
    entropy, divergence, mask = token_cases(seed, length)
    expected = [
        selection(*row, fraction)
        for row in zip(loops(entropy), loops(divergence), mask.tolist(), strict=True)
    ]
    dirty = [values.masked_fill(~mask, math.nan) for values in (entropy, divergence)]
    assert select(*dirty, mask, fraction=fraction).tolist() == expected


def property_selection_has_the_exact_size(select: Any, seed: int, length: int, fraction: float) -> None:
    entropy, divergence, mask = token_cases(seed, length)
    kept = select(entropy, divergence, mask, fraction=fraction)
    share = Fraction(fraction).limit_denominator(1000)
    assert kept.sum(-1).tolist() == [math.ceil(share * int(active)) for active in mask.sum(-1)]
    assert not (kept & ~mask).any()
    assert (select(entropy, divergence, mask, fraction=1.0) == mask).all()


def property_selection_of_a_row_is_its_own(select: Any, seed: int, length: int, fraction: float) -> None:
    cases = token_cases(seed, length)
    alone = [select(*(values[row] for values in cases), fraction=fraction) for row in range(3)]
    assert torch.equal(select(*cases, fraction=fraction), torch.stack(alone))


def selection_by_entropy(entropy: Tensor, divergence: Tensor, mask: Tensor, *, fraction: float) -> Tensor:
    return select_tokens(entropy, torch.zeros_like(entropy), mask, fraction=fraction)


def selection_by_threshold(entropy: Tensor, divergence: Tensor, mask: Tensor, *, fraction: float) -> Tensor:
    return mask & (entropy >= entropy.nanquantile(1.0 - fraction, dim=-1, keepdim=True))


def selection_of_the_batch(entropy: Tensor, divergence: Tensor, mask: Tensor, *, fraction: float) -> Tensor:
    values = (entropy.flatten(), divergence.flatten(), mask.flatten())
    return select_tokens(*values, fraction=fraction).view(mask.shape)


fractions = st.sampled_from([0.07, 0.1, 1 / 3, 0.5, 2 / 3, 0.9, 1.0]) | st.integers(1, 100).map(
    lambda n: n / 100
)
pair = {"seed": seeds}
gaps = {"seed": seeds, "mix": st.floats(0.0, 1.0), "clip": st.floats(0.05, 1.0)}
selected = {"seed": seeds, "length": st.sampled_from([1, 5, 20, 120]), "fraction": fractions}
CLAIMS = [
    Claim(
        property_failed_rows_with_a_teacher_are_distilled,
        route_rows,
        route_by_the_teacher_alone,
        {"rows": flags},
    ),
    Claim(property_row_weights_are_a_loop, pass_rate_weights, weights_of_the_variance, {"rows": grouped}),
    Claim(
        property_groups_that_agree_weigh_exactly_nothing,
        pass_rate_weights,
        weights_with_a_floor,
        {"rows": grouped},
    ),
    Claim(
        property_confidence_is_a_loop,
        confidence_weights,
        confidence_by_the_formula,
        {"batch": masks, "beta": st.floats(0.0, 5.0)},
    ),
    Claim(
        property_confidence_survives_underflow,
        confidence_weights,
        confidence_by_the_formula,
        {"batch": masks, "beta": st.floats(0.1, 5.0)},
    ),
    Claim(property_evidence_is_a_loop, evidence_weights, evidence_without_the_sign, gaps),
    Claim(property_evidence_flips_no_sign, evidence_weights, evidence_added, gaps),
    Claim(property_evidence_has_no_gradient, evidence_weights, evidence_without_the_sign, gaps),
    Claim(
        property_gate_is_a_loop, evidence_gate, gate_of_the_student, {**pair, "beta": st.floats(0.0, 10.0)}
    ),
    Claim(property_contrast_is_a_loop, contrastive_evidence, contrast_of_gap_means, pair),
    Claim(property_what_every_hint_says_cancels, contrastive_evidence, contrast_with_ghosts, pair),
    Claim(property_selection_is_a_loop, select_tokens, selection_by_entropy, selected),
    Claim(property_selection_has_the_exact_size, select_tokens, selection_by_threshold, selected),
    Claim(property_selection_of_a_row_is_its_own, select_tokens, selection_of_the_batch, selected),
]


@pytest.mark.parametrize("claim", CLAIMS, ids=name_of)
def test_holds(claim: Claim) -> None:
    claim.holds()


@pytest.mark.parametrize("claim", CLAIMS, ids=name_of)
def test_rejects_its_counter_example(claim: Claim) -> None:
    claim.rejects_counter_example()


# ---- single cases ------------------------------------------------------------------------------------------


def test_impossible_tokens_have_a_meaning() -> None:
    never = torch.tensor([[-math.inf, -math.inf, -1.0]])
    teacher = torch.tensor([[-math.inf, -1.0, -math.inf]])
    assert_near(evidence_gate(never, teacher, beta=5.0), [[0.5, 1.0, 0.0]], 1e-6)
    weighted = evidence_weights(torch.tensor([2.0]), never, teacher, mix=1.0, clip=0.25)
    assert weighted.tolist() == [[2.0, 2.5, 1.5]]
    assert (evidence_weights(torch.tensor([0.0]), never, teacher, mix=1.0, clip=0.25) == 0.0).all()
    one = torch.ones(1, 1, dtype=torch.bool)
    assert contrastive_evidence(never, teacher[:, None], one).tolist() == [[0.0, -20.0, 20.0]]


def test_nothing_active_and_nothing_there() -> None:
    empty, none = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    assert confidence_weights(empty, none, beta=1.0).tolist() == empty.tolist()
    assert not select_tokens(empty, empty, none, fraction=0.5).any()
    assert select_tokens(empty[:, :0], empty[:, :0], none[:, :0], fraction=0.5).shape == (2, 0)
    assert pass_rate_weights(none[0, :0], none[0, :0].long()).shape == (0,)
    assert pass_rate_weights(none[0], none[0].long()).tolist() == [0.0, 0.0, 0.0]
    assert contrastive_evidence(empty, torch.zeros(2, 0, 3), none[:, :0]).tolist() == empty.tolist()


def test_equal_scores_keep_the_earlier_token() -> None:
    equal = torch.ones(1, 5)
    active = torch.tensor([[False, True, True, True, True]])
    assert select_tokens(equal, equal, active, fraction=0.5).tolist() == [[False, True, True, False, False]]


def test_rounding_does_not_choose_between_the_two_highest_scores() -> None:
    """The highest entropy and the highest divergence of a row both have the score 1."""
    generator = torch.Generator().manual_seed(0)
    entropy, divergence = torch.rand(2, 200, 5, generator=generator)
    entropy[:, 0], divergence[:, 1] = 2.0, 2.0
    entropy[100:], divergence[100:] = divergence[100:].clone(), entropy[100:].clone()
    kept = select_tokens(entropy, divergence, torch.ones(200, 5, dtype=torch.bool), fraction=0.2)
    assert kept.nonzero()[:, 1].tolist() == [0] * 200


def test_an_outlier_does_not_hide_the_other_entropies() -> None:
    """Of 100 tokens the two highest entropies count as the third; scaled by them, 1.0 and 0.5 would be nothing."""
    entropy = torch.zeros(1, 100)
    entropy[0, :4] = torch.tensor([1e4, 1e4, 1.0, 0.5])
    divergence = torch.zeros(1, 100)
    divergence[0, 4] = divergence[0, 5] = 0.4
    divergence[0, 6] = 1.0
    active = torch.ones(1, 100, dtype=torch.bool)
    kept = select_tokens(entropy, divergence, active, fraction=0.05)[0].nonzero().flatten().tolist()
    assert kept == [0, 1, 2, 3, 6]


def test_an_infinite_divergence_comes_first() -> None:
    entropy, divergence = torch.tensor([[1.0, 0.0, 0.5]]), torch.tensor([[0.0, math.inf, 1.0]])
    active = torch.ones(1, 3, dtype=torch.bool)
    assert select_tokens(entropy, divergence, active, fraction=0.3).tolist() == [[True, False, False]]
    assert select_tokens(entropy, divergence, active, fraction=0.6).tolist() == [[True, True, False]]


# ---- transforms, dtypes, devices -----------------------------------------------------------------------------

ROWS, TOKENS = 4, 5
STUDENT, TEACHER = log_probs(7, 3, ROWS, TOKENS)
MASK = torch.rand(3, ROWS, TOKENS, generator=generator(1)) < 0.7
SUCCESS = torch.tensor([[True, False, True, True], [False, False, False, True], [True, True, False, False]])
GROUPS = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1], [2, 2, 2, 2]])
WRONG = log_probs(8, 3, ROWS, 2, TOKENS)[0]
SIBLINGS = torch.rand(3, ROWS, 2, generator=generator(2)) < 0.7
FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "route_rows": (lambda s, t: torch.stack(route_rows(s, t)), (SUCCESS, SUCCESS.flip(0))),
    "pass_rate_weights": (pass_rate_weights, (SUCCESS, GROUPS)),
    "confidence_weights": (lambda h, m: confidence_weights(h, m, beta=1.0), (-STUDENT, MASK)),
    "evidence_weights": (
        lambda a, p, q: evidence_weights(a, p, q, mix=0.5, clip=0.2),
        (-1 - STUDENT, STUDENT, TEACHER),
    ),
    "evidence_gate": (lambda p, q: evidence_gate(p, q, beta=5.0), (STUDENT, TEACHER)),
    "contrastive_evidence": (contrastive_evidence, (STUDENT, WRONG, SIBLINGS)),
    "select_tokens": (lambda h, d, m: select_tokens(h, d, m, fraction=0.5), (-STUDENT, -TEACHER, MASK)),
}
parametrize_functions = pytest.mark.parametrize("name", FUNCTIONS)


def check_vmap_is_a_loop(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> None:
    one_by_one = torch.stack([function(*batch) for batch in zip(*inputs, strict=True)])
    assert_near(vmap(function)(*inputs), one_by_one)


@parametrize_functions
def test_vmap_is_a_loop(name: str) -> None:
    check_vmap_is_a_loop(*FUNCTIONS[name])


@pytest.mark.parametrize("name", ["confidence_weights", "evidence_gate"])
def test_a_function_of_the_other_batches_is_rejected(name: str) -> None:
    function, inputs = FUNCTIONS[name]
    with pytest.raises(RuntimeError, match="vmap"):
        check_vmap_is_a_loop(lambda *given: function(*given) * float(given[0].sum()), inputs)


@parametrize_functions
def test_no_gradient_under_func_grad(name: str) -> None:
    function, inputs = FUNCTIONS[name]
    for index, value in enumerate(inputs):
        if value.is_floating_point():

            def total(x: Tensor, index: int = index) -> Tensor:
                weights = function(*inputs[:index], x, *inputs[index + 1 :])
                return (weights.to(x.dtype) * x.sum().sin()).sum()

            weights = function(*inputs).to(value.dtype)
            assert_near(grad(total)(value), (weights.sum() * value.sum().cos()).expand_as(value))


@parametrize_functions
def test_compiles_without_a_graph_break(name: str) -> None:
    function, inputs = FUNCTIONS[name]
    batch = tuple(value[0] for value in inputs)
    torch.compiler.reset()
    assert_near(torch.compile(function, fullgraph=True, backend="aot_eager")(*batch), function(*batch))


@parametrize_functions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_rounded_once(name: str, dtype: torch.dtype) -> None:
    function, inputs = FUNCTIONS[name]
    rounded = tuple(value.to(dtype) if value.is_floating_point() else value for value in inputs)
    exact = tuple(value.double() if value.is_floating_point() else value for value in rounded)
    got = vmap(function)(*rounded)
    assert got.dtype in (torch.bool, torch.float32)
    assert_near(got, vmap(function)(*exact), 1e-5)


# ---- bad input ---------------------------------------------------------------------------------------------

P, Q, M = STUDENT[0], TEACHER[0], MASK[0]
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "success as numbers": (
        lambda: route_rows(SUCCESS.float(), SUCCESS),
        TypeError,
        "success: .*bool.*float32",
    ),
    "teacher of another size": (
        lambda: route_rows(SUCCESS, SUCCESS[:2]),
        ValueError,
        r"has_teacher: .*\(3, 4\)",
    ),
    "two-dimensional rewards": (
        lambda: pass_rate_weights(SUCCESS, GROUPS),
        ValueError,
        "success: .*one dimension",
    ),
    "float groups": (
        lambda: pass_rate_weights(SUCCESS[0], GROUPS[0].float()),
        TypeError,
        "group_ids: .*integer",
    ),
    "negative beta": (lambda: confidence_weights(P, M, beta=-1.0), ValueError, "beta: .*got -1.0.*falls"),
    "infinite beta": (lambda: evidence_gate(P, Q, beta=math.inf), ValueError, "beta: .*got inf.*opens"),
    "beta NaN": (lambda: evidence_gate(P, Q, beta=math.nan), ValueError, "beta: .*got nan"),
    "beta as text": (lambda: evidence_gate(P, Q, beta="5"), TypeError, "beta: .*got '5'"),
    "float mask": (lambda: confidence_weights(P, M.float(), beta=1.0), TypeError, "loss_mask: .*bool"),
    "gap of two shapes": (
        lambda: evidence_gate(P, Q[:2], beta=1.0),
        ValueError,
        r"teacher_log_probs: .*\(4, 5\)",
    ),
    "advantages per column": (
        lambda: evidence_weights(P[0], P, Q, mix=0.5, clip=0.2),
        ValueError,
        r"advantages: .*\(4,\) \(one per row\), got \(5,\)",
    ),
    "a clip that could flip signs": (
        lambda: evidence_weights(P, P, Q, mix=0.5, clip=1.5),
        ValueError,
        r"clip: .*\(0, 1\], got 1.5",
    ),
    "mix above one": (
        lambda: evidence_weights(P, P, Q, mix=2, clip=0.2),
        ValueError,
        r"mix: .*\[0, 1\], got 2",
    ),
    "peers without an axis": (
        lambda: contrastive_evidence(P, Q, SIBLINGS[0]),
        ValueError,
        "wrong: .*peers",
    ),
    "peer mask per token": (
        lambda: contrastive_evidence(P, WRONG[0], M),
        ValueError,
        r"wrong_mask: .*\(4, 2\).*got \(4, 5\)",
    ),
    "no fraction": (
        lambda: select_tokens(P, Q, M, fraction=0.0),
        ValueError,
        r"fraction: .*\(0, 1\], got 0.0",
    ),
    "count for a fraction": (lambda: select_tokens(P, Q, M, fraction=20), ValueError, "fraction: .*got 20"),
    "divergence per row": (
        lambda: select_tokens(P, Q[:, 0], M, fraction=0.5),
        ValueError,
        r"divergence: .*\(4, 5\)",
    ),
    "another device": (
        lambda: evidence_gate(P, Q.to("meta"), beta=1.0),
        ValueError,
        "teacher_log_probs: .*cpu.*meta",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
