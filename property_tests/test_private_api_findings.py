"""What the pages say of the private API in words, and the numbers that stand outside of their generated parts."""

from __future__ import annotations

import doctest
import math
import re
import sys
from itertools import pairwise
from statistics import fmean
from typing import Any

import pytest
from programs import EXAMPLES, ROOT

sys.path.insert(0, str(EXAMPLES / "private_api"))

import arms
import curves
import drawing
import figures
import findings
import margins
import replay
import tables

from sdpo import rate_per_tick
from sdpo_rl import SDPOConfig
from sdpo_rl.diagnose import monitors

SHOWN = tables.load(figures.RECORDS)
RECORDED = tables.every_step(SHOWN)
BY_QUESTION = {question: tables.of_question(SHOWN, question) for question in figures.QUESTIONS}
CURES, SETTINGS, LEARNS = (BY_QUESTION[question] for question in ("cures", "settings", "learns"))


def page(name: str) -> str:
    """In one line, without what is generated."""
    text = figures.PLACE.sub("", (ROOT / name).read_text())
    return " ".join(text.split())


def one(by_arm: Any, arm: str) -> curves.Run:
    """The run of an arm with one seed."""
    (run,) = by_arm[arm]
    return run  # type: ignore[no-any-return]


def accuracies(run: curves.Run) -> list[float]:
    return [point[curves.ACCURACY] for point in run["points"]]


def standard_error(run: curves.Run) -> float:
    """Binomial standard error of the largest early rise of the cut completions."""
    shares = run["log"][margins.CUT]
    start, completions = fmean(shares[: monitors.WINDOW]), run["samples_per_step"]
    rises = margins.rises(run, margins.CUT)
    now = start + max(rise for samples, rise in rises if samples <= margins.last_early(run))
    variance = now * (1 - now) / monitors.LONG_WINDOW + start * (1 - start) / monitors.WINDOW
    return math.sqrt(variance / completions)


def kept(run: curves.Run) -> bool:
    return curves.best(run) >= curves.LEARNED and curves.fall(run) is None


@pytest.mark.parametrize(
    "module", [arms, curves, drawing, margins, tables], ids=lambda module: module.__name__
)
def test_the_examples_in_docstrings_hold(module: Any) -> None:
    failed, attempted = doctest.testmod(module)
    assert attempted > 0
    assert failed == 0


# --- sentences with numbers of records ------------------------------------------------------------------------


def test_a_sentence_has_the_numbers_of_its_arms() -> None:
    runs = {
        "α=0, a": [{"points": [[0, 0.0, 0.0], [64, 0.1, 0.5], [128, 0.2, 0.25]]}],
        "b": [{"points": [[0, 0.0, 0.0], [64, 0.3, value]]} for value in (0.25, 0.5, 0.0)],
    }
    sentences = [
        "{end[α=0, a]} after {best[α=0, a]} and {early[α=0, a]}, {probability[α=0, a]}, {begins[α=0, a]}",
        "{each[b]}; {bests[b]}; {end[b]}; {begins[b]}",
        "{end[b]} and {end[c]}",
    ]
    assert findings.said(sentences, runs, early=64) == [
        "0.25 after 0.50 and 0.50, 0.20, 64",
        "0.25, 0.50 and 0.00; 0.25, 0.50 and 0.00; 0.25; 64, 64 and never",
    ]


@pytest.mark.parametrize("question", findings.FINDINGS)
def test_every_finding_is_shown(question: str) -> None:
    sentences = findings.FINDINGS[question]
    shown = findings.said(sentences, BY_QUESTION[question])
    # One is about arms without a number.
    assert len(shown) == len(sentences)
    text = (ROOT / "docs" / "results.md").read_text()
    assert all(f"\n* {sentence}\n" in text for sentence in shown)


