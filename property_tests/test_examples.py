"""Every program under examples/ runs on a CPU, on a small problem, and prints its results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from programs import EXAMPLES, run

# Tested in test_demo_*.py, test_private_api*.py and test_ranks_launch.py.
ELSEWHERE = {"accelerate", "demo", "private_api"}
HERE = {
    *(path.name for path in EXAMPLES.glob("0*.py")),  # test_numbered_examples.py
    *("tiny_model.py", "unsloth_7b_24gb.py"),
    *(f"benchmarks/{name}.py" for name in ("loss", "loss_accuracy", "ranks", "recipe", "step")),
}
# The benchmark has one shape for CPUs, which takes half a minute.
SMALL_LOSS = """
import loss_peers
loss_peers.SHAPES["cpu"] = [loss_peers.Shape(64, 32, 4096, trainable_head) for trainable_head in (False, True)]
import loss
raise SystemExit(loss.main())
"""


def example(folder: Path, name: str, *arguments: str) -> str:
    return run(folder, str(EXAMPLES / name), *arguments)


def test_every_program_is_tested() -> None:
    programs = {
        path.relative_to(EXAMPLES).as_posix()
        for path in EXAMPLES.rglob("*.py")
        if '__name__ == "__main__"' in path.read_text()
    }
    assert {name for name in programs if name.split("/")[0] not in ELSEWHERE} == HERE


def test_the_recipe_runs_without_unsloth(tmp_path: Path) -> None:
    printed = example(
        tmp_path,
        "unsloth_7b_24gb.py",
        *("--no-unsloth", "--base", "bf16", "--random-weights", "weights", "--shape", "tiny"),
        *("--completion", "16", "--steps", "2", "--output", "record.json"),
    )
    assert "training peak" in printed
    record = json.loads((tmp_path / "record.json").read_text())
    assert len(record["step_seconds"]) == 2
    assert record["teacher_mib"] > 0
    assert not record["unsloth"]


def test_the_recipe_case_by_case(tmp_path: Path) -> None:
    printed = example(
        tmp_path,
        "benchmarks/recipe.py",
        *("--weights", "weights", "--shape", "tiny", "--scratch", "scratch", "--cases", "TRL bf16 SDPO"),
        *("--output", "record.json", "--", "--completion", "16"),
    )
    assert "| TRL bf16 SDPO | 0.00 |" in printed
    (case,) = json.loads((tmp_path / "record.json").read_text())["cases"].values()
    assert "failed" not in case


def test_a_step_of_all_trainers(tmp_path: Path) -> None:
    printed = example(
        tmp_path,
        "benchmarks/step.py",
        *("--shape", "tiny", "--rows", "2", "--completion", "8", "--steps", "1", "--warmup", "1"),
        *("--repeat", "2", "--output", "record.json"),
    )
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["results"].keys() == {
        "grpo",
        *(f"sdpo{arm}" for arm in ("", "-plain", "-half", "-hybrid")),
        "trl-sdpo",
    }
    assert all(f"\n{name}" in printed and row["seconds"] > 0 for name, row in record["results"].items())
    assert all(len(row["steps"]) == 2 for row in record["results"].values())
    assert "time sdpo/trl-sdpo" in printed
    assert record["ratios"].keys() >= {"time sdpo/grpo", "time sdpo-plain/grpo", "time sdpo-plain/trl-sdpo"}


def test_a_step_of_several_layouts(tmp_path: Path) -> None:
    printed = example(
        tmp_path,
        "benchmarks/step.py",
        *("--shape", "tiny", "--rows", "4", "--completion", "500", "--steps", "1", "--warmup", "0"),
        *("--lengths", "lognormal", "--prompt-tokens", "9", "--group", "4", "--packing", "padded", "packed"),
        *("--prompts", "once", "each", "--arms", "grpo", "sdpo", "--output", "record.json"),
    )
    record = json.loads((tmp_path / "record.json").read_text())
    ours = ["sdpo[padded]", "sdpo[packed]", "sdpo[packed,each]"]
    assert record["results"].keys() == {"grpo", *ours}
    pairs = [(name, other) for i, name in enumerate(ours) for other in ("grpo", *ours[:i])]
    assert record["ratios"].keys() == {f"time {name}/{other}" for name, other in pairs}
    assert record["batch"]["tokens"] - record["batch"]["tokens_prompts_once"] == 3 * 9
    assert 4 * 10 <= record["batch"]["tokens"] < 4 * 509
    assert record["batch"]["fill"] == pytest.approx(record["batch"]["tokens"] / (4 * (9 + 342)))
    assert f"fill {record['batch']['fill']:.0%} of the padded batch" in printed


@pytest.mark.slow
def test_several_processes_beside_one(tmp_path: Path) -> None:
    printed = example(
        tmp_path,
        "benchmarks/ranks.py",
        *("--rows", "4", "--completion", "8", "--steps", "4", "--float32", "tiny", "--output", "record.json"),
    )
    record = json.loads((tmp_path / "record.json").read_text())
    launches = record["runs"]["ddp"]
    assert {
        count: {name: run.get("rows") for name, run in runs.items()} for count, runs in launches.items()
    } == {
        "2": {"same rows": 4, "rows each": 8, "float32": 4, "resumed": 4},
        "1": {"same rows": 4, "micro-batches": 4, "float32": 4, "resumed": 4},
    }, printed
    for runs in launches.values():
        assert [list(runs[name]["losses"]) for name in ("float32", "resumed")] == [list("1234"), list("34")]
        assert runs["same rows"]["teacher_bytes"] == launches["1"]["same rows"]["teacher_bytes"] > 0
    found = record["compared"]
    for name in ("ddp on 2, same rows", "ddp on 1, micro-batches"):
        assert found[name]["relative"] < 1e-2  # weights in bfloat16
    assert found["ddp on 2, float32"]["relative"] < 1e-5
    assert found["ddp on 2, resumed"] == {"steps": 2, "relative": 0, "absolute": 0}
    assert found["ddp on 1, resumed"]["relative"] < 1e-5
    assert found["ddp on 2, rows each"]["weak scaling"] > 0
    # Other rows have another loss, so the comparisons above can fail.
    each, one = (launches[count][name]["losses"] for count, name in (("2", "rows each"), ("1", "same rows")))
    assert max(abs(each[step] / one[step] - 1) for step in one) > 1e-2


def test_the_loss_and_its_floor(tmp_path: Path) -> None:
    printed = run(tmp_path, "-c", SMALL_LOSS, "--repeats", "1", "--output", "record.json")
    assert "64 x 32 x 4096, head frozen" in printed
    for shape in json.loads((tmp_path / "record.json").read_text())["shapes"]:
        assert [row["name"] for row in shape["results"]] == ["floor", "fused", "plain"]
        assert all(row["ms"] > 0 for row in shape["results"])


def test_the_accuracy_of_the_loss(tmp_path: Path) -> None:
    printed = example(tmp_path, "benchmarks/loss_accuracy.py", "--output", "record.json")
    record = json.loads((tmp_path / "record.json").read_text())
    for name in ("flat", "ordinary", "peaked"):
        assert f"\n{name}: " in printed
        errors = record[name]["errors"]
        assert errors["fused"]["value_max"] < errors["logsumexp, top-K, gather"]["value_max"]
