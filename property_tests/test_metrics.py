"""Metrics: means that do not depend on micro-batches, and the conditions of the warnings."""

from __future__ import annotations

import itertools
import json
import logging
import math
from typing import Any, Literal

import pytest
import torch
from hypothesis import strategies as st
from strategies import Claim, generator, name_of, seeds
from torch import Tensor

import sdpo
from sdpo_rl import SDPOConfig
from sdpo_rl.diagnose.warnings import Diagnostics, no_signal
from sdpo_rl.step.head import HeadTransform
from sdpo_rl.step.loss import Targets, from_logits, fused, rollout_weights, step_metrics
from sdpo_rl.step.metrics import MetricSums

# --- sums -------------------------------------------------------------------------------------------------

values = st.lists(st.tuples(st.floats(-9, 9), st.integers(0, 3)), min_size=1, max_size=12)


def identity(totals: Tensor) -> Tensor:
    return totals


def property_a_mean_is_weighted_and_split_does_not_matter(sums: Any, table: Any, cuts: list[int]) -> None:
    metric_sums = sums()
    edges = sorted({0, len(table), *(c for c in cuts if c < len(table))})
    for start, end in itertools.pairwise(edges):
        part = table[start:end]
        total = sum(value * weight for value, weight in part)
        metric_sums.add({"m": (torch.tensor(total), torch.tensor(sum(w for _, w in part)))})
    weight = sum(w for _, w in table)
    got = metric_sums.means(identity)
    if weight == 0:
        assert got == {}
    else:
        assert got["m"] == pytest.approx(sum(v * w for v, w in table) / weight, rel=1e-5, abs=1e-5)
    assert metric_sums.means(identity) == {}


class MeanOfMeans(MetricSums):
    def add(self, values: Any) -> None:
        super().add({k: (t / w.clamp(min=1), (w > 0).long()) for k, (t, w) in values.items()})


CLAIMS = [
    Claim(
        property_a_mean_is_weighted_and_split_does_not_matter,
        MetricSums,
        MeanOfMeans,
        {"table": values, "cuts": st.lists(st.integers(1, 11), max_size=4)},
    )
]


@pytest.mark.parametrize("claim", CLAIMS, ids=name_of)
def test_holds(claim: Claim) -> None:
    claim.holds()


@pytest.mark.parametrize("claim", CLAIMS, ids=name_of)
def test_rejects_its_counter_example(claim: Claim) -> None:
    claim.rejects_counter_example()


def test_processes_reduce_once_in_any_order_of_names() -> None:
    one, two = MetricSums(), MetricSums()
    one.add({"a": (torch.tensor(1.0), torch.tensor(1)), "b": (torch.tensor(4.0), torch.tensor(2))})
    two.add({"b": (torch.tensor(2.0), torch.tensor(1)), "a": (torch.tensor(0.0), torch.tensor(0))})
    reductions: list[Tensor] = []
    two.means(lambda totals: reductions.append(totals) or totals)
    assert one.means(lambda totals: totals + reductions[0]) == {"a": 1.0, "b": 2.0}
    assert len(reductions) == 1


# --- what a micro-batch reports ---------------------------------------------------------------------------


