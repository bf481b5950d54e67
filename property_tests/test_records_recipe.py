"""What the pages say of ragged rows of a 4-bit model of Unsloth, against their records."""

from __future__ import annotations

import argparse
import importlib
import re
import statistics
from typing import Any

import pytest
from programs import EXAMPLES
from test_records import DEBT, PERFORMANCE, README, ROOT, UNSLOTH, record

CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
KNOWN, WITHOUT = record("recipe-ragged-h200"), record("recipe-ragged-without-kernel-h200")
NAMES = {
    "idle machine": "recipe-ragged-8-rows-idle-h200",
    "idle machine again": "recipe-ragged-8-rows-idle-again-h200",
    "beside the 32 rows": "recipe-ragged-h200",
    "beside other programs": "recipe-ragged-8-rows-beside-h200",
    "idle machine once more": "recipe-ragged-8-rows-idle-third-h200",
    "compiled, beside tests": "recipe-ragged-8-rows-compiled-h200",
    "compiled, idle machine": "recipe-ragged-8-rows-compiled-again-h200",
    "compiled, idle machine again": "recipe-ragged-8-rows-compiled-third-h200",
    "compiled, idle machine once more": "recipe-ragged-8-rows-compiled-fourth-h200",
    "compiled, idle machine at last": "recipe-ragged-8-rows-compiled-fifth-h200",
}
IN_TURN = {
    "first": "recipe-ragged-8-rows-in-turn-h200",
    "second": "recipe-ragged-8-rows-in-turn-again-h200",
    "third": "recipe-ragged-8-rows-in-turn-third-h200",
}
# With Unsloth's function for projections that have a bias, too.
LATEST_NAMES = {
    "first": "recipe-ragged-8-rows-fused-projections-h200",
    "second": "recipe-ragged-8-rows-fused-projections-again-h200",
    "third": "recipe-ragged-8-rows-fused-projections-third-h200",
}
LATEST = {label: record(name) for label, name in LATEST_NAMES.items()}
EIGHT = {label: record(name) for label, name in NAMES.items()}  # launches of 8 rows
ALONE = [known for known in EIGHT.values() if known != KNOWN]  # of 8 rows and no others
IDLE = EIGHT["idle machine"]
LABEL_END = re.compile(" again$| once more$| at last$")
ROWS = (8, 32)
SHOWN = {8: IDLE, 32: KNOWN}  # the launches whose figures the pages have
LATER = slice(1, None)  # the first step includes one-time set-up


def cases(rows: int, known: Any = None) -> list[Any]:
    """With packing "padded" and "auto"."""
    return [
        (known or SHOWN[rows])["cases"][f"Unsloth 4-bit SDPO, {rows} ragged rows, {name}"]
        for name in ("padded", "auto")
    ]


def benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES / "benchmarks"))
    return importlib.import_module(name)


def ratio(what: str, rows: int, known: Any = None) -> str:
    return f"{(known or SHOWN[rows])['ratios'][f'{what} auto / padded, {rows} rows']:.2f}"


def median(case: Any) -> float:
    return statistics.median(case["step_seconds"][LATER])


def compiled_peaks() -> str:
    """What the page says of them; those of packed rows are the same in all launches."""
    peaks = {label: [case["peak_gib"] for case in cases(8, known)] for label, known in EIGHT.items()}
    ((packed,), plain, compiled) = (
        {packed for _, packed in peaks.values()},
        {padded for label, (padded, _) in peaks.items() if "compiled" not in label},
        {padded for label, (padded, _) in peaks.items() if "compiled" in label},
    )
    (before,), (after,) = plain, compiled
    return f"step then peaks at {after:.2f} GiB instead of {before:.2f}; the packed one stays at {packed:.2f} GiB"


