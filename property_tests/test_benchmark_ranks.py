"""What examples/benchmarks/ranks.py derives from the results of its launches."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from programs import EXAMPLES

sys.path.append(str(EXAMPLES / "benchmarks"))
import ranks
from ranks import compare, difference, join

Result = dict[str, Any]


def measured(losses: list[float], seconds: float = 1.0, first: int = 1) -> Result:
    return {
        "rows": 8,
        "losses": {str(first + index): value for index, value in enumerate(losses)},
        "steps": [seconds] * 5,
        "peak_bytes": 2**30,
        "teacher_bytes": 2**20,
    }


def result(kind: str, processes: int, **changes: Any) -> Result:
    runs = {"same rows": measured([2.0, 4.0])}
    return {
        "options": {"shape": "tiny"},
        "environment": {"gpu": None},
        "runs": {kind: {str(processes): runs}},
        **changes,
    }


def test_launches_are_compared_with_one_process() -> None:
    four, one, plain = result("fsdp2", 4), result("fsdp2", 1), result("ddp", 1)
    four["runs"]["fsdp2"]["4"] = {
        "same rows": measured([2.0, 4.4]),
        "rows each": measured([9.0], seconds=1.25),
        "grpo": measured([9.0], seconds=0.8),
        "float32": measured([1.0, 2.0, 4.0, 8.0]),
        "resumed": measured([4.0, 6.0], first=3),
    }
    one["runs"]["fsdp2"]["1"]["float32"] = measured([1.0, 2.0, 4.0, 10.0])
    one["runs"]["fsdp2"]["1"]["micro-batches"] = measured([2.0, 5.0])
    one["runs"]["fsdp2"]["1"]["grpo"] = measured([8.0], seconds=0.4)
    one["runs"]["fsdp2"]["1"]["resumed"] = {"failed": "out of memory"}
    plain["runs"]["ddp"]["1"] = {"float32": measured([1.0, 2.0, 5.0, 10.0])}
    compared = join([four, one, plain])["compared"]
    assert compared["fsdp2 on 4, same rows"] == pytest.approx({"steps": 2, "relative": 0.1, "absolute": 0.4})
    assert compared["fsdp2 on 4, rows each"] == pytest.approx({"weak scaling": 0.8})
    assert compared["fsdp2 on 4, grpo"] == pytest.approx({"weak scaling": 0.5})
    assert compared["fsdp2 on 4, float32"] == pytest.approx({"steps": 4, "relative": 0.2, "absolute": 2.0})
    assert compared["fsdp2 on 4, resumed"] == pytest.approx({"steps": 2, "relative": 0.25, "absolute": 2.0})
    assert compared["fsdp2 on 1, float32"] == pytest.approx({"steps": 4, "relative": 0.2, "absolute": 1.0})
    assert compared["fsdp2 on 1, micro-batches"] == pytest.approx(
        {"steps": 2, "relative": 0.25, "absolute": 1.0}
    )
    assert len(compared) == 7


def test_launches_with_other_options_are_not_joined() -> None:
    other = result("ddp", 1, options={"shape": "7b"})
    with pytest.raises(ValueError, match="expected those of all launches alike"):
        join([result("ddp", 2), other])


def test_a_process_of_a_launch_needs_the_folder_of_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ranks.py", "--worker", "x.json"])
    with pytest.raises(SystemExit, match=r"^2$"):
        ranks.main()
    assert "--worker: expected --scratch as well" in capsys.readouterr().err


def test_a_record_has_the_configuration_of_deepspeed_and_no_path(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text('{"zero_optimization": {"stage": 3}}')
    options = dict.fromkeys((*ranks.COMMON, "dtype", "float32", "checkpointing"), 1)
    plain = argparse.Namespace(**options, no_gather=False, deepspeed=None)
    changed = argparse.Namespace(**options, no_gather=True, deepspeed=str(file))
    known = {"no_gather": "True", "deepspeed": {"zero_optimization": {"stage": 3}}}
    assert ranks.recorded(plain) == dict.fromkeys(options, "1")
    assert ranks.recorded(changed) == ranks.recorded(plain) | known


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero3-layers"])
def test_a_configuration_of_deepspeed_is_for_zero2_or_zero3(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ranks.py", "--kinds", "zero3", kind, "--deepspeed", "x.json"])
    with pytest.raises(SystemExit, match=r"^2$"):
        ranks.main()
    said = " ".join(capsys.readouterr().err.split())
    assert said.endswith(
        f"--deepspeed: expected --kinds zero2 or zero3, whose configuration it is, got zero3 {kind}"
    )


@pytest.mark.parametrize(
    ("kind", "expected", "found"),
    [("zero3-layers", "Qwen2DecoderLayer", None), ("zero3", None, "Qwen2DecoderLayer")],
)
def test_a_process_of_zero3_has_the_class_of_its_kind(
    kind: str,
    expected: str | None,
    found: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv(ranks.LAYERS_VARIABLE, raising=False)
    if found:
        monkeypatch.setenv(ranks.LAYERS_VARIABLE, found)
    command = ["ranks.py", "--worker", "x.json", "--scratch", "x", "--kinds", kind]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match=r"^2$"):
        ranks.main()
    said = " ".join(capsys.readouterr().err.split())
    assert f"{kind}: expected {expected} as accelerate's option" in said
    assert said.endswith(f"got {found}")


@pytest.mark.parametrize("kind", ranks.KINDS)
def test_a_launch_has_the_file_of_its_kind(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setenv(ranks.LAYERS_VARIABLE, "OfAnotherLaunch")

    def launched(command: list[str], **settings: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        assert ranks.LAYERS_VARIABLE not in settings["env"]
        return subprocess.CompletedProcess(command, 1, "", "not here")

    monkeypatch.setattr(ranks.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ranks.subprocess, "run", launched)
    flags = ["--checkpointing", "--grpo", "--no-gather"]
    for chosen in (flags, []):
        monkeypatch.setattr(sys, "argv", ["ranks.py", "--kinds", kind, "--processes", "2", *chosen])
        ranks.main()
        assert [flag for flag in flags if flag in commands[-1]] == chosen
    command = commands[-1]
    file = Path(command[command.index("--config_file") + 1])
    assert file.exists()
    assert file.stem == kind.removesuffix("-layers")
    option = "--deepspeed_moe_layer_cls_names"
    assert (option in command) == (kind == "zero3-layers")
    if option in command:
        assert command[command.index(option) + 1] == "Qwen2DecoderLayer"


def test_a_launch_with_a_configuration_of_deepspeed_has_no_file_of_accelerate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commands: list[list[str]] = []

    def launched(command: list[str], **settings: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        assert settings["env"].get("ACCELERATE_TORCH_DEVICE") is None
        return subprocess.CompletedProcess(command, 1, "", "not here")

    monkeypatch.delenv("ACCELERATE_TORCH_DEVICE", raising=False)
    monkeypatch.setattr(ranks.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ranks.subprocess, "run", launched)
    monkeypatch.setattr(
        sys, "argv", ["ranks.py", "--kinds", "zero3", "--processes", "2", "--deepspeed", "x.json"]
    )
    ranks.main()
    (command,) = commands
    assert "--config_file" not in command
    assert command[command.index("--nproc-per-node") + 1] == "2"
    assert command[command.index("--deepspeed") + 1] == "x.json"


def test_accelerate_passes_the_class_of_the_layers_in_this_variable() -> None:
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    arguments = ["--use_deepspeed", "--zero_stage", "3", "--mixed_precision", "no"]
    arguments += ["--deepspeed_moe_layer_cls_names", "A", "x.py"]
    options = launch_command_parser().parse_args(arguments)
    # As the launcher sets them from a file.
    options.num_machines, options.num_processes, options.main_process_port = 1, 1, 0
    options.deepspeed_fields_from_accelerate_config = []
    _, variables = prepare_deepspeed_cmd_env(options)
    assert variables[ranks.LAYERS_VARIABLE] == "A"


def test_a_run_of_two_launches_has_the_steps_of_both() -> None:
    first, again = result("ddp", 2), result("ddp", 2)
    first["runs"]["ddp"]["2"] = {
        "same rows": measured([2.0], seconds=1.0),
        "float32": {"failed": "no memory"},
    }
    again["runs"]["ddp"]["2"] = {"same rows": measured([2.1], seconds=3.0), "float32": measured([1.0])}
    again["runs"]["ddp"]["2"]["same rows"]["peak_bytes"] = 2**31
    for results in ([first, again], [first, again, first]):
        runs = join(results)["runs"]["ddp"]["2"]
        assert runs["float32"] == measured([1.0])
    one = join([first, again])["runs"]["ddp"]["2"]["same rows"]
    assert one == measured([2.0]) | {"steps": [1.0] * 5 + [3.0] * 5}
    assert ranks.median_seconds(one) == 2.0


@pytest.mark.parametrize("failing", [["2"], ["1"], ["2", "1"]])
def test_a_launch_that_fails_costs_no_other(
    failing: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The record has the runs of the others, their options, and what the failed launch printed."""

    def launched(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        processes = command[command.index("--nproc-per-node") + 1]
        if processes in failing:
            return subprocess.CompletedProcess(command, 1, "", "OutOfMemoryError: no memory")
        done = result("ddp", int(processes))
        done["runs"]["ddp"][processes] = dict.fromkeys(
            ("same rows", "rows each", "micro-batches"), measured([2.0])
        )
        Path(command[command.index("--worker") + 1]).write_text(json.dumps(done))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(ranks.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ranks.subprocess, "run", launched)
    output = tmp_path / "record.json"
    monkeypatch.setattr(sys, "argv", ["ranks.py", "--processes", "2", "1", "--output", str(output)])
    ranks.main()
    record = json.loads(output.read_text())
    for processes in ("1", "2"):
        runs = record["runs"]["ddp"][processes]
        expected = {"failed": "OutOfMemoryError: no memory"} if processes in failing else measured([2.0])
        assert runs["same rows"] == expected
    known = {} if len(failing) == 2 else {"options": {"shape": "tiny"}, "environment": {"gpu": None}}
    assert {name: value for name, value in record.items() if name not in ("runs", "compared")} == known
    assert "failed: OutOfMemoryError: no memory" in capsys.readouterr().out


def run_with(losses: list[float]) -> Result:
    return {"losses": {str(step): loss for step, loss in enumerate(losses, 1)}}


LOSSES = st.floats(allow_infinity=False, width=32)


@given(st.lists(st.tuples(LOSSES, LOSSES), min_size=1, max_size=4))
def test_a_difference_shows_nan_at_any_step_and_takes_losses_of_zero(
    pairs: list[tuple[float, float]],
) -> None:
    found = difference(run_with([run for run, _ in pairs]), run_with([other for _, other in pairs]))
    unknown = any(math.isnan(run) or math.isnan(other) for run, other in pairs)
    assert math.isnan(found["absolute"]) == math.isnan(found["relative"]) == unknown
    if not unknown:
        # The smallest bound that holds at every step, by its definition and without a division.
        assert all(abs(run - other) <= found["absolute"] for run, other in pairs)
        assert any(abs(run - other) == found["absolute"] for run, other in pairs)
        from_zero = any(other == 0 != run for run, other in pairs)
        assert math.isinf(found["relative"]) or not from_zero
        if all(run == other for run, other in pairs):
            assert found["relative"] == 0


@pytest.mark.parametrize(
    ("run", "other", "relative"),
    [
        ([0.1, math.nan], [0.1, 0.2], math.nan),
        ([math.nan, 0.2], [0.1, 0.2], math.nan),
        ([0.1, 0.2], [0.1, math.nan], math.nan),
        ([0.0], [0.0], 0.0),
        ([0.0, 2.0], [0.0, 4.0], 0.5),
        ([1e-9], [0.0], math.inf),
        ([], [], math.nan),
    ],
)
def test_differences_at_the_limits(run: list[float], other: list[float], relative: float) -> None:
    assert difference(run_with(run), run_with(other))["relative"] == pytest.approx(relative, nan_ok=True)


def test_runs_without_a_timed_step_have_no_weak_scaling() -> None:
    """As a run of two steps; what else was measured is still compared."""
    short = {**measured([2.0]), "steps": []}
    runs = {"ddp": {"2": {"rows each": short, "same rows": short}, "1": {"same rows": short}}}
    found = compare(runs)
    assert math.isnan(found["ddp on 2, rows each"]["weak scaling"])
    assert found["ddp on 2, same rows"] == {"steps": 1, "relative": 0.0, "absolute": 0.0}
