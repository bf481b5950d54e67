"""What the pages say of ragged rows of a 4-bit model of Unsloth, against their record."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

import pytest
from programs import EXAMPLES
from test_records import DEBT, PERFORMANCE, README, UNSLOTH, record

KNOWN = record("recipe-ragged-h200")
PADDED, AUTO = (KNOWN["cases"][f"Unsloth 4-bit SDPO, 8 ragged rows, {name}"] for name in ("padded", "auto"))
LATER = slice(1, None)  # the first step includes one-time set-up


def benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES / "benchmarks"))
    return importlib.import_module(name)


def lines() -> list[tuple[str, str]]:
    time, peak = (f"{KNOWN['ratios'][f'{what} auto / padded']:.2f}" for what in ("step time", "peak"))
    auto, padded = (sorted(case["step_seconds"][LATER])[1] for case in (AUTO, PADDED))
    (each,) = {f"{seconds:.1f}" for seconds in (auto, padded)}
    shared = f"{time} of the time of the padded step and {peak} of its peak"
    found = (min(AUTO["step_seconds"][LATER]), max(AUTO["step_seconds"][LATER]))
    return [
        *((page, shared) for page in (README, PERFORMANCE, DEBT)),
        (UNSLOTH, f'{auto:.2f} s with `packing="auto"` and {padded:.2f} s with `"padded"` ({time})'),
        (UNSLOTH, f"single steps {found[0]:.2f} to {found[1]:.2f} s"),
        (UNSLOTH, f"{AUTO['peak_gib']:.2f} GiB instead of {PADDED['peak_gib']:.2f} ({peak})"),
        (DEBT, f"a step takes {each} s either way"),
    ]


@pytest.mark.parametrize(("page", "line"), lines(), ids=[line for _, line in lines()])
def test_a_figure_equals_its_record(page: str, line: str) -> None:
    text = " ".join(page.split())
    assert line in text
    digit = next(character for character in line if character in "123456789")
    assert line.replace(digit, str((int(digit) + 1) % 10)) not in text


def test_the_lengths_are_those_of_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    step = benchmark("step", monkeypatch)
    options = argparse.Namespace(lengths="lognormal", rows=AUTO["batch"], completion=AUTO["completion"])
    lengths = step.completion_lengths(options)
    mean = sum(lengths) / len(lengths)
    for case in (PADDED, AUTO):
        assert {log["completions/mean_length"] for log in case["logs"][:-1]} == {mean}
    fill = f"{mean / max(lengths):.0%}".replace("%", " %")
    expected = f"completions of {min(lengths)} to {max(lengths)} tokens, which fill {fill} of the padded ones"
    assert expected in " ".join(UNSLOTH.split())


def test_the_record_holds_the_cases_and_ratios_of_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = benchmark("recipe", monkeypatch)
    assert {name: case["arguments"] for name, case in KNOWN["cases"].items()} == recipe.RAGGED
    assert recipe.ratios(KNOWN["cases"]) == pytest.approx(KNOWN["ratios"])
    assert AUTO["limit_gib"] == PADDED["limit_gib"] == 0


def test_no_time_is_gained() -> None:
    """The times of single steps overlap, and the loss is the same to rounding."""
    auto, padded = (case["step_seconds"][LATER] for case in (AUTO, PADDED))
    assert min(auto) < min(padded) < max(padded) < max(auto)
    for ours, theirs in zip(AUTO["logs"][:-1], PADDED["logs"][:-1], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
