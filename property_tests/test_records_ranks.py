"""docs/many-gpus.md has a row for every configuration on record on several GPUs, and says what has not been run."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from programs import EXAMPLES
from test_records import RECORDS, ROOT, bound, record

sys.path.append(str(EXAMPLES / "benchmarks"))
from ranks import compare, difference, median_seconds

LABELS = {
    "ddp": "DDP",
    "fsdp2": "FSDP2",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
    "zero3-layers": "ZeRO-3, whole layers",
}
TRAINING = {"lora": "LoRA", "full": "all weights"}
SESSIONS = {  # the table has their lines in the order of the names
    "ranks-1.5b-full-no-gather-h200.json": "first",
    "ranks-1.5b-full-no-gather-again-h200.json": "second",
    "ranks-1.5b-full-no-gather-third-h200.json": "third",
    "ranks-1.5b-full-no-gather-fourth-h200.json": "fourth",
}
COUNTS = ("1", "2")
FULL = {"1": "same rows", "2": "rows each"}  # the runs with as many rows in each process
LAUNCH = 8  # the timed steps of a launch
FILES = sorted(RECORDS.glob("ranks-*.json"))


def weak_scaling(compared: dict[str, Any], kind: str, run: str = "rows each") -> float | None:
    found: float | None = compared.get(f"{kind} on 2, {run}", {}).get("weak scaling")
    return found


def scalings(compared: dict[str, Any], kind: str) -> str:
    """The weak scaling of this library's loss, and in brackets of TRL's own."""
    ours, theirs = (weak_scaling(compared, kind, run) for run in ("rows each", "grpo"))
    return (f"{ours:.2f}" if ours else "–") + (f" ({theirs:.2f})" if theirs else "")


def rows(name: str, record: dict[str, Any]) -> Iterator[str]:
    """The rows of the page's table for one record, `–` for what it does not have."""
    options, compared = record["options"], record["compared"]
    for kind, launches in record["runs"].items():
        assert launches.keys() <= set(COUNTS)
        assert not any("failed" in run for runs in launches.values() for run in runs.values())
        if FULL["2"] not in launches.get("2", {}):
            continue  # a reference, or runs of an option that is gone

        def worst(run: str, *measures: str, kind: str = kind) -> str:
            found = [
                compared[label] for count in COUNTS if (label := f"{kind} on {count}, {run}") in compared
            ]
            values = [max(one[measure] for one in found) for measure in measures] if found else []
            relative, *absolute = [bound(value) if value else "0" for value in values] or "–"
            return " ".join([relative, *(f"({value})" for value in absolute)])

        def each(what: str, unit: int, digits: int, launches: dict[str, Any] = launches) -> str:
            runs = [launches.get(count, {}).get(FULL[count]) for count in COUNTS]
            return ", ".join("–" if run is None else f"{run[what] / unit:.{digits}f}" for run in runs)

        label = LABELS[kind] + (", not gathered" if options.get("no_gather") else "")
        session = f", {SESSIONS[name]} session" if name in SESSIONS else ""
        cells = [
            f"[{label}, {options['shape'].upper()}, {TRAINING[options['training']]}{session}]"
            f"(../examples/benchmarks/records/{name})",
            options["rows"],
            each("peak_bytes", 2**30, 1),
            each("teacher_bytes", 2**20, 0),
            worst("same rows", "relative", "absolute"),
            worst("micro-batches", "relative"),
            worst("float32", "relative", "absolute"),
            worst("resumed", "relative"),
            scalings(compared, kind),
        ]
        yield f"| {' | '.join(cells)} |"


