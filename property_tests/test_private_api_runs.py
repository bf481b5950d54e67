"""Runs on the private API: every arm trains, records, devices and time limit, the page."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from private_api_cases import HERE, drawn, save_model
from programs import EXAMPLES, ROOT, run
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

sys.path.insert(0, str(EXAMPLES / "private_api"))

import arms
import checks
import curves
import house_style
import jobs
import train
from environment import Environment, Question
from kit_task import KIT
from record import description, log_columns, weights_hash, write


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def program_of(name: str) -> Any:
    """A module that is not imported by its name, which one of the demo has too."""
    spec = importlib.util.spec_from_file_location(f"private_api_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_program(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`run.py`, which imports its report by name."""
    monkeypatch.setitem(sys.modules, "report", program_of("report"))
    return program_of("run")


def test_every_question_has_arms_of_different_names() -> None:
    for question in arms.QUESTIONS:
        names = [arm.name for arm in arms.arms(question)]
        assert len(set(names)) == len(names) > 1
    with pytest.raises(ValueError, match=r"question: expected one of learns, .*, got 'x'"):
        arms.arms("x")


def recorded_arms() -> list[arms.Arm]:
    """Every arm that has a record of its own."""
    recorded = [
        arms.recorded_as(question, arm)[1] for question in arms.QUESTIONS for arm in arms.arms(question)
    ]
    return list({arm.name: arm for arm in recorded}.values())


def test_an_arm_is_recorded_as_the_first_with_the_same_settings() -> None:
    assert arms.recorded_as("support", arms.arms("support")[2]) == ("learns", arms.arms("learns")[0])
    collapsing = arms.arms("cures")[0]
    assert arms.recorded_as("cures", collapsing)[1].name == "α=0, rate 0.05 per 64"
    assert arms.recorded_as("lasting", arms.arms("lasting")[0])[0] == "lasting"
    for question in arms.CHOOSING:
        assert [arms.recorded_as(question, arm) for arm in arms.arms(question)] == [
            (question, arm) for arm in arms.arms(question)
        ]
    for change in ({"learning_rate": 1.0}, {"lora_rank": 3}, {"length": 7}, {"settings": {"alpha": 0.25}}):
        with pytest.raises(ValueError, match="arm: expected an arm of QUESTIONS"):
            arms.recorded_as("cures", dataclasses.replace(collapsing, **change))


# One of each question that no other has, among them those that need more than settings: adapters, a reference. The
# rest takes a minute.
FAST = ("SDPO", "GRPO, lr 2e-06", "α=0.1", "K=20, no tail", "collapsing + anchor 0.1", "LoRA r=16, lr 0.0001")
ARMS = [
    pytest.param(arm, id=arm.name, marks=[] if arm.name in FAST else pytest.mark.slow)
    for arm in recorded_arms()
]


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_trains(arm: arms.Arm, model_folder: Path) -> None:
    trains(arm, KIT, model_folder)


def test_the_second_task_trains(model_folder: Path) -> None:
    trains(arms.arms("learns")[0], house_style.HOUSE_STYLE, model_folder)


def test_the_task_of_the_readme_trains(model_folder: Path) -> None:
    block = (HERE / "README.md").read_text().split("```py\n")[1].split("```")[0]
    names: dict = {}
    exec(block, names)
    task = names["ORDERS"]
    for split in ("train", "test"):
        for question in drawn(task, split, 20):
            assert task.judge(question.answer, **question.columns) == (1.0, None)
            assert task.judge("x", **question.columns).feedback
    trains(arms.arms("learns")[0], task, model_folder)


def test_a_task_that_trains_on_held_out_questions_is_refused() -> None:
    train.check_split(KIT, KIT.held_out(96), seed=0)
    same = dataclasses.replace(KIT, name="mine", draw=lambda rng, _: KIT.draw(rng, "train"))
    with pytest.raises(ValueError, match=r"task 'mine': .* draw other questions for the split 'test'"):
        train.check_split(same, same.held_out(96), seed=0)


