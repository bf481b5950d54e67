"""Each monitor warns in a run that collapses its way, once, and is silent in a recording of a run that learns."""

from __future__ import annotations

import ast
import dataclasses
import json
import logging
import math
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from sdpo_rl import SDPOConfig
from sdpo_rl.diagnose import monitors
from sdpo_rl.diagnose.monitors import Monitors
from sdpo_rl.diagnose.probe import verdict
from sdpo_rl.diagnose.probe.result import Signal
from sdpo_rl.diagnose.settings import fast_teacher, warn_of_best_loss, warn_of_fast_teacher
from sdpo_rl.diagnose.warnings import Diagnostics
from sdpo_rl.rollout.answers import answer_in_feedback

LIMIT, REWARD = "completions/clipped_ratio", "reward"
ENTROPY, DIVERGENCE, ANSWERS = (
    f"self_distillation/{name}" for name in ("student_entropy", "divergence", "answer_in_feedback_fraction")
)
Logs = list[dict[str, float]]


def series(name: str, values: Sequence[float]) -> Logs:
    return [{name: value} for value in values]


def joined(one: Logs, other: Logs) -> Logs:
    return [{**a, **b} for a, b in zip(one, other, strict=True)]


def evaluations(pairs: Sequence[tuple[float, float]]) -> Logs:
    """Training rewards and, after each two of them, an evaluation."""
    return [
        entry
        for held_out, trained in pairs
        for entry in ({REWARD: trained}, {REWARD: trained}, {"eval_loss": 0.1, "eval_reward": held_out})
    ]


# What a collapse looks like, what healthy runs look like, and a part of the message.
COLLAPSES: dict[str, tuple[Logs, list[Logs], str]] = {
    "length_limit": (
        joined(
            series(LIMIT, [0.1] * 20 + [0.2, 0.3, 0.4, 0.5, 0.6, 0.7]),
            series(ENTROPY, [0.5] * 5 + [0.6] * 21),
        ),
        [
            series(LIMIT, [0.6] * 40),
            series(LIMIT, [0.0] * 5 + [0.24] * 40),  # as certain as at the start, as far as is known
            joined(series(LIMIT, [0.0] * 5 + [0.24] * 40), series(ENTROPY, [0.5] * 45)),
            joined(series(LIMIT, [0.2] * 5 + [0.32] * 40), series(ENTROPY, [0.5] * 5 + [1.5] * 40)),
            joined(
                series(LIMIT, [0.1] * 5 + [0.4] * 5 + [0.1] * 40), series(ENTROPY, [0.5] * 5 + [1.5] * 45)
            ),
            joined(series(LIMIT, [0.1] * 5 + [1.0] * 2), series(ENTROPY, [0.5] * 5 + [1.5] * 2)),
            joined(series(LIMIT, [0.1] * 19 + [0.8]), series(ENTROPY, [0.5] * 5 + [1.5] * 15)),
        ],
        "24% of the completions are cut at max_completion_length, after 10%",
    ),
    "entropy": (
        series(ENTROPY, [0.5] * 5 + [1.0, 1.5, 2.0, 2.5, 3.0, 3.5]),
        [series(ENTROPY, [0.5] * 5 + [1.7] * 20), series(ENTROPY, [0.01] * 5 + [0.4] * 20)],
        "rose from 0.50 to 2.00 nats per token",
    ),
    "reward": (
        series(REWARD, [0.0] * 5 + [0.36, 0.44] * 10 + [0.2] * 15),
        [
            series(REWARD, [0.0] * 5 + [0.2, 0.6] * 10 + [0.4] * 15),
            series(REWARD, [-9.0, -1.0] * 10 + [-8.0, -2.0] * 10),
            series(REWARD, [0.0] * 20 + [0.1] + [0.0] * 20),  # a single success
            series(REWARD, [0.0] * 5 + [0.2, 0.6] * 10 + [0.2] * 15),  # the fall is no larger than the noise
            series(REWARD, [0.5] * 40),
        ],
        "The training reward fell from 0.403 to 0.269",
    ),
    "agreement": (
        series(DIVERGENCE, [0.1, 0.05, 0.01] + [1e-4] * 6),
        [series(DIVERGENCE, [0.1] * 5 + [0.005] * 20), series(DIVERGENCE, [1e-4] * 4)],
        "differ by 0.0001 nats per token",
    ),
    "held_out": (
        evaluations([(0.2, 0.1), (0.4, 0.1), (0.3, 0.4), (0.05, 0.4), (0.05, 0.5), (0.0, 0.6)]),
        [
            evaluations([(0.1, 0.1), (0.5, 0.4), (0.5, 0.4), (0.45, 0.5), (0.42, 0.6), (0.5, 0.9)]),  # noise
            evaluations([(0.1, 0.1), (0.2, 0.1), (0.8, 0.1), (0.2, 0.2), (0.2, 0.2), (0.2, 0.2)]),  # one high
            evaluations([*[(0.5, 0.4)] * 3, (0.1, 0.5), (0.1, 0.5), (0.5, 0.5)]),  # a dip of two
            # One success before anything is learned, as in the records.
            evaluations(
                [(0.0, 0.0), (0.09, 0.0), (0.0, 0.0), (0.0, 0.0), (0.0, 0.01), (0.0, 0.01), (0.3, 0.02)]
            ),
            evaluations([*[(0.5, 0.4)] * 3, (0.3, 0.2), (0.1, 0.1), (0.1, 0.1)]),  # both fall
            evaluations([(-5, -6), (-1, -1), (-1, -1), (-1, -1), (-1.2, -0.9), (-1.1, -0.9), (-1.2, -0.9)]),
        ],
        "fell from 0.3 to 0, while the training reward went from 0.2 to 0.5",
    ),
    "answer_in_feedback": (
        series(ANSWERS, [0.5] * 5),
        [series(ANSWERS, [0.0, 1.0, 0.0, 0.0, 0.0] + [0.1] * 20)],
        "The feedback of 50% of the failed rows",
    ),
}


