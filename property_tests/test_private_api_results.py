"""Figures and tables of docs/results.md and docs/choosing.md, and the monitors on recorded runs."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from private_api_cases import fast_teacher
from programs import EXAMPLES, ROOT

sys.path.insert(0, str(EXAMPLES / "private_api"))

import arms
import curves
import drawing
import figures
import margins
import pages
import replay
import tables

from sdpo_rl.diagnose import monitors

LIMIT, ENTROPY = "completions/clipped_ratio", "self_distillation/student_entropy"
DIVERGENCE, REWARD = "self_distillation/divergence", "reward"
STEPS = 150
EMBEDDED = pages.place("embedded")  # of the same pages, from other records
EVERY = tables.load(figures.RECORDS)
SHOWN = [run for run in EVERY if run["task"] == "kit"]


# --- records that are made up ---------------------------------------------------------------------------------


def made_up(question: str, arm: arms.Arm, seed: int, accuracy: list[float], **changes: Any) -> curves.Run:
    """A record whose accuracy is evaluated at even distances."""
    every = 9600 // (len(accuracy) - 1) // arm.samples_per_step * arm.samples_per_step
    points = [[every * i, value / 2, value] for i, value in enumerate(accuracy)]
    return {
        "task": "kit",
        "question": question,
        "arm": arm.name,
        "method": arm.method,
        "seed": seed,
        "samples": 9600 * arm.length,
        "samples_per_step": arm.samples_per_step,
        "settings": arm.all_settings(),
        "command": "python examples/private_api/train.py",
        "model": "Model-1B",
        "weights_sha256": "ab" * 32,
        "device": "A GPU",
        "python": "3.12.1",
        "versions": {"torch": "2.0"},
        "accuracy": curves.JUDGED,
        "complete": True,
        "seconds": 90.0,
        "peak_gib": 12.0,
        "points": points,
        "log": log(),
        **changes,
    }


def log(rises: int | None = None) -> dict[str, list[float | None]]:
    """A log whose entropy and cut completions rise from a step on."""
    steps = list(range(1, STEPS + 1))
    late = [max(0, step - rises) / 10 if rises is not None else 0.0 for step in steps]
    return {
        "step": list(map(float, steps)),
        REWARD: [min(0.9, step / 100) for step in steps],
        LIMIT: [min(1.0, 0.1 + x) for x in late],
        ENTROPY: [0.5 + x for x in late],
        DIVERGENCE: [None if step % 7 == 0 else 0.1 for step in steps],
    }


HEALTHY = [0.0, 0.3, 0.6, 0.8, 0.9]
COLLAPSING = [0.0, 0.5, 0.8, 0.2, 0.0]


def write(folder: Path, runs: list[curves.Run]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for run in runs:
        name = re.sub(r"\W+", "-", f"{run['task']} {run['question']} {run['arm']} {run['seed']}")
        (folder / f"{name}.json").write_text(json.dumps(run))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A copy of the pages, without any record, also of the embedded task."""
    (tmp_path / "docs" / "images").mkdir(parents=True)
    for page in figures.PAGES:
        text = (ROOT / page).read_text()
        (tmp_path / page).write_text(EMBEDDED.sub(r"\1\3", text))
    (tmp_path / "docs" / "images" / "demo.svg").write_text("not ours")
    figures.write(tmp_path, tmp_path / "records")
    return tmp_path


def recorded(question: str, seeds: tuple[int, ...] = (0, 1, 2)) -> list[curves.Run]:
    """Runs of every arm of a question; the seeds differ by .1 at the end."""
    return [
        made_up(*arms.recorded_as(question, arm), seed, [*HEALTHY[:-1], 0.7 + seed % 100 / 10])
        for arm in arms.arms(question)
        for seed in seeds
    ]


# --- pages and figures ----------------------------------------------------------------------------------------


def test_pages_and_figures_are_what_the_records_say() -> None:
    assert figures.differences() == []


@pytest.mark.parametrize(
    ("question", "name"),
    [
        ("grpo learning rate", f"GRPO, lr {arms.GRPO_LEARNING_RATE:g}"),
        ("settings", arms.CHOSEN),
    ],
)
def test_the_chosen_settings_are_the_best_of_those_tried(question: str, name: str) -> None:
    if not (by_arm := tables.of_question(SHOWN, question)):
        pytest.skip("no run for choosing is recorded")
    assert set(by_arm) == {arm.name for arm in arms.arms(question)}
    ends = {arm: fmean(run["points"][-1][curves.ACCURACY] for run in runs) for arm, runs in by_arm.items()}
    assert ends[name] == max(ends.values())