def trains(arm: arms.Arm, task: Environment, model_folder: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_folder)
    model = Qwen2ForCausalLM.from_pretrained(model_folder)
    small = dataclasses.replace(arm, samples_per_step=arm.samples_per_step // 4)
    saved = []
    curve = train.run_arm(
        model,
        tokenizer,
        task,
        small,
        seed=0,
        samples=2 * small.samples_per_step,
        points=2,
        held_out=task.held_out(2),
        save=lambda curve: saved.append(len(curve.points)),
    )
    assert [point[0] for point in curve.points] == [0, small.samples_per_step, 2 * small.samples_per_step]
    assert saved == [1, 2, 3]
    if arm.method == "sdpo" and arm.settings.get("include_environment_feedback", True):
        divergences = [entry["self_distillation/divergence"] for entry in curve.log]
        # A pass-rate weight is 0 in a group without a success.
        assert len(divergences) == 2
        assert all("self_distillation/reprompt_text_fraction" in entry for entry in curve.log)
        assert "row_weights" in arm.settings or all(value > 0 for value in divergences)


def test_a_long_log_is_thinned_unless_every_step_is_kept() -> None:
    log = [{"step": step, "reward": step / 4} for step in range(1, 451)]
    log[3]["grad_norm"] = 1.0
    thinned = log_columns(log, every_step=False)
    assert thinned["step"] == list(range(1, 451, 3))
    assert thinned["reward"][:2] == [0.25, 1.0]
    assert thinned["grad_norm"][:3] == [None, 1.0, None]
    assert len(log_columns(log, every_step=True)["step"]) == 450
    assert log_columns(log[:200], every_step=False)["step"] == list(range(1, 201))
    assert log_columns([], every_step=False) == {}


def make_line(*variables: str) -> list[str]:
    """The command of `make demo-llm`, without the environment that it would set up."""
    make = ("make", "-n", "-s", "demo-llm", "READY=", *variables)
    line = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return shlex.split(line)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_make_target_passes_model_and_folder() -> None:
    program = ["HF_HUB_OFFLINE=0", ".venv/bin/python", "examples/private_api/run.py"]
    assert make_line("MODEL=tiny") == [*program, "--model", "tiny"]
    assert make_line("MODEL=A/B", "OUTPUT=a b") == [*program, "--model", "A/B", "--output", "a b"]
    assert make_line() == [*program, "--model", ""]


def test_small_runs_of_the_tiny_model_and_their_reports(model_folder: Path, tmp_path: Path) -> None:
    """What `make demo-llm MODEL=tiny` runs, on some arms of two questions."""
    arguments = ("--model", "tiny", "--output", "out")
    chosen = ("--arms", "SDPO", "supervised", "K=100")
    questions = ("--question", "learns", "support")
    printed = run(tmp_path, str(HERE / "run.py"), *arguments, *questions, *chosen, "--jobs", "2")
    assert "supervised, seed 0: accuracy 0.00, best 0.00, probability 0.00 after 128 samples" in printed
    records = [json.loads(path.read_text()) for path in (tmp_path / "out" / "records").glob("*.json")]
    # K=100 is the setting of SDPO, which runs once.
    assert sorted(record["arm"] for record in records) == sorted(chosen[1:-1])
    assert {record["model"] for record in records} == {"tiny"}
    assert {record["weights_sha256"] for record in records} == {weights_hash(model_folder)}
    for record in records:
        assert record["complete"]
        assert [point[0] for point in record["points"]] == [0, 64, 128]
        assert len(record["before"]) == len(record["after"]) == 6
        assert record["log"].get("step", []) == ([] if record["method"] == "supervised" else [1, 2])
        assert str(tmp_path) not in json.dumps(record)
        assert len(json.dumps(record)) < 40_000
    trained = next(record for record in records if record["arm"] == "supervised")
    assert trained["points"][-1][1] > trained["points"][0][1]
    for question in ("kit-learns", "kit-support"):
        page = (tmp_path / "out" / question / "report.html").read_text()
        assert "src=" not in page
        assert "http" not in page.replace("http://www.w3.org", "")


def test_a_record_is_written_at_each_evaluation(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "record.json"
    seen = []

    def write_and_read(path: Path, record: dict) -> None:
        write(path, record)
        seen.append(json.loads(path.read_text()))

    monkeypatch.setattr(train, "write", write_and_read)
    given = (
        "--arm",
        "supervised",
        "--samples",
        "128",
        "--points",
        "2",
        "--output",
        str(target),
        "--seed",
        "1",
    )
    monkeypatch.setattr(sys, "argv", ["train.py", "--model", str(model_folder), *given])
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)
    train.main()
    assert [record["complete"] for record in seen] == [False, False, False, True]
    assert [len(record["points"]) for record in seen] == [1, 2, 3, 3]
    assert [record["after"] is None for record in seen] == [True, True, True, False]
    assert seen[0]["command"] == (
        f"python examples/private_api/train.py --model {model_folder.name} --task kit --question learns "
        "--arm supervised --seed 1 --samples 128 --points 2 --output FILE"
    )
    with pytest.raises(TypeError):
        write(target, {"not": object()})
    assert json.loads(target.read_text()) == seen[-1]


def fake_run(given: Sequence[str]) -> None:
    """Write a record as a run does, and go on for as long as it is asked to."""
    path, seconds = given
    record = {
        "arm": "A",
        "seed": 0,
        "seconds": 1,
        "points": [[64, 0.1, 0.2]],
        "complete": float(seconds) == 0,
    }
    record["device"] = os.environ.get("CUDA_VISIBLE_DEVICES")
    Path(path).write_text(json.dumps(record))
    time.sleep(float(seconds))


def fake_job(folder: Path, name: str, seconds: float, length: int = 1) -> jobs.Job:
    path = folder / f"{name}.json"
    return jobs.Job(name, 0, path, (str(path), str(seconds)), length)


def test_runs_end_with_the_time_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    todo = [fake_job(tmp_path, "short", 0), fake_job(tmp_path, "late", 0), fake_job(tmp_path, "long", 600, 5)]
    # The longest starts first, so that the others have no time.
    assert jobs.run_all(todo, fake_run, devices=[None], per_device=1, minutes=0.1) == 0
    printed = capsys.readouterr().out
    assert (
        "long, seed 0: accuracy 0.20, best 0.20, probability 0.10 after 64 samples (incomplete), 1 s"
        in printed
    )
    assert printed.count("no time left") == 2
    assert not json.loads(todo[2].record.read_text())["complete"]
    # What is incomplete or missing is made, what is complete is not.
    again = [fake_job(tmp_path, name, 0) for name in ("short", "late", "long")]
    assert jobs.run_all(again, fake_run, devices=["3", "5"], per_device=2, minutes=None) == 0
    records = [json.loads(job.record.read_text()) for job in again]
    assert all(record["complete"] for record in records)
    assert {record["device"] for record in records} == {"3", "5"}
    before = [job.record.stat().st_mtime_ns for job in again]
    assert jobs.run_all(again, fake_run, devices=[None], per_device=1, minutes=None) == 0
    assert [job.record.stat().st_mtime_ns for job in again] == before
    silent = jobs.Job("silent", 0, tmp_path / "silent.json", ())
    assert jobs.run_all([silent], lambda _: None, devices=[None], per_device=1, minutes=None) == 1
    broken = jobs.Job("broken", 0, tmp_path / "broken.json", ())
    assert jobs.run_all([broken], fake_run, devices=[None], per_device=1, minutes=None) == 1
    assert "not enough values to unpack" in capsys.readouterr().err


def test_records_of_another_run_are_refused(tmp_path: Path) -> None:
    """Else they would be shown as those of this model, since the run of a complete record is not repeated."""
    expected = {"model": "B", "samples": 640, "points": 30, "settings": {"alpha": 0.5, "k": 100}}
    own = {**expected, "points": [], "command": "python train.py --points 30 --output FILE"}
    todo = [
        jobs.Job(name, 0, tmp_path / f"{name}.json", (), expected=expected)
        for name in ("own", "missing", "model", "samples", "points", "settings", "cut")
    ]
    todo[0].record.write_text(json.dumps({**own, "complete": False}))
    jobs.check_records(todo)
    todo[6].record.write_text(json.dumps(own)[:40])
    for complete in (True, False):
        for job, change in zip(
            todo[2:],
            (
                {"model": "A"},
                {"samples": 128, "model": "A"},
                {"command": "python train.py --points 2 --output FILE"},
                {"settings": {"alpha": 0.1, "k": 100, "tail": "renormalize"}},
            ),
            strict=False,
        ):
            job.record.write_text(json.dumps({**own, "complete": complete, **change}))
        with pytest.raises(ValueError, match="pass another --output") as error:
            jobs.check_records(todo)
        what_to_do = "; pass another --output, or remove the file"
        assert str(error.value).splitlines() == [
            f"{todo[2].record}: expected a record of model 'B', got 'A'{what_to_do}",
            f"{todo[3].record}: expected a record of model 'B', got 'A'; of samples 640, got 128{what_to_do}",
            f"{todo[4].record}: expected a record of points 30, got 2{what_to_do}",
            f"{todo[5].record}: expected a record of settings {{'alpha': 0.5}}, "
            f"got {{'alpha': 0.1, 'tail': 'renormalize'}}{what_to_do}",
            f"{todo[6].record}: expected a record, got 40 bytes that are not JSON (cut off?); "
            "remove the file and start again",
        ]


@pytest.mark.parametrize(
    ("content", "got"),
    [
        ("", "an empty file (cut off?)"),
        (" \n", "an empty file (cut off?)"),
        ('{"complete": tr', "15 bytes that are not JSON (cut off?)"),
        ("\udcff", "1 bytes that are not JSON (cut off?)"),
        ("[]", "JSON without 'complete' and 'points'"),
        ('{"complete": true}', "JSON without 'complete' and 'points'"),
    ],
)
def test_a_file_that_is_no_record_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: str,
    got: str,
) -> None:
    path = tmp_path / "one.json"
    path.write_text(content, errors="surrogateescape")
    message = f"{path}: expected a record, got {got}; remove the file and start again"
    with pytest.raises(ValueError) as error:
        checks.read_record(path)
    assert str(error.value) == message
    monkeypatch.setattr(sys, "argv", ["report.py", str(path)])
    with pytest.raises(SystemExit, match="2"):
        program_of("report").main()
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"error: {message}")