def lines() -> list[tuple[str, str]]:
    few, many = ([ratio(what, rows) for what in ("step time", "peak")] for rows in ROWS)
    padded_step = f"take {many[0]} of the time of the padded step"
    many_rows = f"{padded_step} and {many[1]} of its peak, with the weights ([record]("
    plain, compiled = (
        sorted(
            ratio("step time", 8, known)
            for label, known in EIGHT.items()
            if ("compiled" in label) == is_compiled
        )
        for is_compiled in (False, True)
    )
    assert (len(plain), len(compiled)) == (5, 5)
    times, peaks = (
        sorted(ratio(what, 8, known) for known in LATEST.values()) for what in ("step time", "peak")
    )
    assert len(times) == 3
    few_rows = (
        f"8 rows {times[1]} and {peaks[1]} (medians of three compiled launches, {times[0]} to {times[-1]} of the "
        "time: ["
    )
    launches = f"{min(plain + compiled)} to {max(plain + compiled)}"
    assert [min(compiled), max(compiled)] == [min(plain + compiled), max(plain + compiled)]
    middle, middle_compiled = plain[2], compiled[2]
    padded, auto = (
        [f"{bound(case['step_seconds'][LATER]):.2f}" for bound in (min, max)] for case in cases(8)
    )
    return [
        (README, many_rows),
        (README, few_rows),
        (PERFORMANCE, many_rows),
        (PERFORMANCE, few_rows),
        (CHANGELOG, f"eight rows take {few[0]} of the time of the padded step"),
        (CHANGELOG, f"and 32 rows {many[0]}"),
        (
            DEBT,
            f"they took {launches}, by launch, at the median of five {middle_compiled} with layers that Unsloth "
            f"compiles, of five {middle} without",
        ),
        (DEBT, f"32 rows take {many[0]}"),
        (
            UNSLOTH,
            f'single steps took {auto[0]} to {auto[1]} s with `"auto"` '
            f'and {padded[0]} to {padded[1]} s with `"padded"`',
        ),
        (UNSLOTH, f"eight rows took {launches} of the time of the padded step"),
        (UNSLOTH, f"The median ratio is {middle} without compiling and {middle_compiled} with it"),
        (
            UNSLOTH,
            compiled_peaks(),
        ),
        (
            UNSLOTH,
            f"a step of eight rows took {ratio('step time', 8, WITHOUT)} of the time of the padded one",
        ),
    ]


@pytest.mark.parametrize(("page", "line"), lines(), ids=[line for _, line in lines()])
def test_a_figure_equals_its_record(page: str, line: str) -> None:
    text = " ".join(page.split())
    assert line in text
    digit = next(character for character in line if character in "123456789")
    assert line.replace(digit, str((int(digit) + 1) % 10)) not in text


def test_the_rows_of_the_page_are_those_on_record(monkeypatch: pytest.MonkeyPatch) -> None:
    step = benchmark("step", monkeypatch)
    expected = []
    for rows in ROWS:
        padded, auto = cases(rows)
        options = argparse.Namespace(lengths="lognormal", rows=auto["batch"], completion=auto["completion"])
        lengths = step.completion_lengths(options)
        mean = sum(lengths) / rows
        for case in (padded, auto):
            assert {log["completions/mean_length"] for log in case["logs"][:-1]} == {mean}
        fill = f"{mean / max(lengths):.0%}".replace("%", " %")
        seconds, peaks = (
            [f"{median(case):.2f} s" for case in (auto, padded)],
            (auto["peak_gib"], padded["peak_gib"]),
        )
        cells = [f"{rows}, {min(lengths)} to {max(lengths)}", fill, *seconds, ratio("step time", rows)]
        cells += ["{:.2f}, {:.2f}".format(*peaks), ratio("peak", rows)]
        expected.append(f"| {' | '.join(cells)} |")
    assert [line for line in UNSLOTH.splitlines() if line.startswith(("| 8, ", "| 32, "))] == expected


def test_every_launch_of_eight_rows_has_a_row() -> None:
    expected = []
    for label, known in EIGHT.items():
        padded, auto = (f"{median(case):.2f} s" for case in cases(8, known))
        link = f"[{LABEL_END.sub('', label)}](../examples/benchmarks/records/{NAMES[label]}.json)"
        expected.append(f"| {link} | {auto} | {padded} | {ratio('step time', 8, known)} |")
    rows = [
        line for line in UNSLOTH.splitlines() if "records/recipe-ragged-" in line and line.startswith("|")
    ]
    assert [row for row in rows if "-in-turn-" not in row and "-fused-" not in row] == expected