def test_the_prose_of_the_results_has_no_number() -> None:
    prose = EMBEDDED.sub("", figures.PLACE.sub("", (ROOT / "docs" / "results.md").read_text()))
    assert re.findall(r"\b\d+", prose) == []  # names such as float32 have digits, too


def test_every_text_has_one_place() -> None:
    texts, _ = figures.blocks_and_images([])
    places = [
        match[2] for page in figures.PAGES for match in figures.PLACE.finditer((ROOT / page).read_text())
    ]
    assert sorted(places) == sorted(texts)
    with pytest.raises(ValueError, match=r"page: expected places of learns, .*, got 'other'"):
        pages.filled("<!-- generated: other -->\n<!-- end -->", texts, figures.PLACE)


def test_no_record_leaves_the_pages_empty(root: Path) -> None:
    page = (root / "docs" / "results.md").read_text()
    assert all(question.heading not in page for question in figures.QUESTIONS.values())
    assert figures.differences(root, root / "records") == []


@pytest.mark.parametrize("question", figures.QUESTIONS)
def test_a_question_with_records_has_a_section(question: str, root: Path) -> None:
    seeds = (100, 101) if question in arms.CHOOSING else (0, 1, 2)
    write(root / "records", recorded(question, seeds))
    figures.write(root, root / "records")
    assert figures.differences(root, root / "records") == []
    page = (root / "docs" / "results.md").read_text()
    shown = {name for name, (heading, _) in figures.QUESTIONS.items() if heading in page}
    assert question in shown
    section = (
        page.partition(f"## {figures.QUESTIONS[question].heading}")[2].split("```bash")[1].split("```")[0]
    )
    assert section.strip().endswith(f"--seeds {' '.join(map(str, seeds))}")
    for arm in arms.arms(question):
        row = next(line for line in page.splitlines() if line.startswith(f"| {arm.name} | {len(seeds)} |"))
        assert ("0.80 (0.70–0.90)" if len(seeds) == 3 else "0.75 (0.70–0.80)") in row
    svg = ElementTree.fromstring(
        (root / "docs/images" / f"private-api-{question.replace(' ', '-')}.svg").read_text()
    )
    polylines = svg.findall("{*}polyline")
    lines = 2 * (len(arms.arms(question)) - 1) if question == "cures" else len(arms.arms(question))
    assert len(polylines) == len(svg.findall("{*}polygon")) == lines
    values = [text.text for text in svg.findall("{*}text") if (text.get("class") or "").startswith("value")]
    assert len(values) == lines
    assert values.count("0.80" if len(seeds) == 3 else "0.75") == lines


def test_a_table_has_the_means_of_its_seeds(root: Path) -> None:
    sdpo, _, grpo = arms.arms("learns")[:3]
    runs = [
        made_up("learns", sdpo, 0, [0.0, 0.4, 0.8, 0.6, 0.9]),
        made_up("learns", sdpo, 1, [0.0, 0.2, 0.9, 0.8, 0.5]),
        made_up("learns", grpo, 0, [0.0, 0.0, 0.02, 0.0, 0.0]),
    ]
    row, other = tables.results(tables.of_question(runs, "learns")).splitlines()[2:]
    assert (
        row == "| SDPO | 2 | 0.30 | 0.85 | 0.70 (0.50–0.90) | 0.90 | 0.56 | 0.35 | 1 of 2, after 9472 | – |"
    )
    assert other == "| GRPO | 1 | 0.00 | 0.02 | 0.00 | 0.02 | – | 0.00 | – | – |"


def test_a_changed_or_missing_record_is_found(root: Path) -> None:
    runs = recorded("learns")
    write(root / "records", runs)
    figures.write(root, root / "records")
    changed = {**runs[0], "points": [*runs[0]["points"][:-1], [9600, 0.1, 0.123]]}
    write(root / "records", [changed])
    assert set(figures.differences(root, root / "records")) >= {
        "docs/results.md",
        "docs/images/private-api-learns.svg",
    }
    shutil.rmtree(root / "records")
    assert "docs/images/private-api-learns.svg" in figures.differences(root, root / "records")
    figures.write(root, root / "records")
    assert [path.name for path in (root / "docs" / "images").iterdir()] == ["demo.svg"]