def sentences() -> Iterator[str]:
    """What docs/many-gpus.md says of the records besides the table."""
    lora, full = record("ranks-7b-lora-h200"), record("ranks-1.5b-full-h200")
    resumed = [
        bound(known["compared"][f"{kind} on {count}, resumed"]["relative"])
        for count in ("2", "1")
        for kind, known in (("ddp", lora), ("fsdp2", full))
    ]
    yield "losses differ by at most {} (DDP) and {} (FSDP2) on two, and by {} and {} on one".format(*resumed)
    one, two = lora["runs"]["ddp"]["1"]["same rows"]["steps"], lora["runs"]["ddp"]["2"]["rows each"]["steps"]
    each = [statistics.median(one[part]) / statistics.median(two[part]) for part in (slice(8), slice(8, 16))]
    yield "the two of DDP gave a weak scaling of {:.2f} and {:.2f}".format(*each)
    runs = full["runs"]
    # The last launch of ZeRO-3 and those with whole layers are of one session.
    parts, whole = (
        [launches(run["steps"]) for run in three_runs(runs[kind])] for kind in ("zero3", "zero3-layers")
    )
    ratios = [after / of_parts[-1] for of_parts, afters in zip(parts, whole, strict=True) for after in afters]
    yield f"a step took {min(ratios):.2f} to {max(ratios):.2f} of the time]"
    last = [seconds[-1] for seconds in parts[1:]]
    assert last == [min(seconds) for seconds in parts[1:]]
    assert last[1] < last[0]  # 64 rows and 32
    yield "ZeRO-3's fastest launches on two, {:.2f} and {:.2f} s".format(*last)
    for kind, label in (("fsdp2", "FSDP2"), ("zero3", "ZeRO-3"), ("zero3-layers", "ZeRO-3, whole layers")):
        medians = [f"{median_seconds(run):.2f}" for run in three_runs(runs[kind])]
        ranges = []
        for run in three_runs(runs[kind])[1:]:
            single = [f"{seconds:.2f}" for seconds in sorted(launches(run["steps"]))]
            ranges.append(", ".join(single) if len(single) < 3 else f"{single[0]} to {single[-1]}")
        yield f"| {label} | {' | '.join([*medians, *ranges])} |"
    other_host = median_seconds(
        record("ranks-1.5b-full-more-rows-h200")["runs"]["zero3-layers"]["2"]["same rows"]
    )
    here = median_seconds(runs["zero3-layers"]["2"]["rows each"])
    yield (
        f"with whole layers, 32 rows on each of two GPUs took {other_host:.2f} s in the session that also ran 64 "
        f"on each, and {here:.2f} s here"
    )
    scaled = [
        [
            launches(runs["zero3"]["1"][alone]["steps"])[i] / launches(runs["zero3"]["2"][both]["steps"])[i]
            for alone, both in (("same rows", "rows each"), ("grpo", "grpo"))
        ]
        for i in (-1, -2)
    ]
    yield (
        "the last two launches of ZeRO-3 without whole layers {:.2f} ({:.2f} with TRL's loss) and "
        "{:.2f} ({:.2f})".format(*scaled[1], *scaled[0])
    )
    largest = {
        dtype: max(
            difference(runs["zero3"][count][name], runs["zero3-layers"][count][name])["relative"]
            for count in COUNTS
            for name in names
            if name in runs["zero3"][count]
        )
        for dtype, names in (("bf16", ("same rows", "rows each")), ("float32", ("float32",)))
    }
    split = compare(runs)["zero3-layers on 1, micro-batches"]["relative"]
    assert split / 2 < largest["bf16"] < 2 * split
    yield (
        f"by up to {bound(largest['bf16'])} of their value in bf16, about as much as where rows are split, and by "
        f"{bound(largest['float32'])} in float32"
    )
    fsdp2, zero2 = (runs[kind]["1"]["same rows"]["losses"].values() for kind in ("fsdp2", "zero2"))
    first, *ratios = (ours / theirs for ours, theirs in zip(fsdp2, zero2, strict=True))
    assert first == 1
    assert min(ratios) > 2
    yield f"up to {max(ratios):.1f} times"


NOT_GATHERED = [record(name.removesuffix(".json")) for name in SESSIONS]
TIMED_IN_TURN = 15  # the steps of a launch with a separate trace, and as many without
LARGER = record("ranks-3b-full-no-gather-h200")


def listed(values: list[float]) -> str:
    *first, last = (f"{value:.2f}" for value in values)
    return f"{', '.join(first)} and {last}"


def test_weak_scaling_without_gathering() -> None:
    """That of 3B is above 0.93; that of 1.5B is near it, as with TRL's loss."""
    text, debt = page("docs/many-gpus.md"), page("DEBT.md")
    ours, trl = (
        [weak_scaling(known["compared"], "zero3-layers", run) or 0.0 for known in NOT_GATHERED]
        for run in ("rows each", "grpo")
    )
    middle, middle_trl = map(statistics.median, (ours, trl))
    larger = weak_scaling(LARGER["compared"], "zero3-layers") or 0.0
    assert larger > 0.93
    assert (
        f"Without TRL's gathering ZeRO-3's weak scaling was {larger:.2f} with a 3B shape. With 1.5B it was "
        f"{listed(ours)} in four sessions, at the median {middle:.2f}; with TRL's own loss {listed(trl)}, at the "
        f"median {middle_trl:.2f}."
    ) in text
    assert (
        f"without TRL's gathering for a generation {middle:.2f} and {middle_trl:.2f}, the medians of four "
        f"sessions, and {larger:.2f} with a 3B shape"
    ) in debt


