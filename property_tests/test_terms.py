"""Terms beside the divergence: policy gradient, sampled distillation, anchors, clipped entries, mixtures."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
from hypothesis import strategies as st
from strategies import Claim, alphas, assert_near, generator, logit_pairs, logits, name_of, seeds
from torch import Tensor
from torch.func import grad, vmap

from sdpo import (
    anchor,
    anchor_estimate,
    clip_entries,
    clipped_policy_gradient,
    generalized_jsd,
    kl_divergence,
    mixture_log_probs,
    sampled_reverse_kl,
    trust_region_logits,
)

Pair = tuple[Tensor, Tensor]


def normalized(pair: Pair) -> Pair:
    return torch.log_softmax(pair[0], -1), torch.log_softmax(pair[1], -1)


def token_log_probs(seed: int, *shape: int) -> Pair:
    """Log-probabilities of sampled tokens, from almost equal to far apart."""
    values = torch.rand(2, *shape, generator=generator(seed), dtype=torch.float64)
    scale = (0.1, 1.0, 8.0)[seed % 3]
    return -scale * values[0], -scale * values[1]


def per_vocabulary(loss: Callable[[Tensor], Tensor], log_probs: Tensor) -> Tensor:
    """E[∇loss] over the tokens of the vocabulary: the gradient of a mean over infinitely many samples."""
    leaf = log_probs.clone().requires_grad_()
    normalized_leaf = torch.log_softmax(leaf, -1)
    (normalized_leaf.detach().exp() * loss(normalized_leaf)).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def gradient(loss: Callable[[Tensor], Tensor], log_probs: Tensor) -> Tensor:
    leaf = log_probs.clone().requires_grad_()
    loss(torch.log_softmax(leaf, -1)).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


# ---- policy gradient -----------------------------------------------------------------------------------------


def trl_grpo(new: Tensor, old: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float) -> Tensor:
    """The two-sided clip of TRL's GRPO, per token."""
    advantages = advantages if advantages.ndim == 2 else advantages.unsqueeze(1)
    coef_1 = torch.exp(new - old)
    coef_2 = torch.clamp(coef_1, 1 - clip_low, 1 + clip_high)
    return -torch.min(coef_1 * advantages, coef_2 * advantages)


def property_surrogate_is_a_loop(surrogate: Any, seed: int, low: float, high: float) -> None:
    new, old = token_log_probs(seed, 3, 4)
    advantages = torch.tensor([1.5, 0.0, -0.5], dtype=torch.float64)
    expected = []
    for a, row_new, row_old in zip(advantages.tolist(), new.tolist(), old.tolist(), strict=True):
        ratios = [math.exp(n - o) for n, o in zip(row_new, row_old, strict=True)]
        expected.append([-min(r * a, min(max(r, 1 - low), 1 + high) * a) for r in ratios])
    assert_near(surrogate(new, old, advantages, clip_low=low, clip_high=high), expected)


def property_surrogate_is_that_of_trl(surrogate: Any, seed: int, low: float, high: float) -> None:
    new, old = token_log_probs(seed, 3, 4)
    advantages = torch.randn(3, 4, generator=generator(seed), dtype=torch.float64)
    options = {"clip_low": low, "clip_high": high}
    assert_near(surrogate(new, old, advantages, **options), trl_grpo(new, old, advantages, **options))
    ours, theirs = (
        grad(lambda x, f=f: f(x, old, advantages, **options).sum())(new) for f in (surrogate, trl_grpo)
    )
    assert_near(ours, theirs)


def property_on_policy_it_is_the_policy_gradient(surrogate: Any, seed: int, low: float, high: float) -> None:
    new, _ = token_log_probs(seed, 3, 4)
    advantages = torch.randn(3, generator=generator(seed), dtype=torch.float64)
    leaf = new.clone().requires_grad_()
    surrogate(leaf, leaf.detach(), advantages, clip_low=low, clip_high=high).sum().backward()
    assert leaf.grad is not None
    assert_near(leaf.grad, -advantages[:, None].expand(3, 4))