def test_runs_for_choosing_and_runs_that_were_stopped_are_not_shown(root: Path) -> None:
    arm, *_ = arms.arms("learns")
    runs = recorded("learns") + [made_up("learns", arm, seed, [0.0, 0.0]) for seed in (100, 101)]
    stopped = made_up("learns", arm, 3, [0.0, 0.0], complete=False)
    write(root / "records", [*runs, stopped])
    loaded = tables.load(root / "records")
    assert [run["seed"] for run in tables.of_question(loaded, "learns")["SDPO"]] == [0, 1, 2]
    grpo = arms.arms("grpo learning rate")
    chosen = tables.of_question(
        [made_up("grpo learning rate", arm, seed, [0.0, 0.1]) for arm in grpo for seed in (0, 100)],
        "grpo learning rate",
    )
    # The arm that was chosen is that of "learns", too.
    assert {run["seed"] for runs in chosen.values() for run in runs} == {100}


def test_another_task_and_another_model_have_sections_of_their_own(root: Path) -> None:
    others = [
        {**run, **change}
        for run in recorded("learns", (0,))
        for change in ({"task": "house_style"}, {"model": "Other/M-2"})
    ]
    folder = root / "records"
    write(folder, recorded("learns"))
    for index, run in enumerate(others):
        (folder / f"other-{index}.json").write_text(json.dumps(run))
    figures.write(root, folder)
    page = (root / "docs" / "results.md").read_text()
    assert "## The task house_style with Model-1B" in page
    assert "--model Model-1B --task house_style --question learns --seeds 0\n" in page
    assert "## The task kit with Other/M-2" in page
    assert (root / "docs/images/private-api-kit-other-m-2-learns.svg").exists()
    assert page.count("| SDPO | 3 |") == 1


def test_the_other_page_has_rates_signs_and_warnings(root: Path) -> None:
    runs = recorded("rate")
    for run in runs:
        if run["settings"]["teacher_update_rate"] == 0.05:
            run["points"] = [
                [at, value, value] for (at, *_), value in zip(run["points"], COLLAPSING, strict=True)
            ]
            run["log"] = log(10)
            run["command"] += " --every-step"
    write(root / "records", runs)
    figures.write(root, root / "records")
    page = (root / "docs" / "choosing.md").read_text()
    assert (
        "| rate | α=0, batches of 64 | α=0.5, batches of 64 | α=0, batches of 256 | α=0.5, batches of 256 |"
        in page
    )
    assert "| 0.05 | *0.00 (0.00–0.00)* |" in page
    assert "| 0.01 | 0.80 (0.70–0.90) |" in page
    assert "|  | steps | learned (9 runs) | fell (3 runs) |" in page
    # Means of five steps: .1 at first; .7, .8, .9, 1 and 1 in the runs that fell.
    assert "| cut completions | 1–5 | 0.1 (0.1–0.1) | 0.1 (0.1–0.1) |" in page
    assert "|  | 16–20 | 0.1 (0.1–0.1) | 0.88 (0.88–0.88) |" in page
    said = "`length_limit` after 1024, `entropy` after 1728"
    assert f"| α=0, rate 0.05 per 64, seed 0 | after 7104 | after 7104 | {said} | – |" in page
    assert "| learned: no warning | 36 | 36 |" in page
    assert "| fell below 0.5 of its best: a warning early enough | 12 | 12 |" in page
    assert (
        "| limit | largest of 36 runs that learned | smallest of 12 runs that fell below 0.5 of their best |"
        in page
    )


@given(st.lists(st.integers(0, 96), min_size=1, max_size=30))
def test_a_fall_is_for_good(counts: list[int]) -> None:
    accuracy = [count / 96 for count in counts]
    below = [value < curves.FALLEN * max(accuracy[: i + 1]) for i, value in enumerate(accuracy)]
    starts = [i for i in range(len(below)) if all(below[i:])]
    expected = 64 * starts[0] if starts and max(accuracy) >= curves.LEARNED else None
    assert curves.fall({"points": [[64 * i, 0.0, value] for i, value in enumerate(accuracy)]}) == expected


def test_labels_do_not_overlap() -> None:
    ends = {"a": 50.0, "b": 52.0, "c": 200.0, "d": 201.0, "e": 202.0}
    places = drawing.label_places(ends, bottom=202.0)
    in_order = [places[name] for name in ends]
    assert all(below - above >= drawing.LABEL_HEIGHT for above, below in pairwise(in_order))
    assert max(in_order) <= 202.0
    assert places["a"] == 50.0