def in_turn(run: dict[str, Any]) -> list[float]:
    """The time of a step with a separate trace over that without, of each launch."""
    both = run["steps"], run["one_trace_steps"]
    parts = [slice(first, first + TIMED_IN_TURN) for first in range(0, len(both[0]), TIMED_IN_TURN)]
    own, one = ([statistics.median(steps[part]) for part in parts] for steps in both)
    return [with_trace / without for with_trace, without in zip(own, one, strict=True)]


def test_a_separate_trace_for_the_teacher_saved_nothing() -> None:
    """Why it was removed; without NVLink launches differ by more than they save."""
    text = page("docs/many-gpus.md")
    small, large, slow = (
        in_turn(known["runs"]["zero3-layers"]["2"]["in turn"])
        for known in (NOT_GATHERED[-1], LARGER, record("ranks-1.5b-full-no-p2p-h200"))
    )
    assert min(small + large) > 1
    assert max(slow) > 1
    assert (
        f"took {small[0]:.2f} and {small[1]:.2f} times as long in two launches of 1.5B, and {large[0]:.2f} times "
        "in one of 3B"
    ) in text
    assert f"[{slow[0]:.2f} and {slow[1]:.2f}](" in text
    single = launches(NOT_GATHERED[-1]["runs"]["zero3-layers"]["2"]["rows each"]["steps"])
    assert len(single) == 3
    assert f"three of the fourth took {min(single):.2f} to {max(single):.2f} s with 32 rows" in text
    peaks = [
        known["runs"]["zero3-layers"]["2"][run]["peak_bytes"] / 2**30
        for known in NOT_GATHERED[:3]
        for run in ("rows each", "one trace")
    ]
    with_trace, without = {f"{peak:.1f}" for peak in peaks[::2]}, {f"{peak:.1f}" for peak in peaks[1::2]}
    assert [len(with_trace), len(without)] == [1, 1]
    assert f"the peak with it was {with_trace.pop()} GiB, without it {without.pop()}" in text


def three_runs(runs: dict[str, Any]) -> list[Any]:
    """Of 32 rows on one GPU and on two, and of 64 rows on two."""
    names = (("1", "same rows"), ("2", "same rows"), ("2", "rows each"))
    return [runs[count][run] for count, run in names]


def launches(steps: list[float]) -> list[float]:
    """The median time of a step of each launch."""
    return [statistics.median(steps[first : first + LAUNCH]) for first in range(0, len(steps), LAUNCH)]


def on_record(folder: Path) -> list[str]:
    files = sorted(folder.glob("ranks-*.json"))
    return [row for file in files for row in rows(file.name, json.loads(file.read_text()))]


def page(name: str) -> str:
    """A page in one line."""
    return " ".join((ROOT / name).read_text().split())


def test_the_pages_say_what_has_not_been_run() -> None:
    launched = {
        (kind, count)
        for file in FILES
        for kind, launches in json.loads(file.read_text())["runs"].items()
        for count in launches
    }
    assert launched == {(kind, count) for kind in LABELS for count in COUNTS}
    assert "Not run yet: any of them on four GPUs." in page("docs/many-gpus.md")
    assert "records of all four configurations on two GPUs" in page("docs/trainer.md")
    assert "of runs on several GPUs there are records on two, none on four" in page("DEBT.md")


