"""The demo's program: its plot, its report, and a quick run of every arm."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from demo_cases import CHANGED
from programs import EXAMPLES, ROOT

sys.path.insert(0, str(EXAMPLES / "demo"))

import machine
import report
import run


def _results(seed_count: int = 2) -> dict:
    curve = [0.1, 0.4, 0.5, 0.9]
    task = machine.Task("C", "314")
    example = {
        "question": task.prompt,
        "answer": task.answer(CHANGED),
        "completion": task.answer(machine.HABIT),
        "probability": 0.25,
    }
    runs = [
        {
            "arm": arm.name,
            "seed": seed,
            "seconds": 1.0,
            "samples": [0, 512, 1024, 2048],
            "probability": [value / (1 + seed + index) for value in curve],
            "examples": [example | {"completion": "<b>&"}],
        }
        for index, arm in enumerate(run.ARMS)
        for seed in range(seed_count)
    ]
    return {
        "quick": False,
        "prompts_per_step": 16,
        "completions_per_prompt": 4,
        "arms": {arm.name: {"learning_rate": arm.learning_rate} for arm in run.ARMS},
        "machines": [{"seed": seed, **machine.changed_machine(seed)} for seed in range(seed_count)],
        "before": [example],
        "versions": {"torch": "0"},
        "python": "3",
        "runs": runs,
    }


def test_the_plot_has_a_mean_and_a_band_of_each_arm_at_the_right_height() -> None:
    results = _results()
    svg = ElementTree.fromstring(report.plot(results))
    lines, bands = svg.findall("{*}polyline"), svg.findall("{*}polygon")
    ticks = {text.text: float(text.get("y", "")) for text in svg.findall("{*}text[@text-anchor='end']")}
    for arm, line, band in zip(run.ARMS, lines, bands, strict=True):
        seeds = [r["probability"][-1] for r in results["runs"] if r["arm"] == arm.name]

        def height(value: float) -> float:
            return pytest.approx(ticks["0"] + value * (ticks["1"] - ticks["0"]), abs=0.06)

        assert float(line.get("points", "").split(",")[-1]) == height(sum(seeds) / 2)
        points = [float(point.split(",")[1]) for point in band.get("points", "").split()]
        assert points[3:5] == [height(max(seeds)), height(min(seeds))]


def test_the_page_is_self_contained_and_escapes_what_the_model_wrote(tmp_path: Path) -> None:
    page = report.write_report(_results(), tmp_path).read_text()
    outside = [link for link in re.findall(r"(?:src|href)=|https?://[^\"]*", page) if "w3.org" not in link]
    assert not outside
    assert "<script" not in page
    assert "&lt;b&gt;&amp;" in page
    assert "<b>&" not in page
    assert len(report.summary(_results()).split("\n")) == 5


def _quick_run(folder: Path) -> dict:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "adapters")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "examples/demo/run.py", "--quick", "--output", str(folder)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip().split("\n")[-1] == str(folder / "report.html")
    return json.loads((folder / "results.json").read_text())


def test_the_quick_run_writes_its_report_and_learns_in_every_arm(tmp_path: Path) -> None:
    results = _quick_run(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"results.json", "report.html", "curves.svg"}
    assert [r["arm"] for r in results["runs"]] == [arm.name for arm in run.ARMS]
    starts = {r["probability"][0] for r in results["runs"]}
    assert len(starts) == 1  # the same checkpoint on the same machine
    assert all(r["samples"] == [0, 128, 256] and r["probability"][-1] not in starts for r in results["runs"])


@pytest.mark.slow
def test_a_seed_gives_the_same_numbers(tmp_path: Path) -> None:
    first, second = (_quick_run(tmp_path / name) for name in ("first", "second"))
    for a, b in zip(first["runs"], second["runs"], strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
