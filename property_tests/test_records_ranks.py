"""docs/many-gpus.md has a row for every configuration on record on several GPUs, or says that there is none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_records import RECORDS, ROOT, bound

LABELS = {"ddp": "DDP", "fsdp2": "FSDP2", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
TRAINING = {"lora": "LoRA", "full": "all weights"}
COUNTS = ("1", "2", "4")
FULL = {"1": "same rows", "2": "rows each", "4": "rows each"}  # the runs with as many rows in each process
# What the pages say as long as nothing is on record.
WITHOUT = {
    "docs/many-gpus.md": "No run on several GPUs is on record.",
    "docs/trainer.md": "The four configurations were recorded on one GPU only",
    "DEBT.md": "no record of a run on several GPUs",
}


def rows(name: str, record: dict[str, Any]) -> Iterator[str]:
    """The rows of the page's table for one record, `–` for what it does not have."""
    options, compared = record["options"], record["compared"]
    for kind, launches in record["runs"].items():
        assert not any("failed" in run for runs in launches.values() for run in runs.values())
        if launches.keys() == {"1"}:
            continue  # a reference

        def worst(run: str, measure: str, kind: str = kind) -> str:
            found = [compared.get(f"{kind} on {count}, {run}") for count in COUNTS]
            values = [one[measure] for one in found if one]
            return (bound(max(values)) if max(values) else "0") if values else "–"

        def each(what: str, unit: int, digits: int, launches: dict[str, Any] = launches) -> str:
            runs = [launches.get(count, {}).get(FULL[count]) for count in COUNTS]
            return ", ".join("–" if run is None else f"{run[what] / unit:.{digits}f}" for run in runs)

        scaling = [compared.get(f"{kind} on {count}, rows each") for count in COUNTS[1:]]
        cells = [
            f"[{LABELS[kind]}, {options['shape'].upper()}, {TRAINING[options['training']]}]"
            f"(../examples/benchmarks/records/{name})",
            ", ".join("–" if one is None else f"{one['weak scaling']:.2f}" for one in scaling),
            each("peak_bytes", 2**30, 1),
            each("teacher_bytes", 2**20, 0),
            f"{worst('same rows', 'relative')} ({worst('same rows', 'absolute')})",
            worst("micro-batches", "relative"),
            f"{worst('float32', 'relative')} ({worst('float32', 'absolute')})",
            worst("resumed", "relative"),
        ]
        yield f"| {' | '.join(cells)} |"


def on_record(folder: Path) -> list[str]:
    files = sorted(folder.glob("ranks-*.json"))
    return [row for file in files for row in rows(file.name, json.loads(file.read_text()))]


@pytest.mark.parametrize("page", WITHOUT)
def test_a_page_says_that_nothing_is_on_record_as_long_as_it_is_true(page: str) -> None:
    text = " ".join((ROOT / page).read_text().split())
    assert (WITHOUT[page] in text) == (not on_record(RECORDS)), "\n".join(on_record(RECORDS))


def test_the_rows_of_the_page_are_those_on_record() -> None:
    lines = (ROOT / "docs" / "many-gpus.md").read_text().splitlines()
    assert [line for line in lines if "records/ranks-" in line and line.startswith("|")] == on_record(RECORDS)


def test_a_row_has_the_worst_differences(tmp_path: Path) -> None:
    def run(peak: float, teacher: float) -> dict[str, Any]:
        return {"peak_bytes": int(peak * 2**30), "teacher_bytes": int(teacher * 2**20)}

    record = {
        "options": {"shape": "1.5b", "training": "full"},
        "runs": {
            "fsdp2": {
                "4": {"same rows": run(1, 1), "rows each": run(10.25, 25)},
                "1": {"same rows": run(40, 100)},
            },
            "ddp": {"1": {"float32": run(1, 1)}},
        },
        "compared": {
            "fsdp2 on 4, same rows": {"relative": 1.2e-3, "absolute": 3e-8},
            "fsdp2 on 1, micro-batches": {"relative": 1.5e-3, "absolute": 1e-8},
            "fsdp2 on 4, rows each": {"weak scaling": 0.957},
            "fsdp2 on 4, float32": {"relative": 2e-7, "absolute": 1e-11},
            "fsdp2 on 1, float32": {"relative": 4e-7, "absolute": 1e-12},
            "fsdp2 on 4, resumed": {"relative": 0, "absolute": 0},
        },
    }
    (tmp_path / "ranks-x.json").write_text(json.dumps(record))
    assert on_record(tmp_path) == [
        "| [FSDP2, 1.5B, all weights](../examples/benchmarks/records/ranks-x.json) | –, 0.96 | 40.0, –, 10.2 "
        "| 100, –, 25 | 2e-3 (3e-8) | 2e-3 | 4e-7 (1e-11) | 0 |"
    ]
