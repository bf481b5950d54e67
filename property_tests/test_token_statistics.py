"""Statistics of each token against loops in float64 and the fused loss; means that inactive tokens cannot reach."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
from hypothesis import strategies as st
from strategies import Claim, assert_near, generator, logit_pairs, name_of, seeds, token_batches
from torch import Tensor

import sdpo
from sdpo import TokenStatistics, mean_metrics, token_statistics

SUPPORTS = ("student", "teacher", "full", "sampled")
TOPK = ("student", "teacher")


def expected_statistics(
    student: list[float], teacher: list[float], token: int, support: str, k: int
) -> dict[str, float]:
    """One position, from lists of logits."""
    logits = {"student": student, "teacher": teacher}
    vocabulary = range(len(student))
    if support == "full":
        inside = list(vocabulary)
    elif support == "sampled":
        inside = [token]
    else:
        inside = torch.tensor(logits[support], dtype=torch.float64).topk(k).indices.tolist()
    found = {}
    for side, prefix in (("student", ""), ("teacher", "teacher_")):
        log_probs = oracles.log_softmax(logits[side])
        found[f"{prefix}log_probs"] = log_probs[token]
        found[f"{side}_entropy"] = -math.fsum(math.exp(x) * x for x in log_probs if x > -math.inf)
        found[f"{side}_topk_mass"] = math.fsum(math.exp(log_probs[v]) for v in inside)
        found[f"{side}_log_tail"] = oracles.log_mass([log_probs[v] for v in vocabulary if v not in inside])
    return found


def property_statistics_are_their_definition(
    statistics: Any, pair: Any, seed: int, support: str, fraction: float, temperature: float
) -> None:
    student, teacher = pair
    k = 1 + round(fraction * (student.shape[-1] - 1))
    tokens = torch.randint(student.shape[-1], student.shape[:-1], generator=generator(seed))
    got = statistics(
        student,
        teacher,
        tokens,
        support=support,
        k=k if support in TOPK else None,
        temperature=temperature,
    )
    rows = [x.reshape(-1, x.shape[-1]).tolist() for x in (student / temperature, teacher / temperature)]
    expected = [
        expected_statistics(p, q, token, support, k)
        for p, q, token in zip(*rows, tokens.flatten().tolist(), strict=True)
    ]
    for name, values in got._asdict().items():
        assert values.shape == tokens.shape
        assert not values.requires_grad
        wanted = torch.tensor([row[name] for row in expected], dtype=torch.float64)
        # Tails that underflow as probabilities have no meaning beyond being tiny.
        low = -700.0 if name.endswith("log_tail") else -math.inf
        assert_near(values.flatten().clamp(min=low), wanted.clamp(min=low))


def without_temperature(student: Tensor, teacher: Tensor, tokens: Tensor, **options: Any) -> TokenStatistics:
    return token_statistics(student, teacher, tokens, **{**options, "temperature": 1.0})


def property_means_are_a_loop(means: Any, batch: Any, seed: int) -> None:
    values, mask = batch
    statistics, weights = random_statistics(values, seed)
    active = mask.flatten().tolist()

    def mean(x: Tensor) -> float:
        chosen = [v for v, m in zip(x.flatten().tolist(), active, strict=True) if m]
        return math.fsum(chosen) / max(len(chosen), 1)

    gap = statistics.teacher_log_probs - statistics.log_probs
    expected = {
        "divergence": mean(values),
        "weight": mean(weights),
        "student_entropy": mean(statistics.student_entropy),
        "teacher_entropy": mean(statistics.teacher_entropy),
        "student_topk_mass": mean(statistics.student_topk_mass),
        "teacher_topk_mass": mean(statistics.teacher_topk_mass),
        "student_tail_mass": mean(statistics.student_log_tail.exp()),
        "teacher_tail_mass": mean(statistics.teacher_log_tail.exp()),
        "sampled_token_log_ratio": mean(gap),
        "sampled_token_agreement": mean((gap >= 0).double()),
        "length": mean(values.square()),
        "active_tokens": sum(active),
    }
    got = means(values, weights, statistics, mask=mask, length=values.square())
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].shape == ()
        assert_near(got[name], value)


def property_inactive_tokens_reach_no_mean(means: Any, batch: Any, seed: int, poison: float) -> None:
    values, mask = batch
    statistics, weights = random_statistics(values, seed)

    def spoilt(x: Tensor) -> Tensor:
        return x.masked_fill(~mask, poison)

    clean = means(values, weights, statistics, mask=mask)
    dirty = means(
        spoilt(values), spoilt(weights), TokenStatistics(*(spoilt(x) for x in statistics)), mask=mask
    )
    for name, value in clean.items():
        assert_near(dirty[name], value.double())
        assert mask.any() or value.item() == 0.0


def random_statistics(values: Tensor, seed: int) -> tuple[TokenStatistics, Tensor]:
    """Statistics and weights of the shape of ``values``."""
    random = torch.rand(len(TokenStatistics._fields) + 1, *values.shape, generator=generator(seed)).double()
    return TokenStatistics(*random[1:]), random[0]


def masked_by_a_product(
    values: Tensor, weights: Tensor, statistics: TokenStatistics, *, mask: Tensor, **others: Tensor
) -> dict[str, Tensor]:
    means = mean_metrics(
        values * mask, weights * mask, TokenStatistics(*(x * mask for x in statistics)), **others
    )
    scale = mask.numel() / mask.sum().clamp(min=1)
    return {name: mean * scale for name, mean in means.items()} | {"active_tokens": mask.sum()}


def over_all_tokens(
    values: Tensor, weights: Tensor, statistics: TokenStatistics, *, mask: Tensor, **others: Tensor
) -> dict[str, Tensor]:
    return mean_metrics(values, weights, statistics, **others)


CLAIMS = [
    Claim(
        property_statistics_are_their_definition,
        token_statistics,
        without_temperature,
        {
            "pair": logit_pairs(),
            "seed": seeds,
            "support": st.sampled_from(SUPPORTS),
            "fraction": st.floats(0.0, 1.0),
            "temperature": st.sampled_from([1.0, 0.5, 2.0]),  # exact divisions: no new ties
        },
    ),
    Claim(
        property_means_are_a_loop, mean_metrics, over_all_tokens, {"batch": token_batches(), "seed": seeds}
    ),
    Claim(
        property_inactive_tokens_reach_no_mean,
        mean_metrics,
        masked_by_a_product,
        {
            "batch": token_batches(),
            "seed": seeds,
            "poison": st.sampled_from([math.nan, math.inf, -math.inf]),
        },
    ),
]


@pytest.mark.parametrize("claim", CLAIMS, ids=name_of)
def test_holds(claim: Claim) -> None:
    claim.holds()


@pytest.mark.parametrize("claim", CLAIMS, ids=name_of)
def test_rejects_its_counter_example(claim: Claim) -> None:
    claim.rejects_counter_example()


@pytest.mark.parametrize("support", SUPPORTS)
def test_the_fused_loss_has_the_same_statistics_and_means(support: str) -> None:
    rng = generator(0)
    student, teacher = (2.0 * torch.randn(3, 4, 9, generator=rng, dtype=torch.float64) for _ in range(2))
    tokens = torch.randint(9, (3, 4), generator=rng)
    mask = torch.rand(3, 4, generator=rng) < 0.6
    identity = torch.eye(9, dtype=torch.float64)
    options: dict[str, Any] = {"support": support, "k": 3 if support in TOPK else None, "temperature": 0.7}
    loss_options = {**options, "tail": "bucket" if support in TOPK else None, "alpha": 1.0}
    fused = sdpo.fused_distillation_loss(
        sdpo.LMHead(student, identity), sdpo.LMHead(teacher, identity), tokens, loss_mask=mask, **loss_options
    )
    plain = token_statistics(student, teacher, tokens, **options)
    for name, values in plain._asdict().items():
        assert_near(getattr(fused, name)[mask], values[mask])
    per_token = sdpo.distillation_loss(student, teacher, tokens=tokens, **loss_options)
    means = mean_metrics(per_token, torch.ones_like(per_token), plain, mask=mask)
    assert means.keys() <= fused.metrics.keys()
    for name, mean in means.items():
        assert_near(fused.metrics[name], mean)


def test_no_gradient_and_the_working_precision() -> None:
    logits = torch.randn(2, 5, dtype=torch.bfloat16, requires_grad=True)
    found = token_statistics(logits, logits, torch.zeros(2).long(), support="full", temperature=1.0)
    assert {x.dtype for x in found} == {torch.float32}
    assert not any(x.requires_grad for x in found)
    means = mean_metrics(logits[:, 0], torch.ones(2), found)
    assert not any(mean.requires_grad for mean in means.values())
    assert means["active_tokens"].item() == 2


@pytest.mark.parametrize("fused", [False, True])
def test_a_token_that_is_impossible_for_both_models_is_one_on_which_they_agree(fused: bool) -> None:
    """As with a vocabulary that constrained decoding masks: log q − log p is −inf − (−inf)."""
    logits, token = torch.tensor([[0.0, -math.inf, 1.0]]), torch.tensor([1])
    options: dict[str, Any] = {"support": "full", "temperature": 1.0}
    if fused:
        head = sdpo.LMHead(torch.zeros(1, 2), torch.zeros(3, 2), logits[0])
        output = sdpo.fused_distillation_loss(
            head, head, token, **options, alpha=0.5, loss_mask=torch.ones(1, dtype=torch.bool)
        )
        metrics = output.metrics
        assert metrics["sampled_token_overlap"].item() == 1.0
    else:
        metrics = mean_metrics(
            torch.zeros(1), torch.ones(1), token_statistics(logits, logits, token, **options)
        )
    assert metrics["sampled_token_log_ratio"].item() == 0.0
    assert metrics["sampled_token_agreement"].item() == 1.0


STATISTICS = TokenStatistics(*torch.zeros(8, 2, 3))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda x: mean_metrics(x, x[:, :1], STATISTICS),
            ValueError,
            r"weights: expected shape \(2, 3\).*got \(2, 1\)",
        ),
        (lambda x: mean_metrics(x, [1.0], STATISTICS), TypeError, "weights: expected a tensor .* got list"),
        (
            lambda x: mean_metrics(x, x, None),
            TypeError,
            "statistics: expected .* got NoneType without 'log_probs'",
        ),
        (
            lambda x: mean_metrics(x, x, STATISTICS._replace(teacher_entropy=None)),
            TypeError,
            "teacher_entropy: expected a tensor .* got NoneType",
        ),
        (
            lambda x: mean_metrics(x, x, STATISTICS, length=x.long()),
            TypeError,
            "length: expected a tensor of float",
        ),
        (lambda x: sdpo.token_factors(None, x, x == 0), TypeError, "statistics: expected the fields"),
        (
            lambda x: mean_metrics(x, x, STATISTICS._replace(log_probs=x[:, :1])),
            ValueError,
            r"log_probs: expected shape \(2, 3\)",
        ),
        (
            lambda x: mean_metrics(x, x, STATISTICS, length=x[0]),
            ValueError,
            r"length: expected shape \(2, 3\).*got \(3,\)",
        ),
        (lambda x: mean_metrics([0.0], x, STATISTICS), TypeError, "per_token: expected a tensor"),
        (lambda x: mean_metrics(x, x, STATISTICS, mask=x), TypeError, "mask: expected a tensor of bool"),
        (
            lambda x: mean_metrics(x, x, STATISTICS, mask=x[0] > 0),
            ValueError,
            r"mask: expected shape \(2, 3\)",
        ),
        (lambda x: of_logits(x, support="student"), TypeError, "k: expected an int, got None"),
        (
            lambda x: of_logits(x, support="student", k=4),
            ValueError,
            r"k: expected an int in \[1, 3\], got 4",
        ),
        (
            lambda x: of_logits(x, support="full", k=2),
            ValueError,
            "k: expected None with support='full', got 2",
        ),
        (lambda x: of_logits(x, support="both"), ValueError, "support: expected one of"),
        (lambda x: of_logits(x, support="full", temperature=0.0), ValueError, "temperature: expected"),
    ],
)
def test_arguments_are_checked(call: Callable[[Tensor], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 3))


def of_logits(x: Tensor, **options: Any) -> TokenStatistics:
    return token_statistics(x, x, torch.zeros(2).long(), **{"temperature": 1.0, **options})
