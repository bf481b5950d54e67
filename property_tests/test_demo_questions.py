"""The questions on the embedded task: arms, records, and the tables, figures and findings of the documentation."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path
from statistics import fmean
from typing import Any
from xml.etree import ElementTree

import pytest
from programs import EXAMPLES, ROOT, run

sys.path.insert(0, str(EXAMPLES / "demo"))

import questions
import results
from questions import QUESTIONS, SAMPLES, demo

sys.path.append(str(EXAMPLES / "private_api"))

import curves
import figures
import findings
import pages
import tables

SHOWN = results.load(questions.RECORDS)
BY_QUESTION = {question: results.of_question(SHOWN, question) for question in QUESTIONS}


# --- arms and records -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_has_arms_of_different_names(question: str) -> None:
    names = [arm.name for arm in QUESTIONS[question].arms]
    assert len(set(names)) == len(names) > 1


def test_an_arm_is_recorded_as_the_first_with_the_same_settings_and_length() -> None:
    def name(question: str, arm: str) -> tuple[str, str]:
        found = next(other for other in QUESTIONS[question].arms if other.name == arm)
        recorded_question, recorded = questions.recorded_as(question, found)
        return recorded_question, recorded.name

    assert name("alpha", "α=0.5") == name("rate", "α=0.5, rate 0.05 per 64") == ("learns", "SDPO")
    assert name("cures", "collapsing") == name("rate", "α=0, rate 0.05 per 64") == ("alpha", "α=0")
    assert name("lasting", "SDPO") == ("lasting", "SDPO")
    assert name("learns", "supervised") == ("learns", "supervised")
    sdpo = QUESTIONS["learns"].arms[0]
    for change in ({"learning_rate": 1.0}, {"prompts": 3}, {"changes": {"alpha": 0.25}}, {"reward": print}):
        with pytest.raises(ValueError, match="arm: expected an arm of QUESTIONS, got 'SDPO'"):
            questions.recorded_as("learns", dataclasses.replace(sdpo, **change))


def test_different_runs_have_records_of_different_names() -> None:
    runs = [questions.recorded_as(question, arm) for question, (arms, _) in QUESTIONS.items() for arm in arms]
    different = {(question, arm.name) for question, arm in runs}
    paths = {questions.record_path(Path(), question, arm, 0) for question, arm in runs}
    assert len(paths) == len(different) < len(runs)
    seeds = {questions.record_path(Path(), *runs[0], seed) for seed in range(12)}
    assert len(seeds) == 12


def test_the_program_writes_a_record_of_each_run_and_repeats_none(tmp_path: Path) -> None:
    command = [str(EXAMPLES / "demo" / "questions.py"), "--question", "learns", "alpha", "--seeds", "0"]
    run(tmp_path, *command, "--samples", "128", "--output", "records")
    folder = tmp_path / "records"
    records = {path.name: json.loads(path.read_text()) for path in folder.iterdir()}
    # The demo's arms, of which α=.5 is one, have records already.
    assert sorted(records) == [
        "alpha-α=0-0.json",
        "alpha-α=0.1-0.json",
        "alpha-α=1-0.json",
        "learns-supervised-0.json",
    ]
    start = next(known for known in questions.demo_runs() if known["seed"] == 0)["points"][0]
    for record in records.values():
        assert record["complete"]
        assert record["samples"] == 128
        assert record["points"][0] == [
            0,
            pytest.approx(start[1], abs=1e-3),
            pytest.approx(start[2], abs=0.01),
        ]
        assert [point[0] for point in record["points"]] == [0, 64, 128]
        assert record["points"][-1][1] != record["points"][0][1]
    assert records["alpha-α=0-0.json"]["settings"] == {"alpha": 0.0, "k": 20, "teacher_update_rate": 0.05}
    assert records["learns-supervised-0.json"]["settings"] == {}
    assert questions.todo(["learns", "alpha"], [0], folder) == {}
    assert len(questions.todo(["alpha"], [0, 1], folder)) == 3


def test_a_larger_batch_takes_fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[Any, ...]] = []

    def learn(arm: demo.Arm, seed: int, steps: int, every: int) -> dict[str, Any]:
        called.append((arm.samples, seed, steps, every))
        return {"samples": [0], "probability": [0.5], "greedy": [0.5]}

    monkeypatch.setattr(demo, "learn", learn)
    small, large = QUESTIONS["rate"].arms[0], QUESTIONS["rate"].arms[-1]
    for question, arm in (("rate", small), ("rate", large), ("lasting", QUESTIONS["lasting"].arms[0])):
        questions.run_arm(question, arm, 7, SAMPLES)
    assert called == [(64, 7, 80, 8), (256, 7, 20, 2), (64, 7, 400, 40)]
    config = demo.grpo_config(large, 0, 1, "folder")
    assert (config.per_device_train_batch_size, config.num_generations) == (256, 4)


# --- the documentation ----------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A copy of the pages and the records."""
    (tmp_path / "docs" / "images").mkdir(parents=True)
    for page in results.PAGES:
        shutil.copy(ROOT / page, tmp_path / page)
    shutil.copytree(questions.RECORDS, tmp_path / "records")
    pages.write(results.files(tmp_path, tmp_path / "records"))
    return tmp_path