def surrogate_of_one_clip(
    new: Tensor, old: Tensor, a: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """Clipped whatever the advantage asks for: a token that went the wrong way gets no gradient back."""
    a = a if a.ndim == 2 else a[:, None]
    return -(new - old).exp().clamp(1 - clip_low, 1 + clip_high) * a


def surrogate_of_one_width(
    new: Tensor, old: Tensor, a: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    return clipped_policy_gradient(new, old, a, clip_low=clip_low, clip_high=clip_low)


def surrogate_of_the_log(new: Tensor, old: Tensor, a: Tensor, *, clip_low: float, clip_high: float) -> Tensor:
    return 2.0 * trl_grpo(new, old, a, clip_low=clip_low, clip_high=clip_high)


# ---- one token -------------------------------------------------------------------------------------------------


def property_sampled_value_and_gradient(loss: Any, seed: int) -> None:
    student, teacher = token_log_probs(seed, 3, 4)
    gaps = [
        [p - q for p, q in zip(*rows, strict=True)]
        for rows in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    assert_near(loss(student, teacher), gaps)
    assert_near(grad(lambda p: loss(p, teacher).sum())(student), gaps)
    assert (grad(lambda q: loss(student, q).sum())(teacher) == 0.0).all()


def property_sampled_mean_is_the_divergence(loss: Any, pair: Pair) -> None:
    """Over all tokens, each as often as the student draws it: value and gradient of KL(p‖q)."""
    log_p, log_q = normalized(pair)
    assert_near((log_p.exp() * loss(log_p, log_q)).sum(-1), kl_divergence(log_p, log_q))
    expected = gradient(lambda x: kl_divergence(x, log_q), log_p)
    assert_near(per_vocabulary(lambda x: loss(x, log_q), log_p), expected)


def difference_of_logs(log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """The right value; its mean gradient is 0 whatever the teacher says."""
    return log_probs - teacher_log_probs.detach()


def property_estimate_is_never_negative_and_right_on_average(estimate: Any, pair: Pair) -> None:
    """The value is that of KL(p‖p_0), the gradient that of KL(p_0‖p)."""
    log_p, log_0 = normalized(pair)
    per_token = estimate(log_p, log_0)
    assert (per_token >= 0).all()
    assert_near((log_p.exp() * per_token).sum(-1), kl_divergence(log_p, log_0))
    assert_near(
        per_vocabulary(lambda x: estimate(x, log_0), log_p),
        gradient(lambda x: kl_divergence(log_0, x), log_p),
    )


def half_the_square(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    return 0.5 * (log_probs - reference_log_probs.detach()).square()


def property_estimate_is_that_of_trl(estimate: Any, seed: int) -> None:
    policy, reference = token_log_probs(seed, 3, 4)
    theirs = torch.exp(reference - policy) - (reference - policy) - 1
    assert_near(estimate(policy, reference), theirs)


# ---- the whole vocabulary ------------------------------------------------------------------------------------


def property_anchor_is_the_divergence(distance: Any, pair: Pair) -> None:
    log_p, log_0 = normalized(pair)
    assert_near(distance(log_p, log_0), oracles.per_row(oracles.kl, log_p, log_0))
    assert (
        grad(lambda x: distance(log_p, x).where(distance(log_p, x).isfinite(), 0.0).sum())(log_0) == 0.0
    ).all()


def entries(log_p: list[float], log_q: list[float], alpha: float, clip: float) -> float:
    def bregman(x: float, y: float) -> float:
        if x == 0.0:
            return y
        return math.inf if y == 0.0 else x * math.log(x / y) - x + y

    total = []
    for p, q in zip(map(math.exp, log_p), map(math.exp, log_q), strict=True):
        m = (1 - alpha) * p + alpha * q
        if alpha == 0.0:
            entry = bregman(q, p)
        elif alpha == 1.0:
            entry = bregman(p, q)
        else:
            entry = (1 - alpha) * bregman(p, m) + alpha * bregman(q, m)
        total.append(min(entry, clip))
    return math.fsum(total)


def property_clipped_entries_are_a_loop(divergence: Any, pair: Pair, alpha: float, clip: float) -> None:
    log_p, log_q = normalized(pair)
    expected = oracles.per_row(lambda p, q: entries(p, q, alpha, clip), log_p, log_q)
    assert_near(divergence(log_p, log_q, alpha=alpha, clip=clip), expected, 1e-9)


def property_clipped_entries_are_bounded(divergence: Any, pair: Pair, alpha: float, clip: float) -> None:
    log_p, log_q = normalized(pair)
    got = divergence(log_p, log_q, alpha=alpha, clip=clip)
    assert (got >= 0).all()
    assert (got <= clip * log_p.shape[-1] + 1e-12).all()
    assert (got <= divergence(log_p, log_q, alpha=alpha, clip=2 * clip) + 1e-12).all()


def property_unclipped_it_is_the_divergence(divergence: Any, pair: Pair, alpha: float) -> None:
    log_p, log_q = normalized(pair)
    assert_near(
        divergence(log_p, log_q, alpha=alpha, clip=math.inf), generalized_jsd(log_p, log_q, alpha=alpha)
    )


def property_unclipped_gradient_is_the_divergence_s(divergence: Any, pair: Pair, alpha: float) -> None:
    student, log_q = pair[0], torch.log_softmax(pair[1], -1)
    got = gradient(lambda x: divergence(x, log_q, alpha=alpha, clip=math.inf), student)
    assert_near(got, gradient(lambda x: generalized_jsd(x, log_q, alpha=alpha), student))


def property_clipped_entries_send_no_gradient(divergence: Any, pair: Pair, alpha: float) -> None:
    """The clip below every entry that is not 0: the value depends on nothing any more."""
    log_p, log_q = normalized(pair)
    got = grad(lambda x: divergence(x, log_q, alpha=alpha, clip=1e-300).sum())(log_p)
    agreed = (log_p - log_q).abs() < 1e-6
    assert (got[~agreed] == 0.0).all()


def clipped_kl_terms(log_p: Tensor, log_q: Tensor, *, alpha: float, clip: float) -> Tensor:
    """The terms of OPSD's code, which can be negative at both ends."""
    log_m = ((1 - alpha) * log_p.exp() + alpha * log_q.exp()).log()
    if alpha in (0.0, 1.0):
        first, second = (log_q, log_p) if alpha == 0.0 else (log_p, log_q)
        terms = first.exp() * (first - second)
    else:
        terms = (1 - alpha) * log_p.exp() * (log_p - log_m) + alpha * log_q.exp() * (log_q - log_m)
    return terms.nan_to_num(0.0).clamp(max=clip).sum(-1)


def bregman_without_masks(log_p: Tensor, log_q: Tensor, *, alpha: float, clip: float) -> Tensor:
    def terms(x: Tensor, y: Tensor) -> Tensor:
        return x.exp() * (x - y) - x.exp() + y.exp()

    log_m = torch.logaddexp(log_p + math.log(max(1 - alpha, 1e-300)), log_q + math.log(max(alpha, 1e-300)))
    return ((1 - alpha) * terms(log_p, log_m) + alpha * terms(log_q, log_m)).clamp(max=clip).sum(-1)


def renormalized_clip(log_p: Tensor, log_q: Tensor, *, alpha: float, clip: float) -> Tensor:
    full = generalized_jsd(log_p, log_q, alpha=alpha)
    return full * (clip / full.detach()).clamp(max=1.0)


# ---- several teachers ----------------------------------------------------------------------------------------


def mixture(teachers: list[list[float]], weights: list[float], kind: str) -> list[float]:
    columns = list(zip(*teachers, strict=True))
    if kind == "arithmetic":
        return [
            oracles.log_mass(
                [math.log(w) + x if w else -math.inf for w, x in zip(weights, column, strict=True)]
            )
            for column in columns
        ]
    pooled = [
        math.fsum(w * x if w else 0.0 for w, x in zip(weights, column, strict=True)) for column in columns
    ]
    return oracles.log_softmax(pooled) if max(pooled) > -math.inf else pooled


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[list[Tensor], list[float]]:
    count, vocabulary = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    teachers = [torch.log_softmax(draw(logits(shape=(2, vocabulary))), -1) for _ in range(count)]
    raw = draw(st.lists(st.integers(0, 4), min_size=count, max_size=count).filter(any))
    return teachers, [w / sum(raw) for w in raw]


def property_mixture_is_a_loop(mix: Any, mixed: tuple[list[Tensor], list[float]], kind: str) -> None:
    teachers, weights = mixed
    expected = [
        mixture([teacher[row].tolist() for teacher in teachers], weights, kind)
        for row in range(len(teachers[0]))
    ]
    assert_near(mix(teachers, weights, kind=kind), expected, 1e-8)


def property_geometric_pair_is_the_trust_region(mix: Any, pair: Pair, share: float) -> None:
    expected = torch.log_softmax(trust_region_logits(*pair, coef=share), -1)
    assert_near(mix(list(normalized(pair)), [1 - share, share], kind="geometric"), expected)


def property_a_mixture_of_itself_is_itself(mix: Any, pair: Pair, share: float) -> None:
    log_p, _ = normalized(pair)
    for kind in ("geometric", "arithmetic"):
        assert_near(mix([log_p, log_p], [share, 1 - share], kind=kind), log_p)
        assert_near(mix([log_p, torch.full_like(log_p, -math.inf)], [1, 0], kind=kind), log_p)


def pool_of_logs(teachers: list[Tensor], weights: list[float], *, kind: str) -> Tensor:
    """Not normalised."""
    return sum(w * t for w, t in zip(weights, teachers, strict=True))  # type: ignore[return-value]


def pool_of_probabilities(teachers: list[Tensor], weights: list[float], *, kind: str) -> Tensor:
    return mixture_log_probs(teachers, weights, kind="arithmetic")


any_pair, finite_pair = logit_pairs(), logit_pairs(masked=False)
mild_pair = logit_pairs(masked=False, max_scale=1.0)
policies = {"seed": seeds, "low": st.floats(0.0, 1.0), "high": st.floats(0.0, 3.0)}
clipped = {"pair": any_pair, "alpha": alphas, "clip": st.floats(1e-3, 1.0)}
unclipped = {"pair": any_pair, "alpha": alphas}
shared = {"pair": finite_pair, "share": st.floats(0.01, 0.99)}
CLAIMS = [
    Claim(property_surrogate_is_a_loop, clipped_policy_gradient, surrogate_of_one_clip, policies),
    Claim(property_surrogate_is_that_of_trl, clipped_policy_gradient, surrogate_of_one_width, policies),
    Claim(
        property_on_policy_it_is_the_policy_gradient, clipped_policy_gradient, surrogate_of_the_log, policies
    ),
    Claim(property_sampled_value_and_gradient, sampled_reverse_kl, difference_of_logs, {"seed": seeds}),
    Claim(
        property_sampled_mean_is_the_divergence, sampled_reverse_kl, difference_of_logs, {"pair": finite_pair}
    ),
    Claim(
        property_estimate_is_never_negative_and_right_on_average,
        anchor_estimate,
        half_the_square,
        {"pair": mild_pair},
    ),
    Claim(property_estimate_is_that_of_trl, anchor_estimate, half_the_square, {"seed": seeds}),
    Claim(property_anchor_is_the_divergence, anchor, lambda p, q: anchor(q, p), {"pair": any_pair}),
    Claim(property_clipped_entries_are_a_loop, clip_entries, clipped_kl_terms, clipped),
    Claim(property_clipped_entries_are_bounded, clip_entries, clipped_kl_terms, clipped),
    Claim(property_unclipped_it_is_the_divergence, clip_entries, bregman_without_masks, unclipped),
    Claim(
        property_unclipped_gradient_is_the_divergence_s,
        clip_entries,
        bregman_without_masks,
        {"pair": logit_pairs(same_mask=True), "alpha": alphas},
    ),
    Claim(
        property_clipped_entries_send_no_gradient,
        clip_entries,
        renormalized_clip,
        {"pair": mild_pair, "alpha": alphas},
    ),
    Claim(
        property_mixture_is_a_loop,
        mixture_log_probs,
        pool_of_logs,
        {"mixed": mixtures(), "kind": st.sampled_from(["geometric", "arithmetic"])},
    ),
    Claim(property_geometric_pair_is_the_trust_region, mixture_log_probs, pool_of_probabilities, shared),
    Claim(
        property_a_mixture_of_itself_is_itself,
        mixture_log_probs,
        pool_of_logs,
        {"pair": any_pair, "share": st.floats(0.01, 0.99)},
    ),
]


@pytest.mark.parametrize("claim", CLAIMS, ids=name_of)
def test_holds(claim: Claim) -> None:
    claim.holds()


@pytest.mark.parametrize("claim", CLAIMS, ids=name_of)
def test_rejects_its_counter_example(claim: Claim) -> None:
    claim.rejects_counter_example()


# ---- single cases --------------------------------------------------------------------------------------------


def test_raw_kl_terms_turn_a_clipped_loss_negative() -> None:
    """Why the entries at the ends are not those of OPSD's code."""
    log_p, log_q = torch.tensor([[0.98, 0.02], [0.02, 0.98]], dtype=torch.float64).log()
    assert clipped_kl_terms(log_p, log_q, alpha=0.0, clip=0.05) < 0
    assert clip_entries(log_p, log_q, alpha=0.0, clip=0.05).item() == pytest.approx(0.1)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_agreement_in_float32_is_nearly_exact(alpha: float) -> None:
    """1e-4 apart: the divergence is 1e-8 of the probabilities it is made of."""
    rng = generator(3)
    student = torch.randn(64, 50, generator=rng, dtype=torch.float64)
    teacher = student + 1e-3 * torch.randn(64, 50, generator=rng, dtype=torch.float64)
    log_p, log_q = (values.float() for values in normalized((student, teacher)))
    exact = clip_entries(log_p.double(), log_q.double(), alpha=alpha, clip=math.inf)
    torch.testing.assert_close(
        clip_entries(log_p, log_q, alpha=alpha, clip=math.inf).double(), exact, rtol=0.02, atol=1e-10
    )


def test_impossible_tokens_are_finite_in_value_and_gradient() -> None:
    """A policy that cannot draw a token, a teacher that excludes one, and both."""
    policy = torch.tensor([-math.inf, -math.inf, -1.0], requires_grad=True)
    other = torch.tensor([-1.0, -math.inf, -math.inf])
    ones = torch.ones(3)
    for loss, expected in (
        (sampled_reverse_kl(policy, other), [0.0, 0.0, math.inf]),
        (anchor_estimate(policy, other), [0.0, 0.0, math.inf]),
        (clipped_policy_gradient(policy, other, ones, clip_low=0.2, clip_high=0.2), [0.0, -1.0, -1.2]),
        (
            clipped_policy_gradient(policy, other, -ones, clip_low=1.0, clip_high=9.0),
            [0.0, 1.0, math.exp(20)],
        ),
    ):
        assert_near(loss, expected, 1e-6)
        policy.grad = None
        loss.sum().backward()
        assert policy.grad is not None
        assert policy.grad.isfinite().all()


@pytest.mark.parametrize(
    ("limit", "losses", "moves"),
    [(math.inf, [-1.2, 0.9, 3.0, 9.0], [0, 1, 1, 1]), (4.0, [-1.2, 0.9, 3.0, 4.0], [0, 1, 1, 0])],
)
def test_two_sided_clipping(limit: float, losses: list[float], moves: list[int]) -> None:
    """Above the limit a negative advantage no longer moves the policy; a positive one was clipped before."""
    log_probs = torch.tensor([9.0, 0.9, 3.0, 9.0]).log().requires_grad_()
    advantages = torch.tensor([1.0, -1.0, -1.0, -1.0])
    loss = clipped_policy_gradient(
        log_probs, torch.zeros(4), advantages, clip_low=0.2, clip_high=0.2, ratio_limit=limit
    )
    assert_near(loss, losses, 1e-6)
    loss.sum().backward()
    assert log_probs.grad is not None
    assert (log_probs.grad != 0).int().tolist() == moves


def test_a_token_of_no_known_policy_is_on_policy() -> None:
    log_probs = torch.tensor([-1.0, -2.0], requires_grad=True)
    old = torch.tensor([math.nan, -2.5])
    loss = clipped_policy_gradient(log_probs, old, torch.tensor([3.0, 3.0]), clip_low=0.2, clip_high=0.9)
    loss.sum().backward()
    assert_near(loss, [-3.0, -3.0 * math.exp(0.5)], 1e-6)
    assert log_probs.grad is not None
    assert_near(log_probs.grad, [-3.0, -3.0 * math.exp(0.5)], 1e-6)


def test_no_token_for_all_teachers() -> None:
    apart = [torch.tensor([1.0, 0.0]).log(), torch.tensor([0.0, 1.0]).log()]
    assert mixture_log_probs(apart, [0.5, 0.5], kind="geometric").tolist() == [-math.inf, -math.inf]
    assert_near(mixture_log_probs(apart, [0.5, 0.5], kind="arithmetic").exp(), [0.5, 0.5], 1e-6)


# ---- transforms, dtypes, devices -----------------------------------------------------------------------------

LOG_P, LOG_Q = (
    x[:, 0] for x in torch.randn(2, 3, 2, 4, 6, generator=generator(5), dtype=torch.float64).log_softmax(-1)
)
TOKEN_P, TOKEN_Q = token_log_probs(7, 3, 4, 5)
ADVANTAGES = torch.randn(3, 4, generator=generator(6), dtype=torch.float64)
FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "clipped_policy_gradient": (
        lambda p, q, a: clipped_policy_gradient(p, q, a, clip_low=0.2, clip_high=0.28),
        (TOKEN_P, TOKEN_Q, ADVANTAGES),
    ),
    "sampled_reverse_kl": (sampled_reverse_kl, (TOKEN_P, TOKEN_Q)),
    "anchor": (anchor, (LOG_P, LOG_Q)),
    "anchor_estimate": (anchor_estimate, (TOKEN_P, TOKEN_Q)),
    "clip_entries": (lambda p, q: clip_entries(p, q.detach(), alpha=0.5, clip=0.05), (LOG_P, LOG_Q)),
    "clip_entries forward": (lambda p, q: clip_entries(p, q.detach(), alpha=0.0, clip=0.05), (LOG_P, LOG_Q)),
    "geometric": (lambda p, q: mixture_log_probs([p, q], [0.3, 0.7], kind="geometric"), (LOG_P, LOG_Q)),
    "arithmetic": (lambda p, q: mixture_log_probs([p, q], [0.3, 0.7], kind="arithmetic"), (LOG_P, LOG_Q)),
}
parametrize_functions = pytest.mark.parametrize("name", FUNCTIONS)


@parametrize_functions
def test_vmap_is_a_loop(name: str) -> None:
    function, inputs = FUNCTIONS[name]
    assert_near(
        vmap(function)(*inputs), torch.stack([function(*batch) for batch in zip(*inputs, strict=True)])
    )


@parametrize_functions
def test_func_grad_is_backward(name: str) -> None:
    function, (first, *others) = FUNCTIONS[name]
    leaf = first.clone().requires_grad_()
    vmap(function)(leaf, *others).sin().sum().backward()
    assert leaf.grad is not None
    assert_near(vmap(grad(lambda *batch: function(*batch).sin().sum()))(first, *others), leaf.grad, 1e-14)


@parametrize_functions
def test_gradient_is_that_of_finite_differences(name: str) -> None:
    """Of the value; the sampled loss, whose gradient is not the value's, has tests of its own."""
    if name == "sampled_reverse_kl":
        return
    function, inputs = FUNCTIONS[name]
    batch = [x[0] for x in inputs]
    got = grad(lambda x: function(x, *batch[1:]).sum())(batch[0]).flatten()

    def value(point: list[float]) -> float:
        return float(function(torch.tensor(point, dtype=torch.float64).view_as(batch[0]), *batch[1:]).sum())

    assert_near(got, oracles.numerical_gradient(value, batch[0].flatten().tolist(), 1e-6), 1e-7)


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
    rounded = tuple(value.to(dtype) for value in inputs)
    got = vmap(function)(*rounded)
    assert got.dtype == torch.float32
    assert_near(got, vmap(function)(*(value.double() for value in rounded)), 1e-5)
    leaf = rounded[0].clone().requires_grad_()
    vmap(function)(leaf, *rounded[1:]).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == dtype


# ---- bad input -------------------------------------------------------------------------------------------------

P, Q, A = TOKEN_P[0], TOKEN_Q[0], ADVANTAGES[0]
V, W = LOG_P[0], LOG_Q[0]


def surrogate(**changes: Any) -> Tensor:
    given = {"log_probs": P, "old_log_probs": Q, "advantages": A, "clip_low": 0.2, "clip_high": 0.2}
    return clipped_policy_gradient(**{**given, **changes})


def mix(teachers: Any, weights: Any, kind: Any = "geometric") -> Tensor:
    return mixture_log_probs(teachers, weights, kind=kind)


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "old of another shape": (
        lambda: surrogate(old_log_probs=Q[:2]),
        ValueError,
        r"old_log_probs: .*\(4, 5\)",
    ),
    "advantages per column": (
        lambda: surrogate(advantages=P[0]),
        ValueError,
        r"advantages: .*one per row.*\(5,\)",
    ),
    "integer advantages": (
        lambda: surrogate(advantages=A.long()),
        TypeError,
        "advantages: .*floating.*int64",
    ),
    "a ratio of zero": (
        lambda: surrogate(ratio_limit=0.0),
        ValueError,
        r"ratio_limit: .*\(0, inf\], got 0.0",
    ),
    "a clip beyond zero": (lambda: surrogate(clip_low=1.2), ValueError, r"clip_low: .*\[0, 1\], got 1.2"),
    "a clip turned round": (lambda: surrogate(clip_high=-0.2), ValueError, "clip_high: .*got -0.2"),
    "a clip as text": (lambda: surrogate(clip_high="0.2"), TypeError, "clip_high: .*got '0.2'"),
    "sampled of two shapes": (lambda: sampled_reverse_kl(P, Q.T), ValueError, "teacher_log_probs: "),
    "sampled as list": (lambda: sampled_reverse_kl([0.1], Q), TypeError, "log_probs: .*got list"),  # type: ignore[arg-type]
    "estimate of another device": (
        lambda: anchor_estimate(P, Q.to("meta")),
        ValueError,
        "reference_.*cpu.*meta",
    ),
    "anchor without vocabulary": (
        lambda: anchor(V[:, :0], W[:, :0]),
        ValueError,
        "student_log_probs: .*category",
    ),
    "anchor of two vocabularies": (
        lambda: anchor(V, W[:, :3]),
        ValueError,
        r"reference_log_probs: .*\(4, 6\)",
    ),
    "no clip": (lambda: clip_entries(V, W, alpha=0.5, clip=0.0), ValueError, r"clip: .*\(0, inf\], got 0.0"),
    "clip NaN": (lambda: clip_entries(V, W, alpha=0.5, clip=math.nan), ValueError, "clip: .*got nan"),
    "alpha above one": (lambda: clip_entries(V, W, alpha=1.5, clip=1.0), ValueError, "alpha: .*got 1.5"),
    "a tensor of teachers": (
        lambda: mix(V, [1.0]),
        TypeError,
        "log_probs: expected a sequence, got torch.Tensor",
    ),
    "no teacher": (lambda: mix([], []), ValueError, "log_probs: expected at least one teacher"),
    "a weight too few": (lambda: mix([V, W], [1.0]), ValueError, "weights: expected 2 numbers.*got 1"),
    "a tensor of weights": (lambda: mix([V], torch.ones(1)), TypeError, "weights: expected a sequence"),
    "weights that do not sum to 1": (
        lambda: mix([V, W], [1.0, 1.0]),
        ValueError,
        "weights: .*sum of 1, got 2",
    ),
    "a negative weight": (lambda: mix([V, W], [2.0, -1.0]), ValueError, r"weights\[1\]: .*got -1.0"),
    "a weight NaN": (lambda: mix([V], [math.nan]), ValueError, r"weights\[0\]: .*got nan"),
    "teachers of two vocabularies": (
        lambda: mix([V, W[:, :3]], [0.5, 0.5]),
        ValueError,
        r"log_probs\[1\]: .*\(4, 6\)",
    ),
    "an unknown kind": (lambda: mix([V], [1.0], "harmonic"), ValueError, "kind: .*geometric.*got 'harmonic'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