def test_every_sentence_is_on_its_page() -> None:
    for name in findings.SENTENCES:
        text = (ROOT / "docs" / f"{name.split()[0]}.md").read_text()
        (shown,) = re.findall(rf"<!-- generated: {name} -->\n(.*?)<!-- end -->", text, re.DOTALL)
        assert shown.strip()


@pytest.mark.parametrize("name", ["results", "choosing"])
def test_a_page_begins_with_what_the_runs_show(name: str) -> None:
    """Before the first heading of a section, within thirty lines."""
    text = (ROOT / "docs" / f"{name}.md").read_text()
    above = text[: text.index(f"<!-- generated: {name} summary -->")]
    assert above.count("\n") < 30
    assert "\n## " not in above
    assert "\n|" not in above


# --- what they say in words -----------------------------------------------------------------------------------


def test_sdpo_still_rises_and_the_controls_have_no_success() -> None:
    for run in LEARNS["SDPO"]:
        assert kept(run)
        assert max(accuracies(run)[:-2]) < curves.best(run)
    for arm in ("GRPO", "SDPO, peers only"):
        assert max(max(run["log"]["reward"]) for run in LEARNS[arm]) == 0
    assert (
        max(max(run["log"]["reward"]) for runs in BY_QUESTION["grpo learning rate"].values() for run in runs)
        == 0
    )


def test_what_the_pages_begin_with_is_in_the_records() -> None:
    assert {run["seed"] for runs in LEARNS.values() for run in runs} == {0, 1, 2}
    assert {len(runs) for runs in LEARNS.values()} == {3}
    for arm in ("GRPO", "SDPO, shuffled feedback", "SDPO, peers only"):
        assert max(accuracies(run)[-1] for run in LEARNS[arm]) == 0
    alone, slower = (CURES[arm] for arm in ("collapsing", "collapsing + rate per 256 samples"))
    assert [run["seed"] for run in alone] == [run["seed"] for run in slower] == [0, 1]
    assert [accuracies(run)[-1] for run in alone] == [0, 0]
    settings = alone[0]["settings"]
    assert (settings["alpha"], settings["teacher_update_rate"], alone[0]["samples_per_step"]) == (
        0.0,
        0.05,
        64,
    )
    assert rate_per_tick(0.05, samples=256, per_samples=64) / 0.05 == pytest.approx(4, abs=0.5)
    for arm in ("collapsing + SRPO", "collapsing + hybrid λ=0.5"):
        assert kept(one(CURES, arm))
    alpha = {arm: findings.begins(one(SETTINGS, arm)) for arm in ("α=0", "α=0.1", "α=0.5")}
    assert alpha["α=0"] == min(start for start in alpha.values() if start is not None)
    presets = (SDPOConfig.preset(name) for name in ("generalization", "rich_feedback", "test_time"))
    assert {config.alpha for config in presets} == {0.5, 1.0}


def test_what_keeps_and_what_loses_in_the_setting_that_collapses() -> None:
    alone, second = CURES["collapsing"]
    assert curves.best(alone) == 0
    assert accuracies(second)[-1] == 0 < curves.LEARNED < curves.best(second)
    outcomes = {arm: [kept(run) for run in runs] for arm, runs in CURES.items()}
    assert outcomes == {
        "collapsing": [False, False],
        "collapsing + rate per 256 samples": [True, False],
        "collapsing + batch-token-mean": [False, False],
        "collapsing + SRPO routing": [False],
        "collapsing + SRPO": [True],
        "collapsing + hybrid λ=0.1": [False],
        "collapsing + hybrid λ=0.5": [True],
        "collapsing + confidence weights": [False],
        "collapsing + pass-rate weights": [False],
        "collapsing + anchor 0.1": [True],
        "collapsing + teacher restart": [False],
        "collapsing + trust region": [False],
    }
    two = [arm for arm, runs in CURES.items() if len(runs) == 2]
    assert {run["seed"] for runs in CURES.values() if len(runs) == 1 for run in runs} == {0}
    assert two == list(CURES)[:3]
    slower, other = CURES["collapsing + rate per 256 samples"]
    assert curves.fall(other) == other["points"][-1][0]
    assert abs(accuracies(slower)[-1] - accuracies(other)[-1]) == pytest.approx(0.25)
    assert sum(value == 0 for value in accuracies(one(CURES, "collapsing + trust region"))[8:]) >= 3
    # Between the best and the worst, within a few hundredths, nothing else was lost.
    for arm in ("collapsing + teacher restart", "collapsing + trust region"):
        assert curves.fall(one(CURES, arm), replay.COLLAPSED) is None