def test_pages_and_figures_are_what_the_records_say() -> None:
    assert pages.differences(ROOT, results.files()) == []


def test_a_changed_record_and_a_changed_page_are_found(root: Path) -> None:
    def different() -> list[str]:
        return pages.differences(root, results.files(root, root / "records"))

    assert different() == []
    page = root / "docs" / "results.md"
    page.write_text(page.read_text().replace("| supervised | 3 |", "| supervised | 4 |"))
    assert different() == ["docs/results.md"]
    (root / "docs" / "images" / "embedded-other.svg").write_text("of a question that is gone")
    assert set(different()) == {"docs/results.md", "docs/images/embedded-other.svg"}
    pages.write(results.files(root, root / "records"))
    assert different() == []
    record = root / "records" / "learns-supervised-0.json"
    known = json.loads(record.read_text())
    known["points"][-1][curves.ACCURACY] = 0.123
    record.write_text(json.dumps(known))
    assert set(different()) == {"docs/results.md", "docs/images/embedded-learns.svg"}


@pytest.mark.parametrize("question", QUESTIONS)
def test_every_arm_has_its_seeds_and_its_line(question: str) -> None:
    arms, length = QUESTIONS[question]
    by_arm = BY_QUESTION[question]
    assert list(by_arm) == [arm.name for arm in arms]
    for runs in by_arm.values():
        assert [run["seed"] for run in runs] == [0, 1, 2]
        assert {run["points"][-1][0] for run in runs} == {SAMPLES * length}
    svg = ElementTree.fromstring((ROOT / "docs" / "images" / results.image(question)).read_text())
    lines = 2 * (len(by_arm) - 1) if question == "cures" else len(by_arm)
    assert len(svg.findall("{*}polyline")) == lines


def test_every_text_has_one_place() -> None:
    places = [
        match[2] for page in results.PAGES for match in results.PLACE.finditer((ROOT / page).read_text())
    ]
    assert sorted(places) == sorted([*QUESTIONS, *results.SENTENCES, "setup"])


def test_seeds_for_choosing_are_not_shown() -> None:
    chosen = [{**run, "seed": 100 + run["seed"]} for run in SHOWN]
    assert results.of_question([*SHOWN, *chosen], "learns") == BY_QUESTION["learns"]


def ends(question: str, column: int = curves.ACCURACY) -> dict[str, list[float]]:
    """What each seed of each arm has at the end."""
    return {arm: [run["points"][-1][column] for run in runs] for arm, runs in BY_QUESTION[question].items()}


def means(question: str, column: int = curves.ACCURACY) -> dict[str, float]:
    return {arm: fmean(seeds) for arm, seeds in ends(question, column).items()}