# --- the monitors on recordings -------------------------------------------------------------------------------


RECORDED = tables.every_step(SHOWN)


def test_recorded_runs_have_what_the_monitors_read() -> None:
    for run in RECORDED:
        steps = replay.entries(run)
        assert [entry["step"] for entry in steps] == list(range(1, len(steps) + 1))
        assert {REWARD, LIMIT, ENTROPY, DIVERGENCE} <= {name for entry in steps for name in entry}


def test_nearly_only_runs_with_a_fast_teacher_have_the_warning_of_cut_completions() -> None:
    said = {tables.run_name(run): set(replay.warnings(run, evaluations=True)) for run in RECORDED}
    assert len(said) == len(RECORDED)
    cut = [run for run in RECORDED if "length_limit" in said[tables.run_name(run)]]
    text = " ".join((ROOT / "docs" / "choosing.md").read_text().split())
    others = [run for run in cut if not fast_teacher(run)]
    assert (
        f"`length_limit`, comes in {len(cut)} runs, of which {len(cut) - len(others)} have the fast" in text
    )
    large = [run for run in cut if run["question"] == "large batches"]
    assert (len(large), {tables.outcome(run) for run in large}) == (9, {"learned nothing"})
    assert all(run["log"][LIMIT][-1] > 0.9 and curves.best(run) == 0 for run in large)
    small = [run for run in cut if fast_teacher(run) and run["samples_per_step"] == 64]
    counts = Counter((run["samples"], tables.outcome(run)) for run in small)
    counts |= Counter((f"others {run['samples']}", tables.outcome(run)) for run in others)
    counts |= Counter(("large", tables.outcome(run)) for run in large)
    rows = {
        "fast teacher, batches of 64, 9600 completions": 9600,
        "fast teacher, batches of 64, 48000 completions": 48000,
        "fast teacher, batches of 256": "large",
        "other teachers, 9600 completions": "others 9600",
        "other teachers, 48000 completions": "others 48000",
    }
    for row, group in rows.items():
        cells = [counts[group, outcome] or "–" for outcome in (*tables.OUTCOMES, None)]
        assert f"| {row} | {' | '.join(map(str, cells))} |" in text
    assert len([run for run in RECORDED if run["samples"] == 48000 and fast_teacher(run)]) == 27 + len(large)
    learned = [run for run in cut if tables.outcome(run) == "learned"]
    assert f"but {len(learned)} of the {len(cut)} runs that had it kept what they learned" in text
    style = [
        run for run in tables.every_step(EVERY) if run["task"] == "house_style" and run["method"] == "sdpo"
    ]
    assert len(style) == 6
    for run in style:
        success = next(
            (64 * step for step, reward in enumerate(run["log"][REWARD], 1) if reward > 0.05), math.inf
        )
        assert replay.warnings(run, evaluations=True)["length_limit"] < success
    silent = {
        "fast teacher + rate per 256 samples",
        "SDPO",
        *(f"α=0, rate {rate} per 64" for rate in (0, 0.0025, 0.01)),
        *(f"α=0.5, rate {rate} per 64" for rate in (0, 0.0025)),
        "α=0.1",
        "SRPO, 0.04 per update",
    }
    for run in RECORDED:
        slow_with_grpo = run["arm"].startswith("default rate + hybrid")
        if slow_with_grpo or (run["arm"] in silent and not run["question"].startswith("lasting")):
            assert not said[tables.run_name(run)]


def test_how_many_recorded_runs_have_the_warnings_that_they_should() -> None:
    kept, collapsed = tables.kept_and_collapsed(SHOWN)
    assert len(collapsed) == 15
    assert {tables.run_name(run): problem for run in collapsed if (problem := replay.problem(run))} == {
        "α=0.5, rate 0 per 64, seed 1": "no warning"
    }
    assert len(kept) == 116
    assert sum(replay.problem(run) is None for run in kept) == 80


