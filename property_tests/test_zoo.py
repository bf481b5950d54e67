"""The zoo: each loss against its paper's formula in float64 loops, value and gradient.

A formula takes the student twice: the logits that carry the gradient, and the same logits where the paper stops it.
Its numerical gradient moves the first and leaves the second.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from programs import EXAMPLES
from strategies import assert_near, generator
from torch import Tensor

import sdpo
from examples.zoo import losses
from sdpo_rl import SDPOConfig

ROWS, TOKENS, VOCABULARY, TEMPERATURE = 4, 3, 6, 0.8
RNG = generator(11)
STUDENT, TEACHER, REFERENCE = torch.randn(3, ROWS, TOKENS, VOCABULARY, generator=RNG, dtype=torch.float64)
SAMPLED = torch.randint(VOCABULARY, (ROWS, TOKENS), generator=RNG)
OLD = losses.sampled_log_probs(STUDENT, SAMPLED, TEMPERATURE) + 0.4 * torch.randn(
    ROWS, TOKENS, generator=RNG, dtype=torch.float64
)
MASK = torch.tensor([[True, True, False], [True, True, True], [True, False, False], [False, False, False]])
SUCCESS = torch.tensor([True, False, False, True])
HAS_TEACHER = torch.tensor([True, True, False, True])
GROUPS = torch.tensor([0, 0, 1, 1])
ADVANTAGES = torch.tensor([1.2, -0.7, -0.4, 0.0], dtype=torch.float64)
CLIP = {"clip_low": 0.2, "clip_high": 0.28}
RIGHT, WRONG = (
    -torch.rand(ROWS, TOKENS, dtype=torch.float64, generator=RNG),
    -torch.rand(ROWS, 2, TOKENS, dtype=torch.float64, generator=RNG),
)
RIGHT_MASK = torch.tensor([True, True, False, True])
WRONG_MASK = torch.tensor([[True, False], [True, True], [True, True], [False, False]])
ACTIVE = [(b, t) for b in range(ROWS) for t in range(TOKENS) if MASK[b, t]]
Logits = list[list[list[float]]]

# ---- the pieces of the formulas ------------------------------------------------------------------------------


def log_softmax(logits: Logits, b: int, t: int) -> list[float]:
    return oracles.log_softmax([z / TEMPERATURE for z in logits[b][t]])


def sampled(logits: Logits, b: int, t: int) -> float:
    return log_softmax(logits, b, t)[int(SAMPLED[b, t])]


TEACHER_LIST: Logits = TEACHER.tolist()


def teacher(b: int, t: int) -> float:
    return sampled(TEACHER_LIST, b, t)


def gap(student: Logits, b: int, t: int) -> float:
    return teacher(b, t) - sampled(student, b, t)


def kl(student: Logits, b: int, t: int, alpha: float = 1.0) -> float:
    return oracles.jsd(log_softmax(student, b, t), log_softmax(TEACHER_LIST, b, t), alpha)


def topk(student: Logits, detached: Logits, b: int, t: int, k: int, alpha: float) -> float:
    ids = sorted(range(VOCABULARY), key=lambda v: -detached[b][t][v])[:k]
    scaled = ([z / TEMPERATURE for z in logits[b][t]] for logits in (student, TEACHER_LIST))
    return oracles.topk_loss(*scaled, ids, alpha, "bucket")


def grpo(student: Logits, b: int, t: int, advantage: float) -> float:
    ratio = math.exp(sampled(student, b, t) - float(OLD[b, t]))
    return -min(ratio * advantage, min(max(ratio, 1 - CLIP["clip_low"]), 1 + CLIP["clip_high"]) * advantage)


def mean(values: list[float]) -> float:
    return math.fsum(values) / max(len(values), 1)


def over_active(term: Callable[[int, int], float], rows: Tensor | None = None) -> float:
    return mean([term(b, t) for b, t in ACTIVE if rows is None or rows[b]])


# ---- the formulas ----------------------------------------------------------------------------------------------


def opsd_formula(student: Logits, detached: Logits, alpha: float = 0.5, clip: float = 0.05) -> float:
    def term(b: int, t: int) -> float:
        entries = []
        for lp, lq in zip(log_softmax(student, b, t), log_softmax(TEACHER_LIST, b, t), strict=True):
            p, q = math.exp(lp), math.exp(lq)
            m = (1 - alpha) * p + alpha * q
            entries.append(min((1 - alpha) * p * math.log(p / m) + alpha * q * math.log(q / m), clip))
        return math.fsum(entries)

    return over_active(term)


def on_policy_formula(student: Logits, detached: Logits) -> float:
    def term(b: int, t: int) -> float:
        return -gap(detached, b, t) * (1 + sampled(student, b, t) - sampled(detached, b, t))

    return over_active(term)


def sdpo_formula(k: int, alpha: float) -> Callable[[Logits, Logits], float]:
    def term(student: Logits, detached: Logits, b: int, t: int) -> float:
        weight = min(math.exp(sampled(detached, b, t) - float(OLD[b, t])), 1.3)
        return weight * topk(student, detached, b, t, k, alpha)

    return lambda student, detached: over_active(lambda b, t: term(student, detached, b, t), HAS_TEACHER)


def hybrid_formula(student: Logits, detached: Logits) -> float:
    policy = over_active(lambda b, t: grpo(student, b, t, float(ADVANTAGES[b])))
    return 0.9 * policy + 0.1 * sdpo_formula(3, 0.5)(student, detached)


def sc_sdpo_formula(student: Logits, detached: Logits) -> float:
    raw = []
    for b in range(ROWS):
        p = mean([float(SUCCESS[i]) for i in range(ROWS) if GROUPS[i] == GROUPS[b]])
        raw.append(math.sqrt(p * (1 - p)))
    return over_active(lambda b, t: raw[b] / mean(raw) * topk(student, detached, b, t, 3, 0.5), HAS_TEACHER)


def srpo_formula(student: Logits, detached: Logits) -> float:
    distilled = ~SUCCESS & HAS_TEACHER

    def raw(b: int, t: int) -> float:
        return math.exp(1.5 * math.fsum(math.exp(x) * x for x in log_softmax(TEACHER_LIST, b, t)))

    scale = mean([raw(b, t) for b, t in ACTIVE if distilled[b]])
    return over_active(
        lambda b, t: (
            raw(b, t) / scale * topk(student, detached, b, t, 3, 0.5)
            if distilled[b]
            else grpo(student, b, t, float(ADVANTAGES[b]))
        )
    )


def rlsd_formula(student: Logits, detached: Logits) -> float:
    def term(b: int, t: int) -> float:
        a = float(ADVANTAGES[b])
        factor = min(max(math.exp(math.copysign(1.0, a) * gap(detached, b, t)), 0.7), 1.3)
        return grpo(student, b, t, a * (0.4 + 0.6 * factor))

    return over_active(term)


def sdar_formula(student: Logits, detached: Logits) -> float:
    def term(b: int, t: int) -> float:
        gate = 1 / (1 + math.exp(-5.0 * gap(detached, b, t)))
        return grpo(student, b, t, float(ADVANTAGES[b])) + 0.3 * gate * gap(student, b, t)

    return over_active(term)


def sdpg_formula(student: Logits, detached: Logits) -> float:
    def term(b: int, t: int) -> float:
        drift = sampled(student, b, t) - sampled(REFERENCE.tolist(), b, t)
        distillation = kl(student, b, t) if ADVANTAGES[b] > 0 else 0.0
        return grpo(student, b, t, float(ADVANTAGES[b])) + 0.2 * distillation + 0.1 * 0.5 * drift**2

    return over_active(term)


def rlcsd_formula(student: Logits, detached: Logits) -> float:
    moved, unmoved = [], []
    for b, t in ACTIVE:
        peers = [math.exp(float(WRONG[b, k, t])) for k in range(2) if WRONG_MASK[b, k]]
        evidence = float(RIGHT[b, t]) - math.log(mean(peers)) if peers and RIGHT_MASK[b] else 0.0
        shift = 0.5 * math.tanh(evidence / 0.5)
        a = float(ADVANTAGES[b])
        if abs(shift) <= 0.1:
            unmoved.append(grpo(student, b, t, a))
        else:
            moved.append(
                grpo(student, b, t, max(a + shift, 0.0) if a > 0 else min(a + shift, 0.0) if a < 0 else 0.0)
            )
    assert moved
    assert unmoved
    return mean(unmoved) + 0.7 * mean(moved)


# ---- the losses ------------------------------------------------------------------------------------------------

TOPK = {"alpha": 0.5, "k": 3, "temperature": TEMPERATURE}
T = {"temperature": TEMPERATURE}
ROLLOUT = (SAMPLED, OLD, MASK)


def sdpo_with(settings: str, k: int) -> Callable[[Tensor, Tensor], Tensor]:
    alpha = losses.SDPO_SETTINGS[settings]["alpha"]
    return lambda s, q: losses.sdpo_loss(
        s, q, *ROLLOUT, row_mask=HAS_TEACHER, is_clip=1.3, alpha=alpha, k=k, **T
    )


def rlcsd(student: Tensor, _: Tensor) -> Tensor:
    return losses.rlcsd(
        losses.sampled_log_probs(student, SAMPLED, TEMPERATURE),
        RIGHT,
        WRONG,
        OLD,
        MASK,
        right_mask=RIGHT_MASK,
        wrong_mask=WRONG_MASK,
        advantages=ADVANTAGES,
        squash=0.5,
        size=0.5,
        threshold=0.1,
        coef=0.7,
        **CLIP,
    )


POLICY: dict[str, Any] = {"advantages": ADVANTAGES, **CLIP, **T}
REFERENCE_LOG_PROBS = losses.sampled_log_probs(REFERENCE, SAMPLED, TEMPERATURE)
ZOO: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Logits, Logits], float]]] = {
    "gkd": (
        lambda s, q: losses.gkd(s, q, MASK, alpha=0.3, **T),
        lambda s, h: over_active(lambda b, t: kl(s, b, t, 0.3)),
    ),
    "on_policy_distillation": (
        lambda s, q: losses.on_policy_distillation(s, q, SAMPLED, MASK, **T),
        on_policy_formula,
    ),
    "sdft": (lambda s, q: losses.sdft(s, q, MASK, **T), lambda s, h: over_active(lambda b, t: kl(s, b, t))),
    "opsd": (lambda s, q: losses.opsd(s, q, MASK, alpha=0.5, clip=0.05, **T), opsd_formula),
    "sdpo_loss, generalization": (sdpo_with("generalization", 3), sdpo_formula(3, 0.5)),
    "sdpo_loss, rich feedback": (sdpo_with("rich feedback", 2), sdpo_formula(2, 1.0)),
    "sdpo_loss, test time": (sdpo_with("test time", 4), sdpo_formula(4, 1.0)),
    "sdpo_hybrid": (
        lambda s, q: losses.sdpo_hybrid(
            s,
            q,
            *ROLLOUT,
            row_mask=HAS_TEACHER,
            advantages=ADVANTAGES,
            weight=0.9,
            is_clip=1.3,
            alpha=0.5,
            k=3,
            **CLIP,
            **T,
        ),
        hybrid_formula,
    ),
    "sc_sdpo": (
        lambda s, q: losses.sc_sdpo(
            s, q, MASK, row_mask=HAS_TEACHER, success=SUCCESS, group_ids=torch.tensor([0, 0, 1, 1]), **TOPK
        ),
        sc_sdpo_formula,
    ),
    "srpo": (
        lambda s, q: losses.srpo(
            s,
            q,
            *ROLLOUT,
            success=SUCCESS,
            has_teacher=HAS_TEACHER,
            advantages=ADVANTAGES,
            beta=1.5,
            **TOPK,
            **CLIP,
        ),
        srpo_formula,
    ),
    "rlsd": (lambda s, q: losses.rlsd(s, q, *ROLLOUT, mix=0.6, evidence_clip=0.3, **POLICY), rlsd_formula),
    "sdar": (lambda s, q: losses.sdar(s, q, *ROLLOUT, coef=0.3, beta=5.0, **POLICY), sdar_formula),
    "sdpg": (
        lambda s, q: losses.sdpg(
            s, q, REFERENCE_LOG_PROBS, *ROLLOUT, distillation_coef=0.2, reference_coef=0.1, **POLICY
        ),
        sdpg_formula,
    ),
    "rlcsd": (rlcsd, rlcsd_formula),
}
methods = pytest.mark.parametrize("name", ZOO)


def gradients(name: str) -> tuple[Tensor, Tensor]:
    """The loss's gradient and the formula's, whose second student does not move."""
    loss, formula = ZOO[name]
    leaf = STUDENT.clone().requires_grad_()
    loss(leaf, TEACHER).backward()
    assert leaf.grad is not None

    def value(point: list[float]) -> float:
        return formula(torch.tensor(point, dtype=torch.float64).view_as(STUDENT).tolist(), STUDENT.tolist())

    numerical = oracles.numerical_gradient(value, STUDENT.flatten().tolist(), 1e-6)
    return leaf.grad, torch.tensor(numerical, dtype=torch.float64).view_as(STUDENT)


@methods
def test_the_value_is_that_of_the_paper(name: str) -> None:
    loss, formula = ZOO[name]
    assert loss(STUDENT, TEACHER).ndim == 0
    assert_near(loss(STUDENT, TEACHER), formula(STUDENT.tolist(), STUDENT.tolist()))


@methods
def test_the_gradient_is_that_of_the_paper(name: str) -> None:
    got, expected = gradients(name)
    assert_near(got, expected, 1e-8)
    assert got.abs().max() > 1e-3


def test_the_formulas_tell_the_methods_apart() -> None:
    values = [formula(STUDENT.tolist(), STUDENT.tolist()) for _, formula in ZOO.values()]
    assert min(abs(a - b) for i, a in enumerate(values) for b in values[:i]) > 1e-4


def test_a_gate_with_a_gradient_is_rejected() -> None:
    """Without the stop-gradient the value of SDAR is the same, and the numerical gradient says so."""
    leaf = STUDENT.clone().requires_grad_()
    student = losses.sampled_log_probs(leaf, SAMPLED, TEMPERATURE)
    teacher_log_probs = losses.sampled_log_probs(TEACHER, SAMPLED, TEMPERATURE)
    gate = (5.0 * (teacher_log_probs - student)).sigmoid()
    policy = sdpo.clipped_policy_gradient(student, OLD, ADVANTAGES, **CLIP)
    loss = sdpo.token_sum(policy + 0.3 * gate * (teacher_log_probs - student), MASK).mean()
    loss.backward()
    assert_near(loss, sdar_formula(STUDENT.tolist(), STUDENT.tolist()))
    assert leaf.grad is not None
    with pytest.raises(AssertionError):
        assert_near(leaf.grad, gradients("sdar")[1], 1e-8)


@methods
def test_the_teacher_gets_no_gradient(name: str) -> None:
    student, teacher_logits = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    ZOO[name][0](student, teacher_logits).backward()
    assert student.grad is not None
    assert teacher_logits.grad is None or (teacher_logits.grad == 0.0).all()


@methods
def test_nothing_active_is_exactly_zero(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for global_name in ("MASK", "ROLLOUT"):
        value = (SAMPLED, OLD, torch.zeros_like(MASK)) if global_name == "ROLLOUT" else torch.zeros_like(MASK)
        monkeypatch.setitem(globals(), global_name, value)
    student = STUDENT.clone().requires_grad_()
    loss = ZOO[name][0](student, TEACHER)
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad is not None
    assert (student.grad == 0.0).all()


@methods
def test_low_precision_logits_are_rounded_once(name: str) -> None:
    student, teacher_logits = STUDENT.bfloat16(), TEACHER.bfloat16()
    exact = ZOO[name][0](student.double(), teacher_logits.double())
    assert_near(ZOO[name][0](student, teacher_logits), exact, 1e-5)


# ---- the folder --------------------------------------------------------------------------------------------------

SOURCE = Path(EXAMPLES / "zoo" / "losses.py").read_text()
README = Path(EXAMPLES / "zoo" / "README.md").read_text()
FUNCTIONS = {node.name: node for node in ast.parse(SOURCE).body if isinstance(node, ast.FunctionDef)}
HELPERS = {"tempered", "sampled_log_probs", "entropy"}


@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - HELPERS))
def test_a_method_is_at_most_30_lines_and_in_the_readme(name: str) -> None:
    node = FUNCTIONS[name]
    first = node.body[1]
    assert node.end_lineno is not None
    assert node.end_lineno - first.lineno + 1 <= 30
    papers = re.findall(r"\d{4}\.\d{5}", ast.get_docstring(node) or "")
    row = next(line for line in README.splitlines() if line.startswith(f"| `{name}` |"))
    assert all(paper in row for paper in papers)


def test_every_setting_is_tested_and_a_preset() -> None:
    names = {name.partition(", ")[2] for name in ZOO if name.startswith("sdpo_loss")}
    assert names == set(losses.SDPO_SETTINGS)
    for name, settings in losses.SDPO_SETTINGS.items():
        preset = SDPOConfig.preset(name.replace(" ", "_"))
        assert settings == {"alpha": preset.alpha, "k": preset.k}


def test_every_method_is_tested() -> None:
    assert {name.split(",")[0] for name in ZOO} == set(FUNCTIONS) - HELPERS