def test_a_text_has_the_means_of_its_arms() -> None:
    known = findings.numbers(BY_QUESTION["alpha"], results.EARLY_SAMPLES)
    assert known["end"]["α=0"] == f"{means('alpha')['α=0']:.2f}"
    assert known["probability"]["α=0.1"] == f"{means('alpha', curves.PROBABILITY)['α=0.1']:.2f}"
    early = [{at: accuracy for at, _, accuracy in run["points"]}[1024] for run in BY_QUESTION["alpha"]["α=1"]]
    assert known["early"]["α=1"] == f"{fmean(early):.2f}"
    best = [max(point[curves.ACCURACY] for point in run["points"]) for run in BY_QUESTION["alpha"]["α=0"]]
    assert known["best"]["α=0"] == f"{fmean(best):.2f}"


def test_a_column_of_a_table_is_an_evaluation_of_every_run() -> None:
    for by_arm in BY_QUESTION.values():
        head = tables.results(by_arm).splitlines()[0]
        named = {int(samples) for samples in re.findall(r"after (\d+)", head)}
        assert len(named) == 2
        for points in (one["points"] for runs in by_arm.values() for one in runs):
            assert named <= {point[0] for point in points}


def test_what_the_page_says_of_the_controls_holds() -> None:
    mean = means("learns")
    assert mean["supervised"] - 0.02 < mean["SDPO"] <= mean["supervised"]
    assert mean["SDPO, peers only"] == pytest.approx(mean["GRPO"], abs=0.03)
    assert 0.3 < mean["GRPO"] < mean["SDPO"] - 0.3
    shuffled = BY_QUESTION["learns"]["SDPO, shuffled feedback"]
    assert sum(curves.fall(run) is not None for run in shuffled) == 2
    assert mean["SDPO, shuffled feedback"] < mean["SDPO"] - 0.3


def test_what_the_page_says_of_alpha_holds() -> None:
    mean, probability = means("alpha"), means("alpha", curves.PROBABILITY)
    assert mean["α=0"] < 0.5 < fmean(map(curves.best, BY_QUESTION["alpha"]["α=0"]))
    assert mean["α=0"] == min(mean.values())
    assert sum(curves.fall(run) is not None for run in BY_QUESTION["alpha"]["α=0"]) == 2
    assert probability["α=0"] < probability["α=0.1"] < min(probability["α=0.5"], probability["α=1"])
    early = {
        arm: float(value)
        for arm, value in findings.numbers(BY_QUESTION["alpha"], results.EARLY_SAMPLES)["early"].items()
    }
    assert early["α=0"] <= min(early.values())


def test_what_the_page_says_of_the_cures_holds() -> None:
    mean, probability = means("cures"), means("cures", curves.PROBABILITY)
    alone = "collapsing"
    cured = ("rate 0.01", "trust region", "α=0.5")
    assert all(min(ends("cures")[f"{alone} + {name}"]) > 0.9 for name in cured)
    assert mean[f"{alone} + batch-token-mean"] < 0.5
    less = [f"{alone} + {name}" for name in ("SRPO", "hybrid λ=0.5", "teacher restart", "anchor 0.1")]
    assert all(mean[alone] + 0.3 < mean[name] < mean[f"{alone} + rate 0.01"] for name in less)
    assert fmean(map(curves.best, BY_QUESTION["cures"][f"{alone} + lr 0.0003"])) < 0.75
    assert (
        max(value for name, value in probability.items() if name != f"{alone} + α=0.5")
        == (probability[f"{alone} + trust region"])
    )
    assert probability[f"{alone} + α=0.5"] > probability[f"{alone} + trust region"] + 0.2


def test_what_the_page_says_of_the_private_api_holds() -> None:
    runs = [run for run in tables.load(figures.RECORDS) if run["task"] == "kit" and run["seed"] < 100]
    mean = {
        arm: fmean(run["points"][-1][curves.ACCURACY] for run in group)
        for arm, group in curves.by_arm(runs).items()
    }
    assert mean["GRPO"] < 0.05 < 0.3 < means("learns")["GRPO"]