def test_what_is_said_of_the_times() -> None:
    """Eight steps of every launch; what splits rows changes losses as little; only ZeRO-3 scales badly."""
    scaling: dict[str, float] = {}
    for kind in LABELS:
        name = "ranks-7b-lora-h200" if kind == "ddp" else "ranks-1.5b-full-h200"
        known = record(name)
        runs, compared = known["runs"][kind], known["compared"]
        lengths = [len(runs[count][FULL[count]]["steps"]) for count in COUNTS]
        assert lengths == {"zero2": [8, 16], "zero3": [24, 32]}.get(kind, [16, 16])
        split = compared[f"{kind} on 1, micro-batches"]["relative"]
        assert compared[f"{kind} on 2, same rows"]["relative"] < (1.5 if kind == "ddp" else 1) * split
        # The losses themselves: 1e-4 in bf16 and 1e-6 in float32.
        assert compared[f"{kind} on 2, same rows"]["absolute"] < 1e-4
        assert compared[f"{kind} on 2, float32"]["absolute"] < 1e-6
        assert compared[f"{kind} on 2, resumed"]["relative"] < 1e-4
        scaling[kind] = weak_scaling(compared, kind) or 0.0
        assert (scaling[kind] > 0.93) == (not kind.startswith("zero3"))
    debt = page("DEBT.md")
    (ours, trl), (more, more_trl) = (
        [weak_scaling(record(name)["compared"], "zero3-layers", run) for run in ("rows each", "grpo")]
        for name in ("ranks-1.5b-full-h200", "ranks-1.5b-full-more-rows-h200")
    )
    assert (
        f"ZeRO-3's weak scaling with whole layers is {ours:.2f} there, and {trl:.2f} with TRL's own loss, with 64 "
        f"rows on each GPU {more:.2f} and {more_trl:.2f}"
    ) in debt
    assert f"FSDP2, with the same shards, has {scaling['fsdp2']:.2f}" in debt


def test_the_sentences_of_the_page_have_the_numbers_on_record() -> None:
    text = page("docs/many-gpus.md")
    for sentence in sentences():
        assert sentence in text


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_record_has_the_comparisons_of_its_runs(file: Path) -> None:
    known = json.loads(file.read_text())
    assert known["compared"] == compare(known["runs"])


def test_the_rows_of_the_page_are_those_on_record() -> None:
    lines = (ROOT / "docs" / "many-gpus.md").read_text().splitlines()
    assert [line for line in lines if "records/ranks-" in line and line.startswith("|")] == on_record(RECORDS)


def test_a_row_has_the_worst_differences(tmp_path: Path) -> None:
    def run(peak: float, teacher: float) -> dict[str, Any]:
        return {"peak_bytes": int(peak * 2**30), "teacher_bytes": int(teacher * 2**20)}

    known = {
        "options": {"shape": "1.5b", "training": "full", "rows": "8"},
        "runs": {
            "fsdp2": {
                "2": {"same rows": run(1, 1), "rows each": run(10.25, 50)},
                "1": {"same rows": run(40, 100)},
            },
            "zero2": {"2": {"rows each": run(30, 100)}},
            "zero3": {"2": {"rows each": run(30, 100)}},
            "ddp": {"1": {"float32": run(1, 1)}},
        },
        "compared": {
            "fsdp2 on 2, same rows": {"relative": 1.2e-3, "absolute": 3e-8},
            "fsdp2 on 1, micro-batches": {"relative": 1.5e-3, "absolute": 1e-8},
            "fsdp2 on 2, rows each": {"weak scaling": 0.957},
            "zero3 on 2, rows each": {"weak scaling": 0.757},
            "zero3 on 2, grpo": {"weak scaling": 0.803},
            "fsdp2 on 2, float32": {"relative": 2e-7, "absolute": 1e-11},
            "fsdp2 on 1, float32": {"relative": 4e-7, "absolute": 1e-12},
            "fsdp2 on 2, resumed": {"relative": 0, "absolute": 0},
        },
    }
    (tmp_path / "ranks-x.json").write_text(json.dumps(known))
    assert on_record(tmp_path) == [
        "| [FSDP2, 1.5B, all weights](../examples/benchmarks/records/ranks-x.json) | 8 | 40.0, 10.2 | 100, 50 "
        "| 2e-3 (3e-8) | 2e-3 | 4e-7 (1e-11) | 0 | 0.96 |",
        "| [ZeRO-2, 1.5B, all weights](../examples/benchmarks/records/ranks-x.json) | 8 | –, 30.0 | –, 100 "
        "| – | – | – | – | – |",
        "| [ZeRO-3, 1.5B, all weights](../examples/benchmarks/records/ranks-x.json) | 8 | –, 30.0 | –, 100 "
        "| – | – | – | – | 0.76 (0.80) |",
    ]
