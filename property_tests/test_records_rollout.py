"""Figures of docs/vllm.md, README.md and DEBT.md against the records of examples/benchmarks/rollout.py."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from statistics import fmean
from typing import Any

import pytest
import torch
from programs import EXAMPLES
from test_records import DEBT, README, RECORDS, ROOT, record
from transformers import Qwen2Config, Qwen2ForCausalLM

PAGE = (ROOT / "docs" / "vllm.md").read_text()
RUNS = ("0.5b-lora", "7b-lora", "7b-lora-nosleep", "0.5b-full", "7b-full", "7b-full-nosleep")
LORA = [run for run in RUNS if "lora" in run]
STEPS = {run: "3" if run.endswith("nosleep") else "2" for run in RUNS}
ENGINES = {"generate": "`generate`", "vllm": "vLLM", "vllm-sleep": "vLLM, sleep mode"}
TRAINING = {"lora": "LoRA", "full": "all weights"}
SHARES = ("rollout", "teacher", "student", "optimizer", "rest")
GAP = "sampling/sampling_logp_difference/mean"
# Runs whose record has the share of weights that differ and of those that a step changed, and the engine.
COUNTED = {"7b-full": "vllm-sleep", "7b-full-nosleep": "vllm", "7b-lora-nosleep": "vllm"}


def results(run: str) -> dict[str, Any]:
    return dict(record(f"rollout-{run}-h200")["results"])


def gib(result: dict[str, Any], part: str) -> float:
    return float(result["in_use_bytes"][part]) / 2**30


def step_rows(name: str, known: dict[str, Any]) -> Iterator[str]:
    """One row for each engine: times of generation and step with their ratios to `generate`, and shares."""
    options, first = known["options"], known["summary"].get("generate")
    label = f"{options['shape'].upper()}, {TRAINING[options['training']]}, {options['rows']} rows"
    for engine, result in known["results"].items():
        summary, seconds = known["summary"][engine], result["parts"]["generation"]
        times = [f"{seconds:.2f} s", f"{summary['seconds']:.2f} s"]
        if first and engine != "generate":
            alone = known["results"]["generate"]["parts"]["generation"]
            times = [
                f"{times[0]} (1/{alone / seconds:.1f})",
                f"{times[1]} (1/{first['seconds'] / summary['seconds']:.1f})",
            ]
        shares = [f"{summary[share] * 100:.1f} %" for share in SHARES]
        cells = [f"[{label}](../examples/benchmarks/records/{name})", ENGINES[engine], *times, *shares]
        yield f"| {' | '.join(cells)} |"


def memory_rows(known: dict[str, Any]) -> Iterator[str]:
    """One row for each engine: the start, the card while it generates and while the student trains."""
    options = known["options"]
    for engine, result in known["results"].items():
        cells = [
            f"{options['shape'].upper()}, {TRAINING[options['training']]}",
            ENGINES[engine],
            f"{result['start_seconds']:.0f} s",
            f"{gib(result, 'generation'):.1f} GiB",
            f"{gib(result, 'student'):.1f} GiB",
        ]
        yield f"| {' | '.join(cells)} |"


def parameters(shape: dict[str, Any]) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Qwen2ForCausalLM(Qwen2Config(**shape)).parameters())


def short(number: float) -> str:
    mantissa, power = f"{number:.1e}".split("e")
    return f"{mantissa}e{int(power)}"


def with_vllm(run: str) -> dict[str, Any]:
    return {engine: result for engine, result in results(run).items() if engine != "generate"}


def of_time_and_memory() -> Iterator[str]:
    small = results("0.5b-lora")
    plain, asleep, without = (small[engine] for engine in ("vllm", "vllm-sleep", "generate"))
    more = gib(plain, "student") - gib(without, "student")
    yield f"takes {more:.1f} GiB more of the card than without vLLM"
    yield f"{gib(asleep, 'student'):.1f} GiB with it and {gib(without, 'student'):.1f} GiB without vLLM"
    asleep_7b, without_7b = (results("7b-lora")[engine] for engine in ("vllm-sleep", "generate"))
    awake_7b = results("7b-lora-nosleep")["vllm"]
    yield f"the 7B step with LoRA {gib(awake_7b, 'student') - gib(without_7b, 'student'):.1f} GiB more"
    awake, sleeping = (
        f"{record(f'rollout-{run}-h200')['summary'][engine]['seconds']:.2f} s"
        for run, engine in (("7b-lora-nosleep", "vllm"), ("7b-lora", "vllm-sleep"))
    )
    yield f"7B step with LoRA takes {awake} without sleep mode and {sleeping} with it"
    card = [f"{gib(result, 'student'):.1f} GiB" for result in (awake_7b, asleep_7b)]
    yield f"its student's step has {card[0]} of the card in use without and {card[1]} with it"
    yield from of_all_weights()
    (seconds,) = {
        f"{results(run)['vllm-sleep']['parts']['sleep']:.1f}" for run in ("0.5b-lora", "7b-lora", "7b-full")
    }
    yield f"Falling asleep and waking up take {seconds} s of a step"
    engines = [plain, asleep, results("0.5b-full")["vllm"]]
    spread = sorted(result["parts"]["generation"] for result in engines)
    yield f"by the same 0.5B engine took {spread[0]:.2f} s to {spread[-1]:.2f} s in the three runs"
    again = asleep["start_seconds"]
    starts = {result["start_seconds"] for run in RUNS for result in with_vllm(run).values()} - {again}
    yield f"takes {min(starts):.0f} to {max(starts):.0f} s, and {again:.0f} s for the second engine"


def of_all_weights() -> Iterator[str]:
    runs = {"7b-full-nosleep": "vllm", "7b-full": "vllm-sleep"}
    awake, asleep = (
        f"{record(f'rollout-{run}-h200')['summary'][engine]['seconds']:.2f} s" for run, engine in runs.items()
    )
    yield f"With all weights of 7B the step takes {awake} without sleep mode and {asleep} with it"
    card = [f"{gib(results(run)[engine], 'student'):.1f} GiB" for run, engine in runs.items()]
    yield f"with it; its student's step has {card[0]} of the card in use without and {card[1]} with it"
    allocated = max(results("7b-full-nosleep")["vllm"]["peak_bytes"].values()) / 2**30
    yield f"PyTorch had at most {allocated:.1f} GiB allocated"


def of_the_two_models() -> Iterator[str]:
    def gaps(*runs: str) -> str:
        (gap,) = {f"{fmean(result['logged'][GAP]):.2f}" for run in runs for result in with_vllm(run).values()}
        return gap

    first, second = (f"{value:.3f}" for value in results("0.5b-lora")["vllm"]["logged"][GAP])
    yield f"the gap grew from {first} to {second} between the two recorded steps of the 0.5B model with LoRA"
    (stayed,) = {
        f"{value:.2f}"
        for run in ("7b-lora", "7b-lora-nosleep")
        for result in with_vllm(run).values()
        for value in result["logged"][GAP]
    }
    yield f"that of the 7B model stayed at {stayed}"
    every = gaps("7b-lora", "7b-lora-nosleep", "7b-full", "7b-full-nosleep")
    yield f"{every} for the 7B model, with LoRA and with all weights"
    full = fmean(results("0.5b-full")["vllm"]["logged"][GAP])
    yield f"{full:.3f} for the 0.5B model with all weights in float32"
    yield from of_counted_weights()
    rounding = max(results("0.5b-full")["vllm"]["weight_differences"])
    yield f"{short(rounding)} of the largest weight of a matrix with weights in float32"
    merged = max(
        result["weight_differences"][1]
        for run in LORA
        if run not in COUNTED
        for result in with_vllm(run).values()
    )
    yield f"{short(merged)} after the first step"


def of_counted_weights() -> Iterator[str]:
    *full, lora = (results(run)[engine] for run, engine in COUNTED.items())
    (share,) = {f"{result['weights_changed'][0] * 100:.1f}" for result in full}
    yield f"the step changed {share} % of the engine's weights"
    (changed,), (_, unequal) = lora["weights_changed"], lora["weights_unequal"]
    yield f"changed {changed * 100:.1f} %, and after the second sync {unequal * 100:.2f} % differed"
    yield f"by at most {short(lora['weight_differences'][1])} of the largest weight of a matrix"


def of_the_readme() -> Iterator[str]:
    known, options = results("7b-lora"), record("rollout-7b-lora-h200")["options"]
    engines = ("vllm-sleep", "generate")
    times = [f"{known[engine]['parts']['generation']:.2f} s" for engine in engines]
    steps = [f"{record('rollout-7b-lora-h200')['summary'][engine]['seconds']:.2f} s" for engine in engines]
    yield (
        f"generates {options['rows']} completions of {options['completion']} tokens in "
        f"{' instead of '.join(times)}, and the step takes {' instead of '.join(steps)}"
    )


STATEMENTS = [
    *((PAGE, line) for part in (of_time_and_memory, of_the_two_models) for line in part()),
    *((README, line) for line in of_the_readme()),
    (DEBT, f"on one H200 it has {len(RUNS)} records"),
]


def check_tables(page: str) -> None:
    lines = [line for line in page.splitlines() if line.startswith("|")]
    known = {f"rollout-{run}-h200": record(f"rollout-{run}-h200") for run in RUNS}
    steps = [row for name, one in known.items() for row in step_rows(f"{name}.json", one)]
    memory = [row for one in known.values() for row in memory_rows(one)]
    assert [line for line in lines if "records/rollout-" in line] == steps
    assert [line for line in lines if line.startswith(("| 0.5B,", "| 7B,"))] == memory


def test_the_tables_are_those_of_the_records() -> None:
    check_tables(PAGE)
    for wrong in (
        PAGE.replace("13.96 s", "13.97 s"),
        PAGE.replace("59.4 GiB | 59.4 GiB", "59.4 GiB | 59.5 GiB"),
    ):
        with pytest.raises(AssertionError):
            check_tables(wrong)


def test_every_record_of_the_rollout_is_on_the_page() -> None:
    assert {path.name for path in RECORDS.glob("rollout-*")} == {f"rollout-{run}-h200.json" for run in RUNS}
    for run in RUNS:
        known = record(f"rollout-{run}-h200")["environment"]
        torch_version, trl_version = (known[name].rpartition(".")[0] for name in ("torch", "trl"))
        assert f"vLLM {known['vllm']} on one H200 (torch {torch_version}, TRL {trl_version})" in PAGE
        assert known["gpu"] == "NVIDIA H200"
        options = record(f"rollout-{run}-h200")["options"]
        assert (options["completion"], options["utilization"], options["steps"]) == ("256", "0.3", STEPS[run])
    assert "medians of two steps, of three for 7B without sleep mode, after one of warm-up" in " ".join(
        PAGE.split()
    )


@pytest.mark.parametrize(("page", "line"), STATEMENTS, ids=[line for _, line in STATEMENTS])
def test_a_figure_equals_its_record(page: str, line: str) -> None:
    text = " ".join(page.split())
    assert line in text
    digit = next(character for character in line if character.isdigit())
    assert line.replace(digit, str(int(digit) + 1)) not in text


def test_the_memory_that_the_engine_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES / "benchmarks"))
    shape = importlib.import_module("step").SHAPES["7b"]
    heads = shape["num_key_value_heads"] * shape["hidden_size"] // shape["num_attention_heads"]
    each = 2 * shape["num_hidden_layers"] * heads * 2
    options = record("rollout-7b-lora-h200")["options"]
    needed = int(options["rows"]) * (135 + int(options["completion"])) * each / 2**30
    text = " ".join(PAGE.split())
    assert f"vLLM's weights in bfloat16 ({parameters(shape) * 2 / 2**30:.1f} GiB for 7B)" in text
    assert f"{each / 1024:.0f} KiB for each token" in text
    assert f"{needed:.1f} GiB for the 16 rows" in text


@pytest.mark.parametrize("run", RUNS)
def test_the_summary_of_a_record_is_that_of_its_parts(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES / "benchmarks"))
    benchmark = importlib.import_module("rollout")
    stored = record(f"rollout-{run}-h200")["summary"]
    assert stored.keys() == results(run).keys()
    for engine, result in results(run).items():
        for parts in ("parts", "peak_bytes", "in_use_bytes"):
            assert result[parts].keys() <= set(benchmark.PARTS)
        assert benchmark.summary(result) == pytest.approx(stored[engine])


def test_what_the_page_lists_is_what_ran() -> None:
    assert [list(results(run)) for run in RUNS] == [
        ["generate", "vllm", "vllm-sleep"],
        ["generate", "vllm-sleep"],
        ["vllm"],
        ["vllm"],
        ["vllm-sleep"],
        ["vllm"],
    ]


@pytest.mark.parametrize("run", ["0.5b-lora", "7b-lora"])
def test_in_sleep_mode_the_students_step_has_the_memory_of_a_step_without_vllm(run: str) -> None:
    known = results(run)
    assert gib(known["vllm-sleep"], "student") == pytest.approx(gib(known["generate"], "student"), rel=0.01)


def test_differences_of_the_weights_are_those_of_rounding() -> None:
    for run in ("7b-full", "7b-full-nosleep"):
        for result in results(run).values():
            assert result["weight_differences"] == [0, 0]
    assert max(results("0.5b-full")["vllm"]["weight_differences"]) < 2**-8  # half of the last bit, at most
    for run in LORA:
        for result in with_vllm(run).values():
            before, after = result["weight_differences"]
            assert before == 0 < after < 2**-8


def test_the_weights_of_a_step_arrive() -> None:
    """A sync that did not arrive leaves as many unequal weights as the step changes."""
    for run in RUNS:
        for engine, result in with_vllm(run).items():
            assert ("weights_changed" in result) == (COUNTED.get(run) == engine)
    *full, lora = (results(run)[engine] for run, engine in COUNTED.items())
    for result in full:
        assert result["weights_unequal"] == [0, 0]
        assert result["weights_changed"][0] > 0
    before, after = lora["weights_unequal"]
    assert before == 0 < after < lora["weights_changed"][0] / 50