def test_the_published_settings_are_those_of_the_arm() -> None:
    settings = one(CURES, "collapsing + SRPO")["settings"]
    for name in ("routing", "loss_aggregation", "token_weights"):
        assert f'`{name}="{settings[name]}"`' in (ROOT / "docs" / "choosing.md").read_text()
    assert one(CURES, "collapsing + hybrid λ=0.5")["settings"]["grpo_weight"] == 0.5
    assert CURES["collapsing + rate per 256 samples"][0]["settings"]["teacher_rate_samples"] == 256
    assert one(CURES, "collapsing + anchor 0.1")["settings"]["anchor_weight"] == 0.1


def test_what_the_settings_that_were_tried_show() -> None:
    assert {len(runs) for runs in SETTINGS.values()} == {1}
    assert {run["seed"] for runs in SETTINGS.values() for run in runs} == {100}
    hybrid = one(SETTINGS, "α=0, hybrid λ=0.5")
    learned = next(i for i, value in enumerate(accuracies(hybrid)) if value >= curves.LEARNED)
    assert sum(value < 0.05 for value in accuracies(hybrid)[learned:]) == 3
    assert kept(hybrid)
    ends = {arm: accuracies(one(SETTINGS, arm))[-1] for arm in SETTINGS}
    changes = {
        arm: max(abs(after - before) for before, after in pairwise(accuracies(one(SETTINGS, arm))))
        for arm in SETTINGS
    }
    assert (sum(change >= 0.25 for change in changes.values()), len(changes)) == (6, 10)
    assert ends["α=0, SRPO"] > ends["α=0"]
    for srpo, without in (("α=0.5, SRPO", "α=0.5"), ("α=0, SRPO, lr 2e-05", "α=0, lr 2e-05")):
        assert ends[srpo] < ends[without]
    # With the setting that collapses, SRPO was compared four times and half of the loss from GRPO twice.
    cured = {arm: fmean(accuracies(run)[-1] for run in runs) for arm, runs in CURES.items()}
    assert cured["collapsing + SRPO"] > cured["collapsing"]
    assert cured["collapsing + hybrid λ=0.5"] > cured["collapsing"]
    assert ends["α=0, hybrid λ=0.5"] > ends["α=0"]
    assert not kept(one(SETTINGS, "α=0, SRPO, rate 0.02"))
    assert not kept(one(SETTINGS, "α=0, confidence weights"))


def test_the_settings_that_were_tried_have_a_slow_teacher() -> None:
    rates = {arm: runs[0]["settings"]["teacher_update_rate"] for arm, runs in SETTINGS.items()}
    assert {arm: rate for arm, rate in rates.items() if rate != 0.01} == {"α=0, SRPO, rate 0.02": 0.02}
    assert 0.01 < rate_per_tick(0.05, samples=64, per_samples=256) < 0.02
    text = page("docs/choosing.md")
    assert "The teacher's rate is 0.01 per 64 completions, a little slower than the paper's" in text
    assert f"These runs end after {max(run['points'][-1][0] for run in SHOWN)} completions" in text