def test_the_report_names_a_missing_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path / "no.json")])
    with pytest.raises(SystemExit, match="2"):
        program_of("report").main()
    assert "no.json: expected a record, got no file" in capsys.readouterr().err


def test_what_a_run_records_is_what_is_expected_of_it(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every arm: else a run that is started again would refuse its own records."""
    program = run_program(monkeypatch)
    questions = ("--question", *arms.QUESTIONS)
    given = ("--model", str(model_folder), "--samples", "64", "--points", "3", *questions)
    monkeypatch.setattr(sys, "argv", ["run.py", *given, "--output", str(tmp_path)])
    monkeypatch.setattr("record.weights_hash", lambda _: "of the folder")
    todo = program.jobs(program.arguments())
    for job in todo:
        options = train.arguments(job.arguments)
        arm = next(arm for arm in arms.arms(options.question) if arm.name == options.arm)
        write(job.record, {**description(options, arm), "complete": False, "points": []})
    assert len(todo) > 40
    assert {job.expected["weights_sha256"] for job in todo} == {"of the folder"}
    jobs.check_records(todo)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "other"}, "expected a record of model 'tiny', got 'other'"),
        ({"weights_sha256": "f00"}, "expected a record of weights_sha256 '{}', got 'f00'"),
        ({"samples": 64}, "expected a record of samples 128, got 64"),
        ({"command": "train.py --points 5"}, "expected a record of points 2, got 5"),
        ({"learning_rate": 2e-5}, "expected a record of learning_rate 1e-05, got 2e-05"),
        ({"method": "sdpo"}, "expected a record of method 'supervised', got 'sdpo'"),
        ({}, None),
    ],
    ids=lambda value: next(iter(value), "own") if isinstance(value, dict) else "",
)
def test_the_program_refuses_other_records_before_any_run(
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict,
    message: str | None,
) -> None:
    tiny = tmp_path / "tiny"
    tiny.symlink_to(model_folder)
    # Only the last of the two runs has a record.
    records = tmp_path / "out" / "records"
    common = ("--model", str(tiny), "--samples", "128", "--points", "2")
    target = records / "kit-learns-supervised-0.json"
    options = train.arguments([*common, "--arm", "supervised", "--output", str(target)])
    supervised = next(arm for arm in arms.arms("learns") if arm.name == "supervised")
    record = {**description(options, supervised), "seconds": 1.0, "complete": True}
    write(target, {**record, "points": [[0, 0.0, 0.0], [128, 0.5, 0.5]], **change})
    program = run_program(monkeypatch)
    started = []
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # which the program sets
    monkeypatch.setattr(program, "run_all", lambda todo, *_, **__: started.append(todo))
    monkeypatch.setattr(program, "report", lambda *_: None)
    given = (*common, "--arms", "SDPO", "supervised", "--output", str(tmp_path / "out"))
    monkeypatch.setattr(sys, "argv", ["run.py", *given])
    handler = signal.getsignal(signal.SIGTERM)
    if message is None:
        assert program.main() == 0
        assert [[job.arm for job in todo] for todo in started] == [["SDPO", "supervised"]]
        assert signal.getsignal(signal.SIGTERM) is handler
        return
    with pytest.raises(SystemExit) as error:
        program.main()
    expected = message.format(weights_hash(model_folder))
    assert str(error.value) == f"run.py: {target}: {expected}; pass another --output, or remove the file"
    assert started == []


def test_a_longer_run_says_how_its_samples_follow_from_the_option(tmp_path: Path) -> None:
    target = tmp_path / "record.json"
    write(target, {"complete": True, "points": [], "samples": 48000})
    for length, words in ((1, "samples 640, got"), (5, "samples 640 (5 times --samples), got")):
        job = jobs.Job("SDPO", 0, target, (), length, expected={"samples": 640})
        with pytest.raises(ValueError, match=re.escape(f"expected a record of {words} 48000;")):
            jobs.check_records([job])


def test_a_hub_id_is_compared_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = run_program(monkeypatch)
    given = ("--model", "Owner/Name", "--samples", "64", "--question", "learns", "lasting")
    monkeypatch.setattr(sys, "argv", ["run.py", *given, "--output", str(tmp_path)])
    todo = program.jobs(program.arguments())
    assert all("weights_sha256" not in job.expected for job in todo)
    # A longer arm expects more samples.
    found = {(job.length, job.expected["model"], job.expected["samples"]) for job in todo}
    assert found == {(1, "Owner/Name", 64), (5, "Owner/Name", 320)}


def refusal(program: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any, *given: str) -> str:
    """The last line of what a program says that refuses its arguments before any run."""
    if hasattr(program, "run_all"):
        monkeypatch.setattr(program, "run_all", lambda *_, **__: pytest.fail("a run started"))
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    monkeypatch.setattr(sys, "argv", ["x.py", *given])
    with pytest.raises(SystemExit, match=r"^2$"):
        program.main()
    return capsys.readouterr().err.splitlines()[-1].removeprefix("x.py: error: ")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        *(
            ((option, value), f"argument {option}: expected a positive integer, got {value!r}")
            for option in ("--points", "--samples", "--jobs")
            for value in ("0", "-3", "1.5")
        ),
        (("--seeds", "0", "-1"), "argument --seeds: expected an integer of 0 or more, got '-1'"),
        (("--output", "file"), "--output: expected a folder, got 'file', which is a file or below one"),
        (("--output", "file/in"), "--output: expected a folder, got 'file/in', which is a file or below one"),
        (("--arms", "SDPO, chosen"), "GRPO', 'SDPO, shuffled feedback', "),
        (("--arms", "SDPO, chosen", "x"), "'supervised', each in quotes; got 'SDPO, chosen', 'x'"),
        (("--model", ""), "make demo-llm MODEL=tiny"),
    ],
    ids=str,
)
def test_arguments_that_no_run_could_use_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    given: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert message in refusal(run_program(monkeypatch), monkeypatch, capsys, "--model", "m", *given)


def test_one_run_refuses_them_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--model", "m", "--arm", "SDPO", "--output", str(tmp_path))
    for option in ("--points", "--samples"):
        line = refusal(train, monkeypatch, capsys, *common, option, "0")
        assert line == f"argument {option}: expected a positive integer, got '0'"
    line = refusal(train, monkeypatch, capsys, *common, "--seed", "-1")
    assert line == "argument --seed: expected an integer of 0 or more, got '-1'"
    assert "expected a file, got the folder" in refusal(train, monkeypatch, capsys, *common)
    assert "'GRPO', 'SDPO, shuffled" in refusal(train, monkeypatch, capsys, *common, "--arm", "x")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("./missing", "no such folder"),
        ("a/b/missing", "no such folder"),
        ("file", "it is a file"),
        ("empty", "no config.json in the folder"),
        ("no weights", "no weights in the folder"),
        ("no template", "its tokenizer has no chat template"),
        ("refuses", "no system turn, please"),
        ("Owner/Unknown", "We couldn't connect to 'https://huggingface.co'"),
    ],
)
def test_a_model_that_no_run_could_use_is_refused_once(
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("empty").mkdir()
    shutil.copytree(model_folder, "no weights", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(model_folder, "no template", ignore=shutil.ignore_patterns("*.jinja"))
    shutil.copytree(model_folder, "refuses")
    Path("refuses", "chat_template.jinja").write_text("{{ raise_exception('no system turn,\nplease') }}")
    line = refusal(run_program(monkeypatch), monkeypatch, capsys, "--model", name)
    start = f"--model: expected a model folder or a hub id with a chat template, got {name!r}: "
    assert line.startswith(start + reason.partition(", please")[0])


SLEEPS = """
import os, sys, time, types
from pathlib import Path

def sleep(given):  # in the place of a training, which goes on writing
    Path(given[-1]).with_suffix(".pid").write_text(str(os.getpid()))
    time.sleep(120)

sys.path.insert(0, {folder!r})
sys.modules["train"] = types.SimpleNamespace(main=sleep)
sys.modules["record"] = types.SimpleNamespace(weights_hash=lambda _: None)  # what it imports takes seconds
import run
raise SystemExit(run.main())
"""


def is_alive(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_sigterm_ends_the_runs_as_well(model_folder: Path, tmp_path: Path) -> None:
    given = ("--model", str(model_folder), "--arms", "SDPO", "GRPO", "--jobs", "2", "--output", str(tmp_path))
    program = subprocess.Popen([sys.executable, "-c", SLEEPS.format(folder=str(HERE)), *given])
    ids: list[int] = []
    try:
        until = time.monotonic() + 120
        while len(ids) < 2 and program.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
            ids = [int(text) for path in tmp_path.rglob("*.pid") if (text := path.read_text())]
        assert len(ids) == 2
        assert all(map(is_alive, ids))
        program.terminate()
        assert program.wait(30) == 143
        assert not any(map(is_alive, ids))
    finally:
        program.kill()
        program.wait()
        for process in filter(is_alive, ids):
            os.kill(process, signal.SIGKILL)


def test_columns_of_several_types_are_refused() -> None:
    def question(value: object) -> Question:
        return Question([{"role": "user", "content": "q"}], "a", {"kind": "x", "wanted": value})

    train.check_columns(KIT, [question(value) for value in (1, None, 2)])
    with pytest.raises(ValueError, match=r"task 'kit': .* column 'wanted' of .* got int, str; write them"):
        train.check_columns(KIT, [question(value) for value in (1, "one")])


def test_runs_share_a_device_by_their_memory(tmp_path: Path) -> None:
    """Each run notes how much memory the runs beside it and its own take together."""
    sizes = {"a": 1.0, "b": 1.0, "c": 2.0, "d": 1.0, "e": 9.0}  # the last takes more than there is

    def noting(given: Sequence[str]) -> None:
        (name,) = given
        with (tmp_path / "starts").open("a") as file:
            file.write(name)
        (tmp_path / f"{name}.running").touch()
        time.sleep(0.5)
        together = sum(sizes[path.stem] for path in tmp_path.glob("*.running"))
        record = {"arm": name, "seed": 0, "seconds": 1, "points": [[64, 0.1, 0.2]], "complete": True}
        (tmp_path / f"{name}.json").write_text(json.dumps({**record, "together": together}))
        (tmp_path / f"{name}.running").unlink()

    todo = [
        jobs.Job(name, 0, tmp_path / f"{name}.json", (name,), memory=size) for name, size in sizes.items()
    ]
    assert jobs.run_all(todo, noting, devices=[None], per_device=3, minutes=None) == 0
    together = {job.arm: json.loads(job.record.read_text())["together"] for job in todo}
    starts = (tmp_path / "starts").read_text()
    assert together.pop("e") == 9.0
    assert max(together.values()) == 3.0
    # In their order: a small run that starts before a large one delays it.
    assert starts.index("c") < starts.index("d")


def test_the_report_escapes_what_a_model_wrote(tmp_path: Path) -> None:
    report = program_of("report")
    row = {
        "question": "q",
        "reply": "<script>alert(1)</script>",
        "score": 0,
        "feedback": "<b>",
        "answer": "a",
    }
    records = [
        {
            "task": "kit",
            "arm": arm,
            "seed": seed,
            "points": [[0, 0.0, 0.0], [64, 0.1 * seed, 0.5]],
            "before": [row],
            "after": [row],
            "complete": True,
            "model": "m",
            "device": "d",
            "versions": {"torch": "0"},
        }
        for arm in ("A", "B")
        for seed in (0, 1)
    ]
    page = report.write_report(records, tmp_path).read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert curves.mean_curve(records[:2], curves.PROBABILITY) == [(0, 0.0), (64, 0.05)]
    assert report.plot(records, 1, "p") == report.plot(records, 1, "p")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--batches", "0"), "--batches: expected a positive integer, got '0'"),
        (("--seed", "-1"), "--seed: expected an integer of 0 or more, got '-1'"),
        (("--output", "."), "--output: expected a JSON file in a folder, got '.'"),
        (("--output", "file/probe.json"), "--output: expected a JSON file in a folder, got"),
        (("--model", "file"), "--model: expected a model folder or a hub id with a chat template"),
    ],
    ids=str,
)
def test_the_probe_refuses_what_no_arm_could_use(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    given: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    defaults = ("--model", "m", "--output", "probe.json")
    assert message in refusal(program_of("probe"), monkeypatch, capsys, *defaults, *given)


def test_the_probe_of_all_arms(model_folder: Path, tmp_path: Path) -> None:
    arguments = ("--model", str(model_folder), "--batches", "1", "--output", "out/probe.json")
    printed = run(tmp_path, str(HERE / "probe.py"), *arguments)
    record = json.loads((tmp_path / "out" / "probe.json").read_text())
    found = record["probes"]
    assert list(found) == ["α=0", "α=0.1", "SDPO", "α=1", "SDPO, shuffled feedback", "SDPO, peers only"]
    assert len(record["weights_sha256"]) == 64
    # A random model calls nothing right, so only feedback gives a signal.
    shares = {name: result["signal"]["share"] for name, result in found.items()}
    assert shares == {name: float(name != "SDPO, peers only") for name in found}
    for name, result in found.items():
        assert (result["rows"], result["success"]["bare"]) == (64, 0.0)
        assert result["verdict"]["outlook"] == "does not learn"
        assert result["verdict"]["remarks"][0]["rule"] == ("no_better" if shares[name] else "no_signal")
        assert (result["right_answers"] is None) == (name == "SDPO, peers only")
    # The same model, prompts and seed: the arms with feedback differ in α alone.
    assert found["α=0"]["right_answers"] == found["SDPO"]["right_answers"]
    assert "VERDICT: do not train yet" in printed