def property_reports_are_means_over_active_tokens(report: Any, seed: int, support: str) -> None:
    rng = generator(seed)
    student, teacher = (torch.randn(2, 3, 7, generator=rng) * 2 for _ in range(2))
    tokens = torch.randint(7, (2, 3), generator=rng)
    mask = torch.rand(2, 3, generator=rng) < 0.7
    mask[0, 0] = True
    config = SDPOConfig(k=3, support=support, is_clip=1.2)
    old = student.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    old = old + torch.randn(2, 3, generator=rng) * 0.3
    targets = Targets(tokens, mask, old, None)
    output = from_logits(config, student * 1.5, [teacher * 1.5], targets, temperature=1.5)
    sums = MetricSums()
    sums.add(report(config, output, targets))
    got = {k.removeprefix("self_distillation/"): v for k, v in sums.means(identity).items()}
    expected: dict[str, list[float]] = {}
    for b in range(2):
        for t in range(3):
            if not mask[b, t]:
                continue
            p, q = (z[b, t].double().softmax(-1).tolist() for z in (student, teacher))
            y, top = int(tokens[b, t]), sorted(range(7), key=lambda v: -p[v])[:3]
            gap = math.log(q[y]) - math.log(p[y])
            row = {
                "student_entropy": -sum(x * math.log(x) for x in p),
                "teacher_entropy": -sum(x * math.log(x) for x in q),
                "sampled_token_log_ratio": gap,
                "sampled_token_agreement": float(gap >= 0),
                "student_topk_mass": sum(p[v] for v in top),
                "student_tail_mass": 1 - sum(p[v] for v in top),
                "teacher_topk_mass": sum(q[v] for v in top),
                "teacher_tail_mass": 1 - sum(q[v] for v in top),
                "is_clip_fraction": float(math.log(p[y]) - float(old[b, t]) > math.log(1.2)),
            }
            for name, value in row.items():
                expected.setdefault(name, []).append(value)
    assert got.pop("divergence") >= 0
    assert got.keys() == expected.keys()
    for name, column in expected.items():
        assert got[name] == pytest.approx(sum(column) / len(column), rel=1e-4, abs=1e-4), name


def over_all_tokens(config: Any, output: Any, targets: Targets) -> Any:
    everywhere = {k: v if k == "active_tokens" else v * 0.5 for k, v in output.metrics.items()}
    return step_metrics(config, output._replace(metrics=everywhere), targets)


REPORT = {"seed": seeds, "support": st.just("student")}


def test_reports() -> None:
    claim = Claim(property_reports_are_means_over_active_tokens, step_metrics, over_all_tokens, REPORT)
    claim.holds()
    claim.rejects_counter_example()


def test_no_topk_mass_without_a_topk() -> None:
    logits = torch.zeros(1, 1, 4)
    targets = Targets(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.bool), None, None)
    config = SDPOConfig(support="full")
    names = step_metrics(config, from_logits(config, logits, [logits], targets, temperature=1.0), targets)
    assert not any("topk" in name or "tail" in name or "clip" in name for name in names)


SIDES: list[Literal["student", "teacher"]] = ["student", "teacher"]


@pytest.mark.parametrize("support", SIDES)
def test_a_small_tail_is_not_lost_in_rounding(support: Any) -> None:
    """1 − mass would be 0 or negative."""
    student, teacher = torch.tensor([[[40.0, 38.0, 5.0, 4.0]]]), torch.tensor([[[38.0, 40.0, 3.0, 7.0]]])
    targets = Targets(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.bool), None, None)
    config = SDPOConfig(k=2, support=support)
    weight = torch.eye(4)
    transform = HeadTransform(1.0, None)
    outputs = [
        from_logits(config, student, [teacher], targets, temperature=1.0),
        fused(
            config,
            sdpo.LMHead(student, weight),
            [sdpo.LMHead(teacher, weight)],
            targets,
            temperature=1.0,
            transform=transform,
        ),
    ]
    for output in outputs:
        report = step_metrics(config, output, targets)
        for side, logits in (("student", student), ("teacher", teacher)):
            mass = logits.double().softmax(-1)[..., 2:].sum().item()
            total, _ = report[f"self_distillation/{side}_tail_mass"]
            assert 0 < mass < 1e-13
            assert total.item() == pytest.approx(mass, rel=1e-4)