def test_two_settings_of_the_rate_have_runs() -> None:
    settings = [runs[0]["settings"] for runs in BY_QUESTION["rate"].values()]
    assert [(known["alpha"], known["teacher_update_rate"]) for known in settings] == [
        (0.0, 0.05),
        (0.5, 0.01),
    ]
    assert len(arms.arms("rate")) == 16


def test_what_has_no_runs_is_in_the_list_of_debts() -> None:
    (row,) = [
        line for line in (ROOT / "DEBT.md").read_text().splitlines() if "`examples/private_api` have" in line
    ]
    counts = {question: {len(runs) for runs in by_arm.values()} for question, by_arm in BY_QUESTION.items()}
    assert counts["learns"] == {3}
    assert counts["cures"] == {1, 2}
    assert counts["settings"] == {1}
    assert {question for question, found in counts.items() if not found} == {
        "alpha",
        "support",
        "lasting",
        "lora",
    }
    assert all(f"`{question}`" in row for question in counts if question != "grpo learning rate")
    assert (
        f"{len(arms.arms('rate')) - len(BY_QUESTION['rate'])} of the {len(arms.arms('rate'))} settings" in row
    )
    assert len(arms.arms("cures")) - len(CURES) == 1
    assert {run["task"] for run in SHOWN} == {"kit"}


def test_the_example_lists_every_question_and_module() -> None:
    text = (EXAMPLES / "private_api" / "README.md").read_text()
    questions = re.findall(r'^\| `"?([\w ]+)"?` \| ', text, re.MULTILINE)
    assert set(questions) == set(arms.QUESTIONS)
    assert (
        f"trains with {['no', 'one', 'two', 'three', 'four', 'five', 'six', 'seven'][len(arms.arms('learns'))]}"
        in text
    )
    modules = {path.name for path in (EXAMPLES / "private_api").glob("*.py")} - {"record.py", "probe.py"}
    assert {name for name in modules if f"`{name}`" not in text} == set()


# --- the log before a collapse --------------------------------------------------------------------------------


def test_no_metric_of_the_first_twenty_steps_tells_what_becomes_of_a_run() -> None:
    groups = [
        [run for run in SHOWN if run["log"] and tables.outcome(run) == name] for name in tables.OUTCOMES
    ]
    groups = [[run for run in group if run["method"] == "sdpo"] for group in groups]
    for name in tables.SIGNS:
        for steps in (tables.FIRST, tables.LATER):
            ranges = []
            for group in groups:
                known = [value for run in group if (value := tables.window(run, name, steps)) is not None]
                ranges.append((min(known), max(known)))
            assert all(low <= high for low, _ in ranges for _, high in ranges), (name, steps)
    text = page("docs/choosing.md")
    assert "in every row the ranges overlap" in text
    assert f'"fell" is an end below {curves.FALLEN:g} of the best' in text
    assert f'"learned nothing" is a best accuracy below {curves.LEARNED:g}' in text
    learned, almost = ({"points": [[0, 0.0, 0.0], [64, 0.0, value]]} for value in (0.5, 0.49))
    assert (tables.outcome(learned), tables.outcome(almost)) == ("learned", None)
    assert '"Learned" is a best accuracy of 0.5 or more and no fall' in text


