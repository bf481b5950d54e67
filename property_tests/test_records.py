"""Every figure of the README and the guides, from the benchmark record behind it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "examples" / "benchmarks" / "records"
README = (ROOT / "README.md").read_text()
UNSLOTH = (ROOT / "docs" / "unsloth.md").read_text()
LEVELS = ("flat", "ordinary", "peaked")


def record(name: str) -> Any:
    return json.loads((RECORDS / f"{name}.json").read_text())


def loss(shape: int) -> dict[str, dict[str, float]]:
    """Results by name, `over` the time of the products alone."""
    rows = {row["name"]: row for row in record("loss_h200")["shapes"][shape]["results"] if "ms" in row}
    return {name: row | {"over": row["ms"] / rows["floor"]["ms"]} for name, row in rows.items()}


def exponent(number: float) -> str:
    mantissa, power = f"{number:.0e}".split("e")
    return f"{mantissa}e{int(power)}"


def readme_loss() -> Iterator[str]:
    rows = loss(1)
    labels = {
        "**`sdpo.fused_topk_distillation_loss`**": "fused",
        "logsumexp, top-K, gather": "logsumexp, top-K, gather",
        "log-softmax, top-K": "log-softmax, top-K",
        "Liger's JSD (full vocabulary)": "Liger JSD",
        "TRL's chunked divergence (full vocabulary)": "TRL chunked divergence",
    }
    for label, name in labels.items():
        bold = "**" if name == "fused" else ""
        over, memory = f"{rows[name]['over']:.2f}", f"{rows[name]['beside_gradients_gib']:.1f} GiB"
        yield f"| {label} | {bold}{over}{bold} | {bold}{memory}{bold} |"
    wide, narrow = loss(2)["fused"], loss(3)["fused"]
    yield f"{wide['over']:.2f} and {wide['beside_gradients_gib']:.1f} GiB at 8192 × 3584 × 152064"
    yield f"{narrow['over']:.2f} and {narrow['beside_gradients_gib']:.1f} GiB at 4096 × 896 × 151936"


def readme_step() -> Iterator[str]:
    for name, label in {"7b": "Qwen2.5-7B", "0.5b": "Qwen2.5-0.5B"}.items():
        known = record(f"step-{name}-h200")
        ratios, rows = known["ratios"], known["options"]["rows"]
        yield (
            f"| {label}, {rows} | {ratios['time sdpo/trl-sdpo']:.2f} | {ratios['memory sdpo/trl-sdpo']:.2f} | "
            f"{ratios['time sdpo/grpo']:.2f} | {1 / ratios['time sdpo/sdpo-half']:.2f} of the time |"
        )


def readme_accuracy() -> Iterator[str]:
    known = record("loss_accuracy_h200")
    ours = [known[level]["errors"]["fused"] for level in LEVELS]
    peers = [
        known[level]["errors"][name]
        for level in LEVELS
        for name in ("logsumexp, top-K, gather", "log-softmax, top-K")
    ]

    def among(rows: list[dict[str, float]], key: str) -> tuple[str, str]:
        return exponent(min(row[key] for row in rows)), exponent(max(row[key] for row in rows))

    least, most = among(ours, "value_median")
    yield f"{least} to {most} (median), {among(ours, 'value_max')[1]} at worst"
    yield f"norm of the hidden gradient by {among(ours, 'gradient_norm')[1]}"
    least, most = among(peers, "value_median")
    norm = among(peers, "gradient_norm")[1]
    yield f"medians are {least} to {most} and the gradient's norm is off by up to {norm}"


def readme_recipe() -> Iterator[str]:
    cases = record("recipe-h200")["cases"]
    yield f"trains within {cases['Unsloth 4-bit SDPO']['peak_gib']:.2f} GiB"
    yield f"within {cases['Unsloth 4-bit SDPO, 2048 + 4096']['peak_gib']:.2f} GiB"
    yield f"Unsloth's GRPO takes {cases['Unsloth 4-bit GRPO']['peak_gib']:.2f} GiB"
    yield f"The teacher is {cases['Unsloth 4-bit SDPO']['teacher_mib']:.0f} MiB"


def guide() -> Iterator[str]:
    known = record("recipe-h200")
    cases = known["cases"]
    labels = {
        "Unsloth 4-bit, SDPO: the recipe": "Unsloth 4-bit SDPO",
        "the same, completions of 2048 tokens, reprompts of 4096": "Unsloth 4-bit SDPO, 2048 + 4096",
        "Unsloth 4-bit, GRPO": "Unsloth 4-bit GRPO",
        "Unsloth 4-bit, SDPO, four rows a micro-batch": "Unsloth 4-bit SDPO, 4 rows",
        "Unsloth 4-bit, GRPO, four rows": "Unsloth 4-bit GRPO, 4 rows",
        "Unsloth 4-bit, `sdpo-rl` 0.0.3, four rows": "sdpo-rl 0.0.3, Unsloth 4-bit, 4 rows",
        "Unsloth bf16, SDPO": "Unsloth bf16 SDPO",
        "TRL 4-bit, SDPO": "TRL 4-bit SDPO",
        "TRL 4-bit, GRPO": "TRL 4-bit GRPO",
        "TRL bf16, SDPO": "TRL bf16 SDPO",
        "TRL bf16, GRPO": "TRL bf16 GRPO",
    }
    assert set(labels.values()) == set(cases)
    for label, name in labels.items():
        case = cases[name]
        teacher = f"{case['teacher_mib']:.0f} MiB" if case["teacher_mib"] else "–"
        yield f"| {label} | {case['loaded_gib']:.2f} | {case['peak_gib']:.2f} | {teacher} |"

    def seconds(name: str, key: str) -> str:
        later = sorted(cases[name][key][1:])
        return f"{sum(later) / 2:.1f} s" if len(later) == 2 else f"{later[len(later) // 2]:.1f} s"

    sdpo, grpo = "Unsloth 4-bit SDPO", "Unsloth 4-bit GRPO"
    yield f"{seconds(sdpo, 'step_seconds')} with SDPO, {seconds(grpo, 'step_seconds')} with Unsloth's GRPO"
    generating = seconds(sdpo, "generation_seconds").removesuffix(" s")
    yield f"of which {generating} and {seconds(grpo, 'generation_seconds')} are generation"
    yield f"{seconds('TRL 4-bit SDPO', 'step_seconds')} with SDPO over plain TRL"
    fast, plain = cases[sdpo], cases["TRL 4-bit SDPO"]
    yield f"takes Unsloth {fast['load_seconds']:.1f} s and plain transformers {plain['load_seconds']:.1f} s"
    yield f"on top of {fast['import_seconds']:.0f} s and {plain['import_seconds']:.1f} s for the imports"


PAGES = [
    *(
        (README, line)
        for part in (readme_loss, readme_step, readme_accuracy, readme_recipe)
        for line in part()
    ),
    *((UNSLOTH, line) for line in guide()),
]


@pytest.mark.parametrize(("page", "line"), PAGES, ids=[line for _, line in PAGES])
def test_a_figure_is_the_record_s(page: str, line: str) -> None:
    assert " ".join(line.split()) in " ".join(page.split())


def test_another_figure_would_be_noticed() -> None:
    page, line = PAGES[0]
    assert line.replace("1.", "2.") not in page


def test_records_name_no_machine() -> None:
    for path in RECORDS.glob("*.json"):
        assert not re.search(r"[\"' =]/\w", path.read_text()), path