@pytest.mark.parametrize("support", SIDES)
def test_the_masses_are_those_of_the_support(support: Any) -> None:
    """The top tokens of the two models are disjoint."""
    student, teacher = (
        torch.tensor([[[5.0, 4.0, 0.0, 0.0, 1.0]]]),
        torch.tensor([[[0.0, 0.0, 5.0, 4.0, 1.0]]]),
    )
    targets = Targets(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.bool), None, None)
    config = SDPOConfig(k=2, support=support)
    report = step_metrics(config, from_logits(config, student, [teacher], targets, temperature=1.0), targets)
    top = [0, 1] if support == "student" else [2, 3]
    for side, logits in (("student", student), ("teacher", teacher)):
        total, _ = report[f"self_distillation/{side}_topk_mass"]
        assert total.item() == pytest.approx(logits.softmax(-1)[..., top].sum().item(), rel=1e-5)


def test_a_trust_region_with_impossible_tokens_is_finite() -> None:
    logits = torch.tensor([[[1.0, 0.0, -math.inf, 2.0, -math.inf]]])
    other = torch.tensor([[[0.0, 1.0, -math.inf, -math.inf, 2.0]]])
    targets = Targets(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.bool), None, None)
    config = SDPOConfig(k=2, teacher_mode="trust_region", trust_region_coef=0.25)
    student = logits.clone().requires_grad_()
    output = from_logits(config, student, [logits, other], targets, temperature=2.0)
    # Of the five tokens two are possible for both, in proportion exp(¾·z + ¼·z′).
    q = [math.exp(0.75 / 2), math.exp(0.25 / 2)]
    log_ratio = math.log(q[0] / sum(q)) - (logits / 2.0).log_softmax(-1)[0, 0, 0].item()
    assert output.metrics["sampled_token_log_ratio"].item() == pytest.approx(log_ratio, rel=1e-5)
    output.total.backward()
    assert output.total.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


# --- weights of the inference engine ----------------------------------------------------------------------


def test_rollout_weights() -> None:
    old = torch.tensor([[-1.0, -1.0, -1.0]])
    rollout = torch.tensor([[-1.0, -4.0, math.nan]])
    rows = {"old_per_token_logps": old, "sampling_per_token_logps": rollout}
    assert rollout_weights(rows, clip=2.0).tolist() == [[1.0, 2.0, 1.0]]  # type: ignore[union-attr]
    ratio = torch.tensor([[3.0], [0.5]], requires_grad=True)
    own = rollout_weights({**rows, "importance_sampling_ratio": ratio}, clip=2.0)
    assert own is not None
    assert own.tolist() == [[2.0], [0.5]]
    assert not own.requires_grad
    assert rollout_weights({"old_per_token_logps": old}, clip=2.0) is None
    assert rollout_weights({}, clip=2.0) is None


# --- warnings ---------------------------------------------------------------------------------------------

QUIET = {
    "self_distillation/empty_target_batch": 0.0,
    "self_distillation/truncated_reprompt_fraction": 0.0,
    "self_distillation/dropped_reprompt_fraction": 0.0,
}


def warnings(
    caplog: pytest.LogCaptureFixture, batches: list[tuple[dict[str, float], list[int]]]
) -> list[str]:
    watch = Diagnostics(SDPOConfig(diagnostics_patience=3))
    with caplog.at_level(logging.WARNING, logger="sdpo_rl"):
        for changes, lengths in batches:
            watch.observe_batch({**QUIET, **changes}, lengths)
    return [record.getMessage() for record in caplog.records]


def test_a_good_run_has_no_warnings(caplog: pytest.LogCaptureFixture) -> None:
    assert warnings(caplog, [({}, [10, 20])] * 20) == []


def test_batches_without_signal_are_warned_about_once_per_patience(caplog: pytest.LogCaptureFixture) -> None:
    empty = ({"self_distillation/empty_target_batch": 1.0, "self_distillation/best_score": 0.0}, [5])
    messages = warnings(caplog, [empty, empty, ({}, [5]), empty, empty])
    assert messages == []
    messages = warnings(caplog, [empty] * 7)
    assert len(messages) == 2
    assert "success_reward_threshold=1" in messages[0]
    assert "for 3 generation batches" in messages[0]