def test_what_the_page_says_of_the_rate_holds() -> None:
    mean, probability = means("rate"), means("rate", curves.PROBABILITY)
    same = [mean[f"α=0.5, rate {rate} per 64"] for rate in ("0", "0.0025", "0.01", "0.05")]
    assert max(same) - min(same) < 0.02
    assert mean["α=0.5, rate 1 per 64"] < 0.01
    assert mean["α=0, rate 0.05 per 64"] < 0.5 < 0.9 < mean["α=0, rate 0.01 per 64"]
    assert max(ends("rate")["α=0, rate 0 per 64"]) < min(
        ends("rate")["α=0, rate 0.01 per 64"]
    )  # docs/teacher.md
    slow, fast = "α=0, rate 0.05 per 256", "α=0, rate 0.185 per 256"
    assert all(curves.fall(run) is None for run in BY_QUESTION["rate"][slow])
    assert min(ends("rate")[slow]) > max(ends("rate")[fast]) + 0.2
    assert probability[slow] > 4 * probability[fast]


def test_what_the_page_says_of_k_and_of_long_runs_holds() -> None:
    seeds = ends("support")
    apart = max(max(of) - min(of) for of in seeds.values())
    assert max(map(fmean, seeds.values())) - min(map(fmean, seeds.values())) < apart < 0.06
    long = BY_QUESTION["lasting"]
    for sdpo in long["SDPO"]:
        best = curves.best(sdpo)
        assert best >= 0.99
        assert [at for at, _, accuracy in sdpo["points"] if accuracy > 0.9][-1] > 0.5 * 5 * SAMPLES
    assert sum(curves.fall(run, 0.5) is not None for run in long["SDPO"]) == 1
    assert fmean(map(curves.best, long["collapsing + SRPO"])) > 0.8
    # Later than without it: the same setting alone, whose runs are shorter, has fallen by their end.
    alone = [curves.fall(run) for run in BY_QUESTION["cures"]["collapsing"]]
    assert min(curves.fall(run) for run in long["collapsing + SRPO"]) > max(
        at for at in alone if at is not None
    )
    assert max(ends("lasting")["collapsing + SRPO"]) < 0.01
    for arm in ("SDPO", "SDPO, rate per 256 samples", "SDPO, frozen teacher"):
        assert min(ends("lasting")[arm]) < 0.9
    for arm in ("SDPO, hybrid λ=0.5", "SDPO, hybrid λ=0.5, rate per 256 samples"):
        assert min(ends("lasting")[arm]) > 0.9
        assert all(curves.fall(run) is None for run in long[arm])
    assert all(curves.fall(run) is None for run in long["SDPO, frozen teacher"])
    for arm in ("SDPO + long_run", "collapsing + long_run"):
        assert [round(end, 2) for end in ends("lasting")[arm]] == [1.0, 1.0, 1.0]
    # A learning rate that falls is not enough where α is 0, a growing share of GRPO not where α is 0.5.
    assert max(ends("lasting")["collapsing + long_run, no GRPO"]) < 0.9
    assert min(ends("lasting")["SDPO + long_run, no decay"]) < 0.9
    assert min(ends("lasting")["SDPO + long_run, λ=0.5"]) > 0.99
    assert 0.95 < min(ends("lasting")["collapsing + long_run, λ=0.5"]) < 0.97
    late = [
        accuracy
        for run in long["SDPO, hybrid λ=0.5, rate per 256 samples"]
        for at, _, accuracy in run["points"]
        if at >= SAMPLES
    ]
    assert min(late) >= 0.9
    assert min(ends("lasting")["GRPO"]) >= 0.99
    quarter = {
        arm: fmean(curves.at(run, SAMPLES, curves.ACCURACY) for run in runs) for arm, runs in long.items()
    }
    assert quarter["SDPO"] > quarter["GRPO"] + 0.3
