"""Factors of the divergence from the statistics of a row: by a loop over its tokens, and in the fused loss."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fused_cases import TRAINABLE, Case, Result, assert_same, make_case, relative_error, with_policy
from hypothesis import strategies as st
from strategies import Claim, seeds
from test_fused_work import Recorder
from torch import Tensor

import sdpo
from sdpo.fused import _rows

LENGTHS = (5, 9)  # rows and tokens of a row


def gate(statistics: sdpo.TokenStatistics, kept: Tensor) -> Tensor:
    """A function of both models at one token."""
    return torch.sigmoid(statistics.teacher_log_probs - statistics.log_probs) * kept


def of_the_row(statistics: sdpo.TokenStatistics, kept: Tensor) -> Tensor:
    """A function of a whole row: the token's share of the teacher's entropy."""
    entropy = statistics.teacher_entropy * kept
    return entropy / entropy.sum(-1, keepdim=True).clamp(min=1e-9)


WEIGHTS = {"none": None, "gate": gate, "of the row": of_the_row}


def factors_by_a_loop(
    statistics: sdpo.TokenStatistics, per_token: Tensor, mask: Tensor, fraction: float | None, weigh: Any
) -> Tensor:
    """Row by row, each token's rank from Python's sort."""
    kept = mask.clone()
    for row in range(len(mask)):
        active = [t for t in range(mask.shape[1]) if mask[row, t]]
        if fraction is None or not active:
            continue
        entropy = [float(statistics.student_entropy[row, t]) for t in active]
        ceiling = sorted(entropy, reverse=True)[len(active) // 50]
        scales = []
        for values in ([min(x, ceiling) for x in entropy], [float(per_token[row, t]) for t in active]):
            low, high = min(values), max(values)
            scales.append([0.0 if high == low else (x - low) / (high - low) for x in values])
        scores = [1.0 - (1.0 - h) * (1.0 - d) for h, d in zip(*scales, strict=True)]
        order = sorted(range(len(active)), key=lambda i: -scores[i])
        for i in order[math.ceil(round(fraction * len(active), 9)) :]:
            kept[row, active[i]] = False
    factors = kept.double() if weigh is None else weigh(statistics, kept) * kept
    if fraction is not None:
        factors = factors * mask.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp(min=1)
    return factors


def expected(case: Case, fraction: float | None, weigh: Any, loop: Callable[..., Tensor]) -> Result:
    """The plain loss with the factors as constants."""
    case, leaves = case.leaves()
    divergence, weights = case.plain_per_token()
    s = case.scalars
    statistics = sdpo.token_statistics(
        case.logits("student"), case.logits("teacher"), case.tensors["tokens"],
        support=s["support"], k=s["k"], temperature=s["temperature"],
    )  # fmt: skip
    share = case.tensors.get("policy_weight", torch.zeros_like(divergence))
    mask = case.tensors["loss_mask"] & (share < 1.0) & (weights != 0.0)
    factors = loop(statistics, divergence.detach(), mask, fraction, weigh)
    total = ((1.0 - share) * weights * factors * divergence)[mask].sum()
    if "advantages" in case.tensors:
        policy = case.tensors.get("weights", torch.ones_like(divergence)) * case.plain_policy_loss()
        total = total + (share * policy)[case.tensors["loss_mask"]].sum()
    names = [name for name in TRAINABLE if name in case.tensors]
    return {"total": total} | dict(zip(names, torch.autograd.grad(total, leaves), strict=True))


def ours(case: Case, fraction: float | None, weigh: Any, **options: Any) -> Result:
    case, leaves = case.leaves()
    out = case.fused(token_fraction=fraction, token_weights=weigh, **({"backend": "torch"} | options))
    names = [name for name in TRAINABLE if name in case.tensors]
    return {"total": out.total} | dict(zip(names, torch.autograd.grad(out.total, leaves), strict=True))


def fraction_of_all_tokens(*arguments: Any) -> Tensor:
    """A counter-example: selects over the batch."""
    statistics, per_token, mask, fraction, weigh = arguments
    flat = sdpo.TokenStatistics(*(values.flatten()[None] for values in statistics))
    one_row = factors_by_a_loop(flat, per_token.flatten()[None], mask.flatten()[None], fraction, weigh)
    return one_row.view_as(mask)


def without_the_quotient(*arguments: Any) -> Tensor:
    """A counter-example: the size of the loss follows the fraction."""
    return factors_by_a_loop(*arguments).clamp(max=1.0)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, float | None, Any, dict[str, Any]]:
    support: dict[str, Any] = draw(
        st.sampled_from([{"support": "student", "k": 7}, {"support": "teacher", "k": 7}, {"support": "full"}])
    )
    case = make_case(draw(seeds), n=LENGTHS, d=6, v=65, weights=draw(st.booleans()), **support)
    if draw(st.booleans()):
        case = with_policy(case, draw(seeds))
    if draw(st.booleans()):
        case = case.with_(loss_mask=torch.ones(LENGTHS, dtype=torch.bool))
    weigh = WEIGHTS[draw(st.sampled_from(sorted(WEIGHTS)))]
    fraction = draw(st.sampled_from([None, 0.1, 0.5, 0.7, 1.0]))
    # One row, several, all rows a chunk; and rows that do not fit one.
    options = {"chunk_size": draw(st.sampled_from([4, 9, 20, 100]))}
    return case, fraction, weigh, options


def property_equals_the_plain_loss(loop: Callable[..., Tensor], drawn: Any) -> None:
    case, fraction, weigh, options = drawn
    assert_same(ours(case, fraction, weigh, **options), expected(case, fraction, weigh, loop), 1e-7)


CLAIMS = [
    Claim(property_equals_the_plain_loss, factors_by_a_loop, wrong, {"drawn": cases()})
    for wrong in (fraction_of_all_tokens, without_the_quotient)
]


def test_equals_the_plain_loss() -> None:
    CLAIMS[0].holds()


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.wrong.__name__)
def test_planted_errors_are_rejected(claim: Claim) -> None:
    claim.rejects_counter_example()


def test_token_factors_are_those_of_the_loop() -> None:
    rng = torch.Generator().manual_seed(1)
    fields = (torch.rand(4, 120, generator=rng, dtype=torch.float64) for _ in range(8))
    statistics = sdpo.TokenStatistics(*fields)
    per_token = torch.rand(4, 120, generator=rng, dtype=torch.float64)
    mask = torch.rand(4, 120, generator=rng) < 0.8
    mask[3] = False
    for fraction in (None, 0.07, 0.5, 1.0):
        for weigh in WEIGHTS.values():
            found = sdpo.token_factors(statistics, per_token, mask, fraction=fraction, weigh=weigh)
            by_hand = factors_by_a_loop(statistics, per_token, mask, fraction, weigh)
            assert relative_error(found, by_hand) < 1e-12
            if fraction is not None:
                by_hand = factors_by_a_loop(statistics, per_token, mask, 0.9 * fraction, weigh)
                assert relative_error(found, by_hand) > 1e-3 or weigh is of_the_row


@pytest.mark.parametrize("all_active", [True, False])
def test_tokens_that_are_not_kept_enter_no_product_of_the_gradient(all_active: bool) -> None:
    case = make_case(5, n=(4, 10), v=507, d=31, teacher_d=29)
    if all_active:
        case = case.with_(loss_mask=torch.ones(4, 10, dtype=torch.bool))
    case.tensors["student_hidden"].requires_grad_()
    lengths = case.tensors["loss_mask"].sum(-1).tolist()
    with Recorder() as recorder:
        case.fused(token_fraction=0.5, chunk_size=21, backend="torch").total.backward()
    by_size = {(31, 507): 0, (29, 507): 0, (507, 31): 0}
    for tokens, *sizes in recorder.products:
        by_size[tuple(sizes)] += tokens
    assert by_size[31, 507] == by_size[29, 507] == sum(lengths)
    assert by_size[507, 31] == sum(math.ceil(0.5 * length) for length in lengths)


def test_no_row_is_divided_between_chunks() -> None:
    chunks = _rows.row_chunks((3, 0, 4, 9, 1, 0), 8, 0.5)
    assert [(chunk.tokens.start, chunk.tokens.stop) for chunk in chunks] == [(0, 7), (7, 16), (16, 17)]
    assert [(chunk.rows.start, chunk.rows.stop) for chunk in chunks] == [(0, 3), (3, 4), (4, 6)]
    assert [chunk.kept for chunk in chunks] == [4, 5, 1]
    assert _rows.row_chunks((0, 0), 8, None) == []


def test_without_active_tokens_the_gradient_is_zero() -> None:
    case = make_case(5, n=(4, 10)).with_(loss_mask=torch.zeros(4, 10, dtype=torch.bool))
    result = ours(case, 0.5, gate)
    assert all(value.abs().sum() == 0.0 for value in result.values())


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"token_fraction": 0.0}, ValueError, "token_fraction: expected .*the share of a row's tokens"),
        ({"token_fraction": 1.5}, ValueError, "token_fraction: expected"),
        (
            {"token_fraction": 0.5, "loss_mask": [[True] * 10] * 4},
            TypeError,
            "loss_mask: expected a tensor of bool dtype, got list",
        ),
        (
            {"token_fraction": 0.5, "loss_mask": torch.tensor(True)},
            ValueError,
            r"loss_mask: expected at least 1 dimension\(s\), got shape \(\)",
        ),
        (
            {"token_fraction": 0.5, "reduction": "none"},
            ValueError,
            "multiply per_token by sdpo.token_factors",
        ),
        (
            {"token_weights": gate, "reduction": "none"},
            ValueError,
            "token_weights: expected None with reduction",
        ),
        ({"token_weights": torch.ones(4, 10)}, TypeError, "token_weights: expected a function"),
        (
            {"token_weights": "confidence"},
            TypeError,
            "pass one such as lambda statistics, mask: confidence_weights",
        ),
        ({"token_weights": lambda found, kept: kept[0].float()}, ValueError, r"weigh\(...\): expected"),
        ({"token_weights": lambda found, kept: kept}, TypeError, r"weigh\(...\): expected"),
        (
            {"token_weights": lambda found, kept: -kept.float()},
            ValueError,
            r"weigh\(...\): expected finite numbers >= 0",
        ),
        (
            {"token_weights": lambda found, kept: kept.float() * math.nan},
            ValueError,
            r"weigh\(...\): expected finite numbers >= 0 .*got nan",
        ),
    ],
)
def test_bad_input(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    case = make_case(5, n=(4, 10))
    with pytest.raises(error, match=words):
        case.fused(**arguments)


def test_a_surrogate_ranks_no_tokens() -> None:
    with pytest.raises(ValueError, match="token_fraction: expected None with support='sampled'"):
        make_case(5, n=(4, 10), support="sampled").fused(token_fraction=0.5)


def minus_one(statistics: sdpo.TokenStatistics, kept: Tensor) -> Tensor:
    return -torch.ones_like(statistics.log_probs)


@pytest.mark.parametrize("bad", [minus_one, lambda found, kept: kept.float() * math.nan])
def test_where_values_cannot_be_read_a_bad_factor_makes_the_loss_nan(
    monkeypatch: pytest.MonkeyPatch, bad: Any
) -> None:
    monkeypatch.setattr(sys.modules["sdpo.token_factors"], "is_readable", lambda tensor: False)
    case = make_case(5, n=(4, 10))
    assert case.fused(token_weights=bad, backend="torch").total.isnan()
    assert case.fused(token_weights=gate, backend="torch").total.isfinite()
