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
# Some turns had layers compiled by code that is not in the library.
COMPILED_IN_TURN = {
    "fourth": ("recipe-ragged-8-rows-some-compiled-h200", ("padded, PEFT", "padded", "auto", "compiled")),
    "fifth": ("recipe-ragged-8-rows-some-compiled-again-h200", ("padded, PEFT", "auto", "compiled")),
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
        "time by the speed of the host: ["
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
    others = ("-in-turn-", "-fused-", "-some-compiled-")
    assert [row for row in rows if not any(part in row for part in others)] == expected


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
        assert {case: values["arguments"] for case, values in known["cases"].items()} == recipe.ALTERNATING
        assert recipe.ratios(known["cases"]) == pytest.approx(known["ratios"])
        case = known["cases"][recipe.IN_TURN]
        padded, auto, peft = recipe.turns(case["step_seconds"]).values()
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
    assert "{}, {}, {}, {} and {} in turn with padded steps".format(*ratios, *later_ratios()) in DEBT
    assert len(case["step_seconds"]) == len(recipe.TURNS) * (recipe.FIRST_ROUNDS + 15)
    assert "medians of 15 steps each" in text


def turns_with_compiled(label: str) -> tuple[Any, dict[str, float]]:
    """A case with packed rows that are compiled in one of the turns, and the median time of each turn."""
    name, turns = COMPILED_IN_TURN[label]
    (case,) = record(name)["cases"].values()
    seconds = case["step_seconds"]
    assert len(seconds) == len(turns) * 18
    return case, {
        turn: statistics.median(seconds[3 * len(turns) :][place :: len(turns)])
        for place, turn in enumerate(turns)
    }


def later_ratios() -> list[str]:
    """Their times, packed and not compiled over padded."""
    found = (turns_with_compiled(label)[1] for label in COMPILED_IN_TURN)
    return [f"{seconds['auto'] / seconds['padded, PEFT']:.2f}" for seconds in found]


def test_packed_rows_that_are_compiled_save_little() -> None:
    saved = []
    for label, ratio_of_padded in zip(COMPILED_IN_TURN, later_ratios(), strict=True):
        case, seconds = turns_with_compiled(label)
        link = f"[{label}](../examples/benchmarks/records/{COMPILED_IN_TURN[label][0]}.json)"
        cells = [link, *(f"{seconds[turn]:.2f} s" for turn in ("auto", "compiled", "padded, PEFT"))]
        assert f"| {' | '.join([*cells, ratio_of_padded])} |" in UNSLOTH.splitlines()
        saved.append(f"{1 - seconds['compiled'] / seconds['auto']:.0%}".rstrip("%"))
        losses = [log["loss"] for log in case["logs"][:-1]]
        assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-2)
    assert saved == ["1", "1"]
    assert "it saved 1 % of the packed step" in " ".join(UNSLOTH.split())
    assert "compiling them saved 1 %" in DEBT


def test_the_ratio_follows_the_speed_of_the_host() -> None:
    """Generation runs no model where completions are given, so its time is the host's."""
    host = {}
    for name in IN_TURN.values():
        (case,) = record(name)["cases"].values()
        host[f"{record(name)['ratios']['step time auto / padded, 8 rows in turn']:.2f}"] = case
    host |= {
        ratio: turns_with_compiled(label)[0]
        for label, ratio in zip(COMPILED_IN_TURN, later_ratios(), strict=True)
    }
    seconds = {ratio: statistics.median(case["generation_seconds"][9:]) for ratio, case in host.items()}
    assert len(seconds) == 5
    slow = {ratio: time for ratio, time in seconds.items() if time > 0.08}
    fast = seconds.keys() - slow.keys()
    assert max(fast) < min(slow)
    times = sorted({f"{time:.2f}" for time in slow.values()})
    (fast_time,) = {f"{seconds[ratio]:.2f}" for ratio in fast}
    assert (
        f"it took {times[0]} to {times[-1]} s of a step where eight packed rows take {min(slow)} to {max(slow)} of "
        f"the time, and {fast_time} s where they take {min(fast)} and {max(fast)}"
    ) in " ".join(UNSLOTH.split())
    launches = [cases(8, known)[1] for known in LATEST.values()]  # of packed rows, each a process of its own
    by_host = sorted(launches, key=lambda case: statistics.median(case["generation_seconds"][LATER]))
    assert by_host == sorted(launches, key=median)


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
