"""Every rule of the probe's verdict fires at its threshold and not before, and names a setting to change."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest

from sdpo_rl.diagnose.probe import verdict as rules
from sdpo_rl.diagnose.probe.result import (
    Agreement,
    Effect,
    Lengths,
    RightAnswers,
    Signal,
    Success,
    TeacherRate,
    Verdict,
)

SUCCESS = Success(bare=0.1, same_prompts=0.1, retry=0.5, error=0.1, retried=64, not_measured="")
SIGNAL = Signal(share=0.9, without={"the only success": 0.1}, answer_in_feedback=0.0)
AGREEMENT = Agreement(
    tokens=100,
    divergence=0.05,
    argmax=0.8,
    student_entropy=0.5,
    teacher_entropy=0.5,
    student_topk_mass=0.99,
    teacher_topk_mass=0.99,
    student_favourite=1e-2,
    teacher_favourite=0.5,
    effects=[Effect(alpha, 0.1, 0.01, unmoved) for alpha, unmoved in ((0.0, 0.0), (0.5, 0.2), (1.0, 0.3))],
)
LENGTHS = Lengths(
    completion=20.0,
    completion_limit=64,
    at_limit=0.1,
    teacher_prompt=80.0,
    teacher_prompt_limit=512,
    truncated=0.0,
)
RATE = TeacherRate(per_256_samples=0.05, published=0.05, warning="")


def judged(**changes: Any) -> Verdict:
    found: dict[str, Any] = {
        "alpha": 0.5,
        "k": 100,
        "success": SUCCESS,
        "signal": SIGNAL,
        "right_answers": None,
        "agreement": AGREEMENT,
        "lengths": LENGTHS,
        "teacher_rate": RATE,
    }
    return rules.verdict(**{**found, **changes})


def change(value: Any, **changes: Any) -> Any:
    return dataclasses.replace(value, **changes)


def effects(own: float, forward: float) -> Agreement:
    return change(AGREEMENT, effects=[Effect(0.0, 0.1, 0.1, forward), Effect(0.5, 0.1, 0.0, own)])


def test_a_better_teacher_with_a_signal_learns_without_a_remark() -> None:
    found = judged()
    assert (found.outlook, found.remarks) == ("learns", [])
    assert found.summary.startswith("learns likely")


@pytest.mark.parametrize(
    ("rule", "weight", "outlook", "just", "not_yet", "fix"),
    [
        (
            "no_signal",
            "stops",
            "does not learn",
            {"signal": change(SIGNAL, share=0.0, without={"no feedback": 1.0})},
            {"signal": change(SIGNAL, share=0.5)},
            "success_reward_threshold",
        ),
        (
            "few_rows",
            "slows",
            "learns slowly",
            {"signal": change(SIGNAL, share=0.49)},
            {"signal": change(SIGNAL, share=0.5)},
            "num_generations",
        ),
        (
            "solved",
            "stops",
            "does not learn",
            {"success": change(SUCCESS, bare=0.95)},
            {"success": change(SUCCESS, bare=0.94)},
            "harder prompts",
        ),
        (
            "no_better",
            "stops",
            "does not learn",
            {"success": change(SUCCESS, retry=0.3)},
            {"success": change(SUCCESS, retry=0.31)},
            "larger model",
        ),
        (
            "no_divergence",
            "stops",
            "does not learn",
            {"agreement": change(AGREEMENT, divergence=9e-4)},
            {"agreement": change(AGREEMENT, divergence=1e-3)},
            "feedback",
        ),
        (
            "unmoved",
            "delays",
            "learns",
            {"agreement": effects(0.5, 0.25)},
            {"agreement": effects(0.49, 0.0)},
            "alpha=0",
        ),
        (
            "outside",
            "slows",
            "learns slowly",
            {"agreement": change(AGREEMENT, student_topk_mass=0.89)},
            {"agreement": change(AGREEMENT, student_topk_mass=0.9)},
            "raise k",
        ),
        (
            "answer_in_feedback",
            "risk",
            "learns",
            {"signal": change(SIGNAL, answer_in_feedback=0.25)},
            {"signal": change(SIGNAL, answer_in_feedback=0.24)},
            "say what is wrong",
        ),
        (
            "cut_completions",
            "slows",
            "learns slowly",
            {"lengths": change(LENGTHS, at_limit=0.5)},
            {"lengths": change(LENGTHS, at_limit=0.49)},
            "max_completion_length=64",
        ),
        (
            "cut_prompts",
            "slows",
            "learns slowly",
            {"lengths": change(LENGTHS, truncated=0.26)},
            {"lengths": change(LENGTHS, truncated=0.25)},
            "max_reprompt_length",
        ),
        (
            "fast_teacher",
            "risk",
            "learns",
            {"teacher_rate": change(RATE, warning="set teacher_rate_samples=256")},
            {},
            "teacher_rate_samples",
        ),
    ],
)
def test_a_rule_fires_at_its_threshold_alone(
    rule: str, weight: str, outlook: str, just: dict, not_yet: dict, fix: str
) -> None:
    found = judged(**just)
    (remark,) = found.remarks
    assert (remark.rule, remark.weight, found.outlook) == (rule, weight, outlook)
    assert fix in remark.text
    assert judged(**not_yet).remarks == []
    assert found.summary.endswith("Mind the risk below.") == (weight == "risk")


def test_every_rule_is_tested_and_has_a_reason() -> None:
    parameters = test_a_rule_fires_at_its_threshold_alone.pytestmark[0].args[1]
    known = {
        name: function
        for name, function in inspect.getmembers(rules, inspect.isfunction)
        if inspect.signature(function).return_annotation == "Remark | None"
    }
    assert set(known) == {case[0] for case in parameters}
    assert all(function.__doc__ for function in known.values())


def test_alpha_0_is_no_advice_where_it_moves_no_more_or_is_set() -> None:
    assert judged(agreement=effects(0.9, 0.5)).remarks == []
    zero = change(AGREEMENT, effects=[Effect(0.0, 0.1, 0.1, 0.9)])
    assert judged(alpha=0.0, agreement=zero).remarks == []


def test_a_teacher_that_never_succeeds_is_no_better_whatever_the_right_answers_gain() -> None:
    gain = RightAnswers("answer_column", 10, 1.5, 9.0, -11.0, 0.0)
    found = judged(
        success=change(SUCCESS, bare=0.0, same_prompts=0.0, retry=0.0, error=0.0), right_answers=gain
    )
    assert found.outlook == "does not learn"
    assert "does not succeed once in 64 retries" in found.remarks[0].text
    assert "+1.50 nats per token" in found.remarks[0].text


def test_without_retries_the_outlook_is_not_known_but_for_what_stops() -> None:
    unmeasured = change(SUCCESS, same_prompts=None, retry=None, error=None, not_measured="a rollout_func")
    assert judged(success=unmeasured).outlook == "not known"
    assert judged(success=unmeasured, signal=change(SIGNAL, share=0.0)).outlook == "does not learn"


def test_the_worst_comes_first_and_decides() -> None:
    found = judged(
        teacher_rate=change(RATE, warning="slower"),
        signal=change(SIGNAL, share=0.2),
        success=change(SUCCESS, retry=0.1),
    )
    assert [remark.weight for remark in found.remarks] == ["stops", "slows", "risk"]
    assert found.outlook == "does not learn"


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_where_nothing_is_judged_no_success_is_advised(share: float) -> None:
    def advice(**changes: float | None) -> str:
        success = change(SUCCESS, same_prompts=None, retry=None, error=None, **changes)
        return judged(success=success, signal=change(SIGNAL, share=share)).remarks[0].text

    assert "column 'feedback', or pass reward functions" in advice(bare=None)
    assert "num_generations" not in advice(bare=None)
    assert "num_generations" in advice()