def messages(caplog: pytest.LogCaptureFixture, logs: Logs) -> list[str]:
    caplog.clear()
    watch = Diagnostics(SDPOConfig())
    with caplog.at_level(logging.WARNING, logger="sdpo_rl"):
        for entry in logs:
            watch.observe_logs(entry)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("name", COLLAPSES)
def test_a_collapse_is_warned_about_once(name: str, caplog: pytest.LogCaptureFixture) -> None:
    logs, _, part = COLLAPSES[name]
    (message,) = messages(caplog, logs + logs[-1:] * 10)
    assert part in message


@pytest.mark.parametrize("name", COLLAPSES)
def test_a_healthy_run_has_no_warning(name: str, caplog: pytest.LogCaptureFixture) -> None:
    for logs in COLLAPSES[name][1]:
        assert messages(caplog, logs) == []


@pytest.mark.parametrize(("name", "metric"), [("length_limit", LIMIT), ("entropy", ENTROPY)])
def test_the_start_is_that_of_the_run(name: str, metric: str, caplog: pytest.LogCaptureFixture) -> None:
    """The counter-example: compared with a fixed number, a task that begins there would be a collapse."""
    logs, _, _ = COLLAPSES[name]
    assert messages(caplog, [{**entry, metric: logs[-1][metric]} for entry in [*logs, *logs]]) == []


