"""The demo's probe: its table in the docs is that of the record, its verdicts agree with training, and it runs."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from programs import EXAMPLES, ROOT, run

from sdpo_rl.diagnose.probe import verdict as rules

sys.path.insert(0, str(EXAMPLES / "demo"))

HERE = EXAMPLES / "demo"
RECORD = json.loads((HERE / "probe_record.json").read_text())
DEMO = json.loads((HERE / "record.json").read_text())
PAGE = (ROOT / "docs" / "probe.md").read_text()


def program() -> Any:
    # Not imported by its name, which the program of the private API has too.
    spec = importlib.util.spec_from_file_location("demo_probe", HERE / "probe.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gains(setting: str, samples: int) -> list[float]:
    """Rise of the held-out probability by then, one per seed."""
    curves = [
        dict(zip(run["samples"], run["probability"], strict=True))
        for run in RECORD["runs"]
        if run["setting"] == setting
    ]
    assert len(curves) == 3
    return [curve[samples] - curve[0] for curve in curves]


def outlooks(setting: str) -> set[str]:
    return {run["probe"]["verdict"]["outlook"] for run in RECORD["runs"] if run["setting"] == setting}


def test_the_table_of_the_docs_is_that_of_the_record() -> None:
    table = program().table(RECORD)
    assert len(table) == 2 + len(RECORD["settings"])
    assert "\n".join(table) in PAGE
    assert "\n".join(table).replace("learns", "forgets") not in PAGE


def test_curves_of_the_demo_s_arms_are_the_demo_s() -> None:
    known = {(run["arm"], run["seed"]): run["probability"] for run in DEMO["runs"]}
    shared = [run for run in RECORD["runs"] if (run["setting"], run["seed"]) in known]
    assert len(shared) == 9
    assert all(run["probability"] == known[run["setting"], run["seed"]] for run in shared)


def test_every_setting_has_one_verdict_on_all_machines() -> None:
    assert {setting: outlooks(setting) for setting in RECORD["settings"]} == {
        "SDPO": {"learns"},
        "SDPO, peers only": {"does not learn"},
        "SDPO, shuffled feedback": {"does not learn"},
        "SDPO, blank feedback": {"does not learn"},
        "SDPO, no success, no feedback": {"does not learn"},
        "SDPO, α=0": {"learns"},
    }


def test_what_the_docs_say_of_training_holds() -> None:
    """The statements under the table."""
    sdpo = gains("SDPO", 1024)
    for setting in RECORD["settings"]:
        if outlooks(setting) == {"does not learn"}:
            pairs = zip(gains(setting, 1024), sdpo, strict=True)
            assert all(gain < right / 2 for gain, right in pairs), setting
    rates = [run["probe"]["success"] for run in RECORD["runs"] if run["setting"] == "SDPO"]
    assert fmean(rate["retry"] for rate in rates) > 3 * fmean(rate["same_prompts"] for rate in rates)
    shuffled = "SDPO, shuffled feedback"
    assert fmean(gains(shuffled, 1024)) > 0.05
    assert (
        sum(late < early for late, early in zip(gains(shuffled, 5120), gains(shuffled, 1024), strict=True))
        == 2
    )
    for setting in ("SDPO, peers only", "SDPO, blank feedback"):
        assert max(gains(setting, 1024)) < 0.06
        assert min(gains(setting, 5120)) > 0.3
    assert {gain for samples in (1024, 5120) for gain in gains("SDPO, no success, no feedback", samples)} == {
        0.0
    }
    assert min(gains("SDPO, α=0", 1536)) > 0.05
    assert max(gains("SDPO, α=0", 5120)) < 0.02
    remarks = [{r["rule"] for r in run["probe"]["verdict"]["remarks"]} for run in RECORD["runs"]]
    assert all("fast_teacher" in rules_found for rules_found in remarks)
    grpo = [run for run in DEMO["runs"] if run["arm"] == "GRPO"]
    after = fmean(dict(zip(run["samples"], run["probability"], strict=True))[1024] for run in grpo)
    assert f"whose probability is {after:.2f}".replace("0.", ".") in " ".join(PAGE.split())


def test_every_rule_and_its_weight_are_in_the_docs() -> None:
    known = {
        name
        for name, function in inspect.getmembers(rules, inspect.isfunction)
        if inspect.signature(function).return_annotation == "Remark | None"
    }
    assert set(re.findall(r"^\| `(\w+)` \| (?:stops|slows|delays|risk) \|", PAGE, re.M)) == known


def test_the_quick_run_probes_and_trains(tmp_path: Path) -> None:
    printed = run(tmp_path, str(HERE / "probe.py"), "--quick", "--output", "probe.json")
    record = json.loads((tmp_path / "probe.json").read_text())
    assert list(record["settings"]) == list(RECORD["settings"])
    assert printed.count("VERDICT: ") == len(record["settings"])
    by_setting = {one["setting"]: one for one in record["runs"]}
    assert by_setting["SDPO"]["probe"]["verdict"]["outlook"] == "learns"
    assert by_setting["SDPO, α=0"]["samples"] == [0, 256]
    # A probe draws from the seed of its trainer alone.
    (known,) = [one for one in RECORD["runs"] if (one["setting"], one["seed"]) == ("SDPO", 0)]
    assert by_setting["SDPO"]["probe"]["success"] == pytest.approx(known["probe"]["success"])