def test_the_numbers_beside_the_warnings_are_those_of_the_records() -> None:
    text = page("docs/choosing.md")
    kept_runs, collapsed = tables.kept_and_collapsed(SHOWN)
    assert len(collapsed) == 6
    leads = []
    for run in collapsed:
        fell = curves.fall(run, replay.COLLAPSED)
        assert fell is not None
        leads.append(fell - min(replay.warnings(run, evaluations=False).values()))
        # The entropy is above its start until then.
        assert margins.largest_cut_rise(run, entropy_rose=False) < 1e-9
    assert f"the first warning comes {min(leads)} to {max(leads)} completions before" in text
    assert f"until {replay.LEAD} completions before that fall" in text
    partly = [run for run in RECORDED if curves.fall(run) is not None and run not in collapsed]
    assert len(partly) == 6
    for run in partly:
        assert min(replay.warnings(run, evaluations=True).values(), default=10**9) > curves.fall(run)  # type: ignore[operator]
    early = sum(
        max(margins.rises(run, margins.ENTROPY, monitors.WINDOW), key=lambda point: point[1])[0]
        <= 20 * run["samples_per_step"]
        for run in RECORDED
    )
    assert f"in {early} of the {len(RECORDED)} runs it is highest within the first twenty steps" in text
    (never,) = [run for run in RECORDED if tables.run_name(run) == "α=0, rate 0.05 per 64, seed 0"]
    assert curves.best(never) == 0
    cut = fmean(never["log"][margins.CUT][-monitors.LONG_WINDOW :])
    assert f"at the end {cut:.2f} of its completions are cut" in text
    # Without the entropy, another run is the nearest.
    by_name = {tables.run_name(run): run for run in kept_runs}
    any_entropy = {
        name: max(margins.largest_cut_rise(run, entropy_rose=entropy_rose) for entropy_rose in (False, True))
        for name, run in by_name.items()
    }
    assert max(any_entropy, key=lambda name: any_entropy[name]) == "collapsing + hybrid λ=0.5, seed 0"
    errors = [standard_error(run) for run in collapsed]
    assert {f"{error:.2f}" for error in errors} == {"0.02"}
    distances = [
        monitors.CUT_RISE_WITH_ENTROPY
        - max(margins.largest_cut_rise(run, entropy_rose=True) for run in kept_runs),
        min(margins.largest_cut_rise(run, entropy_rose=True) for run in collapsed)
        - monitors.CUT_RISE_WITH_ENTROPY,
    ]
    assert all(0.9 < distance / min(errors) < 2.1 for distance in distances)


def test_runs_are_as_near_to_the_limits_as_their_comments_say() -> None:
    kept, collapsed = tables.kept_and_collapsed(SHOWN)
    assert 0.10 < max(margins.largest_cut_rise(run, entropy_rose=True) for run in kept) < 0.11
    assert 0.12 < max(margins.largest_cut_rise(run, entropy_rose=False) for run in kept) < 0.13
    assert 0.15 < min(margins.largest_cut_rise(run, entropy_rose=True) for run in collapsed) < 0.16
    assert 0.14 < max(margins.largest_reward_fall(run) for run in kept) < 0.15
    assert 3.4 < max(margins.largest_entropy_ratio(run) for run in RECORDED) < 3.55
    first = [sum(run["log"][margins.CUT][step : step + 5]) / 5 for run in kept for step in range(16)]
    assert 0.24 < max(first) < 0.25


def test_a_limit_between_the_others_is_counted() -> None:
    assert margins.leave_one_out([0.0, 0.1], [0.3, 0.5]) == 4
    # Without the largest that is to be below, the middle is 0.2; without the smallest above, 0.4.
    assert margins.leave_one_out([0.0, 0.1, 0.25], [0.3, 0.55]) == 3


def test_a_rise_counts_values_before_the_first_as_the_start() -> None:
    values = [0.1, 0.1, 0.2, 0.1, 0.0, 0.6, 0.4]
    run = {"samples_per_step": 64, "log": {"step": list(range(1, 8)), margins.CUT: values}}
    assert [samples for samples, _ in margins.rises(run, margins.CUT)] == [320, 384, 448]
    assert [rise for _, rise in margins.rises(run, margins.CUT)] == pytest.approx([0.0, 0.5 / 15, 0.8 / 15])
    long = {
        "samples_per_step": 64,
        "log": {"step": list(range(1, 41)), margins.CUT: [0.1] * 20 + [0.3] * 20},
    }
    rises = [rise for _, rise in margins.rises(long, margins.CUT)]
    assert rises[-1] == pytest.approx(0.2)
    assert all(before <= after + 1e-12 for before, after in pairwise(rises))
