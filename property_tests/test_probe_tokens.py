"""The probe's measures of single tokens against loops in float64 from the formulas."""

from __future__ import annotations

import math

import pytest
import tiny
import torch

from sdpo_rl.diagnose.probe import tokens as measured

T = 0.7
# One row where the models agree, two where the teacher prefers another token, of which one is unlikely.
STUDENT = torch.tensor([[4.0, 0.0, 1.0, -1.0], [3.0, 1.0, 0.0, 0.5], [9.0, 0.0, -6.0, 1.0]])
TEACHER = torch.tensor([[3.0, 1.0, 0.5, 0.0], [0.5, 2.5, 0.0, 0.0], [1.0, 0.0, 2.0, -1.0]])
TOKENS = torch.tensor([0, 1, 0])


def softmax(row: torch.Tensor) -> list[float]:
    values = [math.exp(float(z) / T) for z in row.double()]
    return [value / sum(values) for value in values]


def gradient(p: list[float], q: list[float], alpha: float) -> list[float]:
    """∂loss/∂z · T of the full divergence, by its closed form."""
    if alpha == 0.0:
        return [a - b for a, b in zip(p, q, strict=True)]
    other = q if alpha == 1.0 else [(1 - alpha) * a + alpha * b for a, b in zip(p, q, strict=True)]
    ratio = [math.log(a / m) for a, m in zip(p, other, strict=True)]
    mean = sum(a * r for a, r in zip(p, ratio, strict=True))
    factor = 1.0 if alpha == 1.0 else 1 - alpha
    return [factor * a * (r - mean) for a, r in zip(p, ratio, strict=True)]


def expected(alpha: float) -> dict[str, float]:
    norm = push = unmoved = gaps = agree = entropy = 0.0
    for student, teacher in zip(STUDENT, TEACHER, strict=True):
        p, q = softmax(student), softmax(teacher)
        grad = gradient(p, q, alpha)
        norm += math.sqrt(sum(g * g for g in grad)) / T
        entropy -= sum(a * math.log(a) for a in p)
        v = max(range(4), key=lambda i: q[i])
        if max(range(4), key=lambda i: p[i]) == v:
            agree += 1
            continue
        gap = q[v] - p[v]
        gaps += gap
        push -= grad[v]
        near = alpha * (1 - alpha) if 0 < alpha < 1 else 1.0
        if -grad[v] / (near * gap) < 0.003:
            unmoved += gap
    return {
        "agreement": agree,
        "student_entropy": entropy,
        "gap": gaps,
        f"norm {alpha:g}": norm,
        f"push {alpha:g}": push,
        f"hardly_moved {alpha:g}": unmoved,
    }


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 1.0])
def test_sums_equal_loops_over_the_formulas(alpha: float) -> None:
    config = tiny.config(support="full", alpha=0.5)
    found = measured.token_sums(STUDENT, TEACHER, TOKENS, config, temperature=T)
    for name, value in expected(alpha).items():
        assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-7), name
    assert found["tokens"] == 3.0
    assert found["disagreements"] == 2.0


def test_forward_kl_moves_the_whole_gap_and_no_other_does_where_the_token_is_unlikely() -> None:
    found = measured.token_sums(STUDENT, TEACHER, TOKENS, tiny.config(support="full"), temperature=T)
    assert found["push 0"] == pytest.approx(found["gap"], rel=1e-5)
    assert found["hardly_moved 0"] == 0.0
    p, q = softmax(STUDENT[2]), softmax(TEACHER[2])
    assert p[2] < 1e-8  # less likely than what α=0.1 still moves
    for alpha in (0.1, 0.5, 1.0):
        assert found[f"hardly_moved {alpha:g}"] == pytest.approx(q[2] - p[2], rel=1e-5)


def test_a_favourite_outside_the_support_is_hardly_moved_by_any() -> None:
    """With K=1 it shares its gradient with all other tokens outside."""
    student = torch.tensor([[9.0, 5.0, -9.0, 4.0]])
    teacher = torch.tensor([[0.0, 0.0, 5.0, 0.0]])
    for k, unmoved in ((1, True), (4, False)):
        config = tiny.config(k=k, alpha=0.0)
        found = measured.token_sums(student, teacher, torch.tensor([0]), config, temperature=1.0)
        assert (found["hardly_moved 0"] == found["gap"]) == unmoved
        assert found["gap"] > 0.9


def test_the_divergence_is_that_of_the_run() -> None:
    import sdpo

    config = tiny.config(k=2, alpha=0.3)
    found = measured.token_sums(STUDENT, TEACHER, TOKENS, config, temperature=T)
    loss = sdpo.distillation_loss(
        STUDENT, TEACHER, support="student", k=2, tail="bucket", alpha=0.3, temperature=T
    )
    assert found["divergence"] == pytest.approx(loss.sum().item(), rel=1e-6)
    assert measured.alphas(config) == [0.0, 0.1, 0.3, 0.5, 1.0]
    assert found["student_topk_mass"] < 3.0


def test_sums_over_parts_are_those_of_the_whole() -> None:
    config = tiny.config(support="full")
    whole = measured.token_sums(STUDENT, TEACHER, TOKENS, config, temperature=T)
    parts = measured.add(
        measured.token_sums(STUDENT[rows], TEACHER[rows], TOKENS[rows], config, temperature=T)
        for rows in (slice(0, 1), slice(1, 3))
    )
    assert parts == pytest.approx(whole, rel=1e-6)


def test_evenly_chosen_positions_cover_the_whole() -> None:
    assert list(measured.evenly(1000, 4)) == [0, 250, 500, 750]
    assert list(measured.evenly(0, 4)) == []
