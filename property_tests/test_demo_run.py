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


def test_the_plot_has_a_line_per_seed_and_one_per_mean_at_the_right_height() -> None:
    results = _results()
    svg = ElementTree.fromstring(report.plot(results))
    lines = svg.findall("{*}polyline")
    assert len(lines) == len(run.ARMS) * (2 + 1)
    thick = [line for line in lines if line.get("stroke-width") == "3"]
    heights = {line.get("stroke"): float(line.get("points", "").split(",")[-1]) for line in thick}
    for arm, color in report.COLORS.items():
        mean = sum(r["probability"][-1] for r in results["runs"] if r["arm"] == arm) / 2
        scale = report.HEIGHT - report.TOP - report.BOTTOM
        assert heights[color] == pytest.approx(report.HEIGHT - report.BOTTOM - mean * scale, abs=0.06)


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