@pytest.mark.parametrize("run", RECORDED, ids=tables.run_name)
def test_the_margins_are_those_of_the_monitors(run: curves.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two computations: a warning comes in time where, and only where, the number is beyond the limit.

    A falling reward must also exceed its noise, which the number leaves out.
    """
    said = replay.warnings(run, evaluations=True)
    in_time = {name for name, samples in said.items() if samples <= margins.last_early(run)}
    at_limit = [
        margins.largest_cut_rise(run, entropy_rose=True) >= monitors.CUT_RISE_WITH_ENTROPY,
        margins.largest_cut_rise(run, entropy_rose=False) >= monitors.CUT_RISE_ALONE,
    ]
    assert ("length_limit" in in_time) == any(at_limit)
    assert ("entropy" in in_time) == (margins.largest_entropy_ratio(run) >= monitors.ENTROPY_RATIO)
    monkeypatch.setattr(monitors, "REWARD_STANDARD_ERRORS", 0.0)
    monkeypatch.setattr(monitors, "HELD_OUT_STANDARD_ERRORS", 0.0)
    without_noise = replay.warnings(run, evaluations=True)
    falls = without_noise.get("reward", math.inf) <= margins.last_early(run)
    assert falls == (margins.largest_reward_fall(run) > monitors.REWARD_FALL)
    assert falls or "reward" not in in_time
    assert ("held_out" in without_noise) == (margins.largest_held_out_fall(run) > monitors.HELD_OUT_FALL)
    assert said.keys() <= without_noise.keys()


@pytest.mark.parametrize(
    ("accuracy", "rises", "expected"),
    [
        (HEALTHY, None, None),
        (HEALTHY, 10, "length_limit, entropy without a fall"),
        (COLLAPSING, 10, None),
        (COLLAPSING, None, "no warning"),
        (COLLAPSING, 105, "after 7104 samples, the fall after 7104"),
        (COLLAPSING, 98, "after 6656 samples, the fall after 7104"),
        (COLLAPSING, 97, None),
        ([0.0, 0.9, 0.3, 0.1, 0.0], None, "no warning"),
    ],
)
def test_a_monitor_that_is_late_or_false_is_found(
    accuracy: list[float], rises: int | None, expected: str | None
) -> None:
    run = made_up("rate", arms.arms("rate")[3], 0, accuracy, log=log(rises))
    assert replay.problem(run) == expected


def test_the_held_out_monitor_sees_the_evaluations() -> None:
    run = made_up("rate", arms.arms("rate")[3], 0, [0.0, 0.9, 0.9, 0.9, 0.1, 0.1, 0.0])
    assert replay.warnings(run, evaluations=True) == {"held_out": 9600}
    assert replay.warnings(run, evaluations=False) == {}


# --- the probe ------------------------------------------------------------------------------------------------


def test_verdicts_before_training_are_those_of_the_docs_and_agree_with_it() -> None:
    probes = json.loads((EXAMPLES / "private_api" / "probe_record.json").read_text())["probes"]
    page = (ROOT / "docs" / "probe.md").read_text()
    ends = {
        run["arm"]: run["points"][-1][curves.ACCURACY]
        for run in SHOWN
        if run["question"] == "learns" and run["seed"] == 0
    }
    for arm in ("SDPO", "SDPO, shuffled feedback", "SDPO, peers only"):
        found, end = probes[arm], ends[arm]
        retry = found["success"]["retry"]
        with_feedback = "–" if retry is None else f"{retry * 100:.0f} %"
        bare, signal = f"{found['success']['bare'] * 100:.0f} %", f"{found['signal']['share'] * 100:.0f} %"
        outlook = found["verdict"]["outlook"]
        assert f"| {arm} | {signal} | {bare} | {with_feedback} | {outlook} | {end:.2f} |" in page
        assert (outlook == "learns") == (end > 0.1)
    alphas = {name: found["verdict"]["outlook"] for name, found in probes.items() if name.startswith("α")}
    assert alphas == dict.fromkeys(("α=0", "α=0.1", "α=1"), "learns")


# --- records of runs that were interrupted ----------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 2])
def test_a_run_with_one_evaluation_has_a_figure(columns: int) -> None:
    """That before training, which an interrupted run has alone."""
    line = drawing.Band([0], [0.25], [0.25], [0.25])
    figure = ElementTree.fromstring(drawing.draw({"": {"SDPO": line}}, "accuracy", columns=columns))
    assert "0.25" in [text.strip() for text in figure.itertext()]


def test_seeds_without_an_evaluation_in_common_are_named() -> None:
    run = {"arm": "SDPO", "points": [[0, 0.1, 0.2]]}
    runs = [{**run, "seed": 0}, {**run, "seed": 1, "points": []}]
    with pytest.raises(ValueError, match="got none of SDPO, seed 0, SDPO, seed 1"):
        curves.band(runs, curves.ACCURACY)
    assert curves.band(runs[:1], curves.ACCURACY).mean == [0.2]