@pytest.mark.parametrize("rows", [8, 16, 64])
def test_noise_is_no_collapse(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand batches in which nothing changes; the counter-example counts every change as one."""

    def warned() -> int:
        found = 0
        for seed in range(40):
            rng, watch = random.Random(seed), Monitors()
            values = [
                (sum(rng.random() < 0.3 for _ in range(rows)) / rows, rng.gauss(0.5, 0.3))
                for _ in range(1000)
            ]
            entries = (
                {LIMIT: cut, ENTROPY: 1.0 + 0.01 * i, REWARD: mean} for i, (cut, mean) in enumerate(values)
            )
            found += any(message.keys() - {"entropy"} for message in map(watch.observe, entries))
        return found

    assert warned() <= 2
    monkeypatch.setattr(monitors, "CUT_STANDARD_ERRORS", 0.0)
    monkeypatch.setattr(monitors, "REWARD_STANDARD_ERRORS", 0.0)
    assert warned() > 30


def test_a_reward_of_first_successes_after_long_failure_is_no_collapse(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Eight rows without a success for a thousand batches, then half; the counter-example has their noise alone."""

    def warned() -> int:
        found = 0
        for seed in range(20):
            rng, watch = random.Random(seed), Monitors()
            rates = (0.0 if i < 1000 else min((i - 1000) / 400, 0.5) for i in range(1500))
            rewards = (fmean(float(rng.random() < rate) for _ in range(8)) for rate in rates)
            found += any(watch.observe({REWARD: mean}) for mean in rewards)
        return found

    assert warned() <= 1
    monkeypatch.setattr(monitors, "RECENT", 1e9)
    assert warned() > 15


@pytest.mark.parametrize(
    "rewards",
    [
        [0.30000002] * 20 + [0.3] * 20,  # float32 means of the same rewards
        [1e200, -1e200] * 20,  # squares above the largest float
        [-5.0] * 40,
        [math.nan, math.inf, -math.inf] * 20,
    ],
    ids=["rounding", "huge", "constant", "not finite"],
)
def test_odd_rewards_are_no_collapse(rewards: list[float], caplog: pytest.LogCaptureFixture) -> None:
    assert messages(caplog, series(REWARD, rewards)) == []


def test_completions_that_repeat_themselves_with_certainty_are_warned_about(
    caplog: pytest.LogCaptureFixture,
) -> None:
    certain = series(ENTROPY, [0.5] * 5 + [0.1] * 20)
    (message,) = messages(caplog, joined(series(LIMIT, [0.1] * 5 + [0.36] * 20), certain))
    assert "36% of the completions are cut" in message


@pytest.mark.parametrize("name", COLLAPSES)
@pytest.mark.parametrize("forgets", [False, True], ids=["ours", "counter-example"])
def test_a_resumed_run_continues_to_watch(name: str, forgets: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Interrupted after the half and, through JSON, after every entry; one that forgets may miss the collapse."""
    logs, _, part = COLLAPSES[name]
    watch = Diagnostics(SDPOConfig())
    seen = 0
    for entry in logs:
        state = json.loads(json.dumps(watch.state()))
        watch = Diagnostics(SDPOConfig())
        if not forgets:
            watch.load_state(state)
        watch.observe_logs(entry)
        seen += part in caplog.text
        assert caplog.text.count(part) == int(part in caplog.text)
    assert (seen > 0) == (not forgets)


def test_a_checkpoint_of_an_earlier_version_continues_with_the_start(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It has neither rewards nor noise, and five last values; the counter-example begins anew altogether."""
    before, after = series(LIMIT, [0.1] * 6), series(LIMIT, [0.6] * 20)
    watch = Diagnostics(SDPOConfig())
    for entry in joined(before, joined(series(ENTROPY, [0.5] * 6), series(REWARD, [0.3] * 6))):
        watch.observe_logs(entry)
    state = json.loads(json.dumps(watch.state()))
    for name in ("noise", "rewards"):
        del state["monitors"][name]
    del state["monitors"]["last"][REWARD]
    resumed = Diagnostics(SDPOConfig())
    resumed.load_state(state)
    assert [record.getMessage() for record in caplog.records if "earlier version" in record.getMessage()] == [
        "The checkpoint is of an earlier version. For the warnings of a collapse these values are collected "
        "anew from here on: last, noise, rewards. The values of the start of the run are kept."
    ]
    for entry in after:
        resumed.observe_logs(entry)
    assert "are cut at max_completion_length, after 10%" in caplog.text
    assert resumed.state().keys() == watch.state().keys()
    assert messages(caplog, after) == []


def test_a_checkpoint_of_this_version_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    watch = Diagnostics(SDPOConfig())
    watch.load_state(json.loads(json.dumps(Diagnostics(SDPOConfig()).state())))
    assert caplog.messages == []


def test_several_data_sets_are_not_mixed(caplog: pytest.LogCaptureFixture) -> None:
    """An easy and a hard one in turn; mixed, the hard one would look like a fall."""
    logs: Logs = []
    for step in range(6):
        logs += [
            {REWARD: 0.1 * step},
            {"eval_easy_loss": 0.1, "eval_reward": 0.9},
            {"eval_hard_loss": 0.1, "eval_reward": 0.1},
        ]
    assert messages(caplog, logs) == []
    fallen = [entry for entry in logs if "eval_hard_loss" not in entry]
    fallen = [
        {**entry, "eval_reward": 0.1} if index > len(fallen) // 2 and "eval_reward" in entry else entry
        for index, entry in enumerate(fallen)
    ]
    assert len(messages(caplog, fallen)) == 1


def test_metric_monitor_and_rule_of_the_probe_have_one_name() -> None:
    watch = Monitors()
    (name,) = [watch.observe(entry) for entry in series(ANSWERS, [0.5] * 5)][-1]
    rule = verdict.answer_in_feedback(Signal(share=1.0, without={}, answer_in_feedback=0.5))
    assert rule is not None
    assert f"self_distillation/{name}_fraction" == ANSWERS
    assert rule.rule == name


def test_entries_without_numbers_are_left_out() -> None:
    watch = Monitors()
    for entry in ({}, {REWARD: None}, {REWARD: float("nan")}, {"eval_reward": None}, {"train_runtime": 3.0}):
        assert watch.observe(entry) == {}
    assert watch.state()["trained"] == []


def recording(name: str) -> Logs:
    """The log of an arm of the embedded task, with its exact held-out accuracy as the held-out reward."""
    entries: Logs = json.loads((Path(__file__).parent / "recordings" / f"{name}.json").read_text())
    assert {REWARD, LIMIT, ENTROPY, DIVERGENCE, ANSWERS} <= {key for entry in entries for key in entry}
    assert len(entries) > 40
    return entries


def rise(values: list[float], window: int) -> list[float]:
    return [fmean(values[end - window : end]) - fmean(values[:5]) for end in range(window, len(values) + 1)]


@pytest.mark.parametrize("name", ["healthy", "cured"])
def test_a_recorded_run_that_learned_is_healthy(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """The demo's SDPO; its α=0, which collapses, with a half of GRPO's loss."""
    entries = recording(name)
    assert messages(caplog, entries) == []
    # As near to the limits as their comments say.
    assert 0.1 < max(rise([entry[ENTROPY] for entry in entries if ENTROPY in entry], 5)) < 0.3
    rewards = [entry[REWARD] for entry in entries if REWARD in entry]
    means = rise(rewards, monitors.LONG_WINDOW)
    fall = max(max(means[: end + 1]) - mean for end, mean in enumerate(means)) / (max(rewards) - min(rewards))
    assert fall < 0.18


def test_a_recorded_run_that_collapsed_is_warned_about_early() -> None:
    """The demo with α=0, whose completions all end."""
    entries = recording("collapsing")
    watch, said = Monitors(), dict[str, int]()
    for entry in entries:
        for name in watch.observe(entry):
            said.setdefault(name, int(entry["samples"]))
    accuracy = {int(entry["samples"]): entry["eval_reward"] for entry in entries if "eval_reward" in entry}
    best = max(accuracy.values())
    fallen = max(samples for samples, value in accuracy.items() if value >= best / 2)
    assert said.keys() == {"reward", "entropy"}
    fell = min(samples for samples in accuracy if samples > fallen)
    assert max(said.values()) + 500 <= fell
    page = " ".join((Path(__file__).parents[1] / "docs" / "choosing.md").read_text().split())
    assert (
        f"with a warning after {said['reward']} completions, then one of the entropy after {said['entropy']}; the "
        f"accuracy is below half of its best after {fell}"
    ) in page
    cut = [entry[LIMIT] for entry in entries if LIMIT in entry]
    assert max(rise(cut, monitors.LONG_WINDOW)) < 0.05
    assert 0.65 < max(rise([entry[ENTROPY] for entry in entries if ENTROPY in entry], 5)) < 0.75


def test_a_trainer_reads_what_it_logs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every completion is cut from the seventh batch on, after which there is a checkpoint."""
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 7, "max_steps": 15}

    def cut_later(trainer: Any) -> Any:
        log = trainer.log

        def changed(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            if "loss" in logs:
                trainer._metrics["train"][LIMIT] = [0.0 if trainer.state.global_step < 7 else 1.0]
            log(logs, *args, **kwargs)

        trainer.log = changed
        return trainer

    cut_later(tiny.trainer(tmp_path, **{**settings, "max_steps": 7})).train()
    assert "are cut at max_completion_length" not in caplog.text
    cut_later(tiny.trainer(tmp_path, **settings)).train(resume_from_checkpoint=True)
    assert caplog.text.count("are cut at max_completion_length, after 0%") == 1


# --- the answer in the feedback ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("feedback", "completion", "answers", "expected"),
    [
        ("expected 42", "41", ["42"], True),
        ("expected '42'.", "41", ["41.5", "42"], True),
        ("expected 420 or 142", "41", ["42"], False),
        ("expected kit.peak([3, 1])", "kit.max([3, 1])", [" kit.peak([3, 1])\n"], True),
        ("kit.peak(argument) returns the largest", "kit.max([3, 1])", ["kit.peak([3, 1])"], False),
        ("'6 * 7' is not a number", "6 * 7 = 42", ["6 * 7"], False),
        ("42 after 420", "7", ["42"], True),
        ("420 and then 42", "7", ["42"], True),
        ("wrong", "7", ["", "  "], False),
        ("wrong", "7", [], False),
    ],
)
def test_an_answer_is_found_as_whole_words(
    feedback: str, completion: str, answers: list[str], expected: bool
) -> None:
    assert answer_in_feedback(feedback, completion, answers) is expected


def feedback_by(tells: Callable[[list[str], int], str]) -> Any:
    """A reward by `tiny.score`; the feedback of a failure from the successes of its group and its row."""

    def reward(completions: list[Any], **_: Any) -> list[Any]:
        texts = [tiny.text_of(completion) for completion in completions]
        rows = []
        for row, text in enumerate(texts):
            start = row // tiny.GROUP * tiny.GROUP
            right = [other for other in texts[start : start + tiny.GROUP] if tiny.score(other)]
            rows.append((tiny.score(text), None if tiny.score(text) else tells(right, row)))
        return rows

    return reward


@pytest.mark.parametrize(
    ("tells", "expected"),
    [
        (lambda right, row: f"it is {right[0]}" if right else "no", 1.0),
        (lambda right, row: "try again", 0.0),
    ],
    ids=["the answer", "no answer"],
)
def test_a_trainer_measures_the_rows_whose_feedback_tells(
    tmp_path: Path, tells: Callable[[list[str], int], str], expected: float
) -> None:
    trainer = tiny.trainer(tmp_path, reward_funcs=feedback_by(tells), max_steps=3)
    trainer.train()
    logged = [entry[ANSWERS] for entry in trainer.state.log_history if ANSWERS in entry]
    assert logged == [expected] * len(logged)
    assert logged


# --- the teacher's pace -----------------------------------------------------------------------------------

OF_AN_UPDATE: dict[str, Any] = {"teacher_rate_samples": None}


@pytest.mark.parametrize(
    ("options", "samples", "part"),
    [
        (
            OF_AN_UPDATE,
            64,
            "teacher_update_rate=0.05 per 64 completions is 0.19 per 256, where the paper has 0.05",
        ),
        ({**OF_AN_UPDATE, "teacher_mode": "lora_ema"}, 8, "per 8 completions is 0.81 per 256"),
        (OF_AN_UPDATE, 64, "set teacher_rate_samples=256 with teacher_update_rate=0.05, or enlarge the gen"),
        ({"teacher_update_rate": 1.0}, 256, "teacher_update_rate=1 per 256 completions is 1 per 256"),
        ({"teacher_update_rate": 0.3}, 8, "; set teacher_update_rate=0.05."),  # a larger batch does not help
        (
            {"teacher_rate_samples": 64},
            1024,
            "; set teacher_rate_samples=None with teacher_update_rate=0.05.",
        ),
        ({"teacher_update_rate": 0.3, "teacher_rate_samples": 64}, 8, "0.3 per 64 completions"),
        (
            {},
            1024,
            "0.05 per 256 completions is 0.19 per update, of 1024 completions, where the paper has 0.05",
        ),
        ({}, 1024, "; set teacher_rate_samples=None with teacher_update_rate=0.05."),
        ({}, 768, None),
        ({**OF_AN_UPDATE, "teacher_update_rate": 0.3}, 1024, "collapses; set teacher_update_rate=0.05."),
        (OF_AN_UPDATE, 1024, None),
        (OF_AN_UPDATE, 256, None),
        (OF_AN_UPDATE, 128, None),
        ({}, 8, None),
        ({**OF_AN_UPDATE, "teacher_update_rate": 0.01}, 64, None),
        ({"teacher_update_rate": 0.0}, 8, None),
        ({"teacher_mode": "frozen"}, 8, None),
        ({"teacher_mode": "live"}, 8, None),
    ],
)
def test_a_fast_teacher_is_named_with_its_equivalent(
    options: dict[str, Any], samples: float, part: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_fast_teacher(SDPOConfig(**options), samples_per_tick=samples)
    assert len(caplog.messages) == (part is not None)
    assert part is None or part in caplog.text


@given(
    rate=st.sampled_from([0.01, 0.05, 0.2, 0.3, 1.0]),
    per=st.sampled_from([None, 1, 16, 64, 256, 4096]),
    samples=st.sampled_from([1, 64, 256, 896, 897, 1024, 8192]),
)
def test_the_advice_of_a_fast_teacher_silences_it(rate: float, per: int | None, samples: int) -> None:
    config = SDPOConfig(teacher_update_rate=rate, teacher_rate_samples=per)
    if (message := fast_teacher(config, samples_per_tick=samples)) is None:
        return
    advice = dict(re.findall(r"(teacher_\w+)=(\w+\.?\d*)", message.split("; set ")[1]))
    changes = {name: ast.literal_eval(value) for name, value in advice.items()}
    assert "teacher_update_rate" in changes
    assert fast_teacher(dataclasses.replace(config, **changes), samples_per_tick=samples) is None
    if "enlarge the generation batch" in message:
        assert fast_teacher(config, samples_per_tick=896) is None


def test_larger_batches_are_no_advice_for_updates_by_step() -> None:
    """The completions of an optimizer step do not grow with `steps_per_generation`."""
    batch, step = (
        fast_teacher(SDPOConfig(teacher_rate_samples=None, teacher_tick=tick), samples_per_tick=8)
        for tick in ("generation_batch", "optimizer_step")
    )
    assert batch is not None
    assert step is not None
    assert "enlarge the generation batch" in batch
    assert "enlarge the generation batch" not in step


@pytest.mark.parametrize(
    ("preset", "samples"), [("generalization", 256), ("rich_feedback", 256), ("test_time", 16)]
)
def test_no_published_setting_is_called_fast(
    preset: str, samples: int, caplog: pytest.LogCaptureFixture
) -> None:
    config = SDPOConfig.preset(preset)
    assert config.teacher_rate_samples == samples
    for one in (config, dataclasses.replace(config, teacher_rate_samples=None)):
        warn_of_fast_teacher(one, samples_per_tick=samples)
    assert caplog.messages == []


@pytest.mark.parametrize("metric", [None, "loss", "eval_reward"])
def test_the_best_checkpoint_is_that_of_the_highest_reward_or_has_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, metric: str | None
) -> None:
    """The reward rises from one evaluation to the next, whatever the loss does."""
    evaluations: list[float] = []

    def rising(completions: list[Any], **_: Any) -> list[float]:
        evaluations.append(len(evaluations) / 100)
        return [evaluations[-1] + 0.001 * (row % 2) for row in range(len(completions))]

    trainer = tiny.trainer(
        tmp_path, reward_funcs=rising, eval_dataset=tiny.conversations(2), max_steps=4,
        eval_strategy="steps", eval_steps=2, num_generations_eval=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, metric_for_best_model=metric,
    )  # fmt: skip
    said = any("load_best_model_at_end=True keeps" in message for message in caplog.messages)
    assert said == (metric != "eval_reward")
    trainer.train()
    if metric == "eval_reward":
        assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
        rewards = [entry["eval_reward"] for entry in trainer.state.log_history if "eval_reward" in entry]
        assert trainer.state.best_metric == max(rewards)


def test_without_rewards_the_lowest_loss_is_the_best(caplog: pytest.LogCaptureFixture) -> None:
    args = SimpleNamespace(load_best_model_at_end=True, metric_for_best_model="loss")
    warn_of_best_loss(args, has_rewards=False)
    assert caplog.messages == []


def test_evaluations_outside_of_training_are_not_compared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Three data sets that a user evaluates afterwards are harder than that of the run."""
    trainer = tiny.trainer(
        tmp_path,
        reward_funcs=lambda prompts, **_: [
            0.0 if "hard" in prompt[0]["content"] else 1.0 for prompt in prompts
        ],
        eval_dataset=tiny.conversations(2),
        eval_strategy="steps",
        eval_steps=1,
        num_generations_eval=2,
        max_steps=3,
    )
    trainer.train()
    hard = Dataset.from_dict({"prompt": [tiny.user("hard 1"), tiny.user("hard 2")]})
    for _ in range(3):
        trainer.evaluate(hard)
    assert "The held-out reward fell" not in caplog.text
    # The same evaluations during training have the warning.
    trainer.is_in_train = True
    for _ in range(3):
        trainer.evaluate(hard)
    assert "The held-out reward fell" in caplog.text


def test_a_negative_estimate_is_no_agreement() -> None:
    assert monitors.agreement(-0.5) is None
    assert monitors.agreement(-0.0001) is not None


def test_a_trainer_names_a_fast_teacher_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny.trainer(tmp_path, sdpo_config=tiny.config(teacher_update_rate=0.05), max_steps=1).train()
    lines = [message for message in caplog.messages if "per 8 completions" in message]
    assert len(lines) == 1


def test_every_monitor_is_tested() -> None:
    functions = {
        name
        for name, value in vars(monitors).items()
        if callable(value) and getattr(value, "__module__", "") == monitors.__name__ and name.islower()
    }
    assert {name for name in functions if not name.startswith("_")} == set(COLLAPSES)