def test_every_launch_with_the_function_has_a_row() -> None:
    expected, ratios = [], []
    for label, known in LATEST.items():
        padded, auto = (f"{median(case):.2f} s" for case in cases(8, known))
        link = f"../examples/benchmarks/records/{LATEST_NAMES[label]}.json"
        ratios.append(ratio("step time", 8, known))
        expected.append(f"| [{label}]({link}) | {auto} | {padded} | {ratios[-1]} |")
    assert [row for row in UNSLOTH.splitlines() if "-fused-projections" in row] == expected
    found = "{}, {} and {}".format(*ratios)
    assert f"take {found} of the time of the padded step on an H200 in three compiled launches" in DEBT


def test_layouts_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unsloth's function saves time; losses of all layouts are the same to rounding."""
    recipe = benchmark("recipe", monkeypatch)
    saved, ratios = [], []
    for label, name in IN_TURN.items():
        known = record(name)
        name_of_case = recipe.ragged(8, "in turn")
        assert {case: values["arguments"] for case, values in known["cases"].items()} == {
            name_of_case: recipe.ALTERNATING[name_of_case]
        }
        assert recipe.ratios(known["cases"]) == pytest.approx(known["ratios"])
        case = known["cases"][name_of_case]
        turns = recipe.TURNS["in turn"]
        padded, auto, peft = recipe.median_of_turns(case["step_seconds"], turns).values()
        link = f"[{label}](../examples/benchmarks/records/{name}.json)"
        cells = [link, *(f"{seconds:.2f} s" for seconds in (auto, peft, padded))]
        assert (
            f"| {' | '.join([*cells, f'{auto / padded:.2f}', f'{auto / peft:.2f}'])} |"
            in UNSLOTH.splitlines()
        )
        saved.append(f"{1 - auto / peft:.0%}".rstrip("%"))
        ratios.append(f"{auto / padded:.2f}")
        losses = [log["loss"] for log in case["logs"][:-1]]
        assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-2)
    text = " ".join(UNSLOTH.split())
    assert "The function saves {}, {} and {} % of the packed step".format(*saved) in text
    assert "{}, {} and {} % of a step of 8 packed rows".format(*saved) in PERFORMANCE
    assert "{}, {} and {} in turn with padded steps".format(*ratios) in DEBT
    assert len(case["step_seconds"]) == len(turns) * (recipe.FIRST_ROUNDS + 15)
    assert "medians of 15 steps each" in text


def test_the_records_hold_the_cases_and_ratios_of_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = benchmark("recipe", monkeypatch)
    assert {name: case["arguments"] for name, case in KNOWN["cases"].items()} == recipe.RAGGED
    eight = {name: arguments for name, arguments in recipe.RAGGED.items() if " 8 ragged" in name}
    assert len(ALONE) == len(EIGHT) - 1
    for known in (WITHOUT, *ALONE, *LATEST.values()):
        assert {name: case["arguments"] for name, case in known["cases"].items()} == eight
    for known in (WITHOUT, *EIGHT.values(), *LATEST.values()):
        assert recipe.ratios(known["cases"]) == pytest.approx(known["ratios"])
    for rows in ROWS:
        assert [case["limit_gib"] for case in cases(rows)] == [0, 0]


def test_what_is_gained() -> None:
    """Less with fewer rows; no time without the kernel; the loss is the same to rounding."""
    eight = [(8, known) for known in (WITHOUT, *EIGHT.values(), *LATEST.values())]
    for rows, known in ((32, KNOWN), *eight):
        padded, auto = cases(rows, known)
        assert auto["peak_gib"] < padded["peak_gib"]
        assert (median(auto) < median(padded)) == (known is not WITHOUT)
        for ours, theirs in zip(auto["logs"][:-1], padded["logs"][:-1], strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3)
    few, many = (median(cases(rows)[1]) for rows in ROWS)
    assert many < 3 * few  # four times the rows: a part of the step is fixed