def test_the_warning_of_no_signal_names_the_best_score(caplog: pytest.LogCaptureFixture) -> None:
    def empty(score: float | None) -> tuple[dict[str, float], list[int]]:
        best = {} if score is None else {"self_distillation/best_score": score}
        return {"self_distillation/empty_target_batch": 1.0, **best}, [5]

    good = {"self_distillation/best_score": 2.0}
    batches = [(good, [5]), empty(0.25), empty(0.5), empty(None), (good, [5]), *[empty(None)] * 3]
    messages = warnings(caplog, batches)
    assert ["0.5)" in messages[0], "no reward function judged" in messages[1], len(messages)] == [
        True,
        True,
        2,
    ]
    # Where nothing was judged, no setting of success helps.
    assert ["success" in message for message in messages] == [True, False]


@pytest.mark.parametrize(
    "options",
    [{"grpo_weight": 0.5}, {"grpo_weight_final": 0.5}, {"routing": "srpo"}, {"grpo_weight_final": 0.0}],
)
def test_the_warning_of_no_signal_says_what_trains_all_the_same(
    caplog: pytest.LogCaptureFixture, options: dict[str, Any]
) -> None:
    diagnostics = Diagnostics(SDPOConfig(diagnostics_patience=1, **options))
    empty = {
        "self_distillation/empty_target_batch": 1.0,
        "self_distillation/best_score": 0.5,
        "self_distillation/truncated_reprompt_fraction": 0.0,
        "self_distillation/dropped_reprompt_fraction": 0.0,
    }
    with caplog.at_level(logging.WARNING, logger="sdpo_rl"):
        diagnostics.observe_batch(empty, [5])
    (record,) = caplog.records
    trains = options != {"grpo_weight_final": 0.0}
    assert ("Only GRPO's part of the loss trains; lower the threshold" in record.getMessage()) == trains
    assert ("Nothing is learned" in record.getMessage()) != trains


@pytest.mark.parametrize(
    ("metrics", "options", "words"),
    [
        ({"feedback_available_fraction": 1.0}, {}, "no token of these completions counts"),
        ({"best_score": 1.0}, {}, "no token of these completions counts"),
        (
            {"best_score": torch.tensor(0.7).item()},
            {"success_reward_threshold": 0.7},
            "no token of these completions counts",
        ),
        (
            {"feedback_available_fraction": 1.0, "dropped_reprompt_fraction": 1.0},
            {},
            "raise max_reprompt_length",
        ),
        (
            {"feedback_available_fraction": 0.5},
            {"include_environment_feedback": False},
            "the feedback is not used. Nothing is learned; set include_environment_feedback=True.",
        ),
        ({"best_score": 0.5}, {}, "(the best score was 0.5), and there was no feedback"),
    ],
)
def test_the_warning_of_no_signal_names_the_cause(
    metrics: dict[str, float], options: dict[str, Any], words: str
) -> None:
    given = {f"self_distillation/{name}": value for name, value in metrics.items()}
    observed = {**QUIET, "self_distillation/empty_target_batch": 1.0, **given}
    cause, fix = no_signal(observed, SDPOConfig(**options), best_score=metrics.get("best_score"))
    assert words in f"{cause}. Nothing is learned; {fix}."


def test_the_best_score_is_part_of_the_state(caplog: pytest.LogCaptureFixture) -> None:
    first, second = (Diagnostics(SDPOConfig(diagnostics_patience=2)) for _ in range(2))
    empty = {**QUIET, "self_distillation/empty_target_batch": 1.0}
    first.observe_batch({**empty, "self_distillation/best_score": -0.5}, [5])
    second.load_state(json.loads(json.dumps(first.state())))
    with caplog.at_level(logging.WARNING, logger="sdpo_rl"):
        second.observe_batch({**empty, "self_distillation/best_score": -2.0}, [5])
    assert "the best score was -0.5)" in caplog.text


def best_scores(*scores: float | None) -> list[tuple[dict[str, float], list[int]]]:
    """Batches with a signal and these best scores."""
    return [({} if s is None else {"self_distillation/best_score": s}, [5]) for s in scores]


def test_a_best_score_that_stays_below_the_threshold_is_warned_about_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    messages = warnings(caplog, best_scores(*[0.5] * 9))
    assert len(messages) == 1
    assert messages[0].startswith(
        "The best score of each of the last 3 generation batches with a signal was 0.5, below "
        "success_reward_threshold=1:"
    )


@pytest.mark.parametrize(
    "scores",
    [[0.0] * 9, [-1.0] * 9, [1.0] * 9, [0.5, 0.5, 0.4] * 3, [0.5, 0.5, 1.0] * 3, [0.5, 0.5, None] * 3],
)
def test_other_best_scores_are_no_ceiling(
    caplog: pytest.LogCaptureFixture, scores: list[float | None]
) -> None:
    """A hard task, one that is learned, scores that change, and batches that no function judged."""
    assert warnings(caplog, best_scores(*scores)) == []


def test_a_score_that_float32_rounds_down_reaches_its_threshold(caplog: pytest.LogCaptureFixture) -> None:
    watch = Diagnostics(SDPOConfig(diagnostics_patience=1, success_reward_threshold=0.7))
    score = torch.tensor(0.7).item()
    assert score < 0.7
    with caplog.at_level(logging.WARNING, logger="sdpo_rl"):
        watch.observe_batch({**QUIET, "self_distillation/best_score": score}, [5])
    assert caplog.text == ""


def test_the_ceiling_is_part_of_the_state(caplog: pytest.LogCaptureFixture) -> None:
    first, second, old = (Diagnostics(SDPOConfig(diagnostics_patience=2)) for _ in range(3))
    ((metrics, lengths),) = best_scores(0.5)
    first.observe_batch({**QUIET, **metrics}, lengths)
    state = json.loads(json.dumps(first.state()))
    old.load_state({name: value for name, value in state.items() if name != "ceiling"})
    second.load_state(state)
    with caplog.at_level(logging.WARNING, logger="sdpo_rl"):
        old.observe_batch({**QUIET, **metrics}, lengths)
        assert caplog.text == ""
        second.observe_batch({**QUIET, **metrics}, lengths)
    assert "The best score of each of the last 2 generation batches with a signal was 0.5" in caplog.text


def test_truncation_and_dropped_rows_are_warned_about_once(caplog: pytest.LogCaptureFixture) -> None:
    often = {"self_distillation/truncated_reprompt_fraction": 0.5}
    messages = warnings(
        caplog, [(often, [5])] * 3 + [({"self_distillation/dropped_reprompt_fraction": 0.1}, [5])] * 3
    )
    assert [("max_reprompt_length" in message) for message in messages] == [True, True]


def test_shrinking_completions_are_warned_about_once(caplog: pytest.LogCaptureFixture) -> None:
    messages = warnings(caplog, [({}, [100, 300])] * 5 + [({}, [30, 40])] * 3)
    assert len(messages) == 1
    assert "from 200 to 35 tokens" in messages[0]


def test_a_small_top_k_mass_is_warned_about_once(caplog: pytest.LogCaptureFixture) -> None:
    watch = Diagnostics(SDPOConfig())
    for mass in (0.95, 0.5, 0.4):
        watch.observe_means({"self_distillation/student_topk_mass": mass})
    assert [record.getMessage() for record in caplog.records if "50%" in record.getMessage()]
    assert len(caplog.records) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_divergence_that_is_not_finite_stops_the_run(value: float) -> None:
    with pytest.raises(FloatingPointError, match=f"became {value}"):
        Diagnostics(SDPOConfig()).observe_means({"self_distillation/divergence": value})
