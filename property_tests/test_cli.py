"""The command line: every command on tiny models, what a terminal shows, and one line for each mistake."""

from __future__ import annotations

import importlib
import json
import os
import pty
import shutil
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from trl import import_utils

from sdpo_rl.cli import UserError, doctor, main, recipe, unsloth
from sdpo_rl.compat import upgrade_check

ROOT = Path(__file__).parents[1]
ON_CPU = ("--use_cpu", "true", "--bf16", "false", "--report_to", "none")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def project(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that `sdpo init` wrote, for the tiny model and a short run."""
    assert main(["init", str(tmp_path)]) == 0
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    values = yaml.safe_load(path.read_text())
    values |= {
        "model_name_or_path": str(model_folder),
        "max_steps": 2,
        "max_completion_length": 4,
        "per_device_train_batch_size": 8,
        "use_peft": False,
        "k": 8,
    }
    path.write_text(yaml.safe_dump(values))
    return tmp_path


def environment() -> dict[str, str]:
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "adapters")))
    return {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def sdpo(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sdpo_rl", *arguments],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_train_writes_a_model_and_quiet_shows_no_progress(project: Path) -> None:
    done = sdpo("train", "--config", "recipe.yaml", "--quiet", *ON_CPU, folder=project)
    assert done.returncode == 0, done.stderr[-3000:]
    # DeepSpeed writes a line to stdout wherever it is installed.
    lines = [line for line in done.stdout.splitlines() if "real_accelerator" not in line]
    assert lines == ["Saved to output."]
    assert "it/s]" not in done.stderr
    assert (project / "output" / "model.safetensors").exists()


def in_a_terminal(*arguments: str, folder: Path, **variables: str) -> tuple[int, str]:
    """The exit code, and everything that a terminal is sent."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))  # a terminal without a width gets no bar
    process = subprocess.Popen(
        [sys.executable, "-m", "sdpo_rl", *arguments],
        cwd=folder,
        env=environment() | variables,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    seen = b""
    try:
        while block := os.read(ours, 4096):
            seen += block
    except OSError:  # the terminal closes with the process
        pass
    os.close(ours)
    return process.wait(), seen.decode()


def test_a_person_sees_progress_in_a_terminal(project: Path) -> None:
    code, text = in_a_terminal("train", "--config", "recipe.yaml", *ON_CPU, folder=project)
    assert code == 0, text[-3000:]
    assert "2/2" in text
    assert "'reward'" in text
    assert "Saved to output." in text


def test_a_dry_run_trains_nothing_and_prints_what_would_run(project: Path) -> None:
    done = sdpo("train", "--config", "recipe.yaml", "--alpha", "0.25", "--dry_run", *ON_CPU, folder=project)
    assert done.returncode == 0, done.stderr[-3000:]
    values: dict = {}
    for part in done.stdout.split("\nPreview:\n")[0].split("# ")[1:]:
        values |= yaml.safe_load(part.split("\n", 1)[1]) or {}
    assert (values["alpha"], values["k"], values["max_steps"]) == (0.25, 8, 2)
    # Neither a default nor what transformers makes of one.
    assert "# GRPOConfig, without defaults" in done.stdout
    assert not {"num_generations", "accelerator_config", "debug"} & set(values)
    assert "64 rows; nothing was trained" in done.stdout
    assert "Memory besides activations: weights " in done.stdout
    assert done.stdout.count("student's prompt: ") == 2
    assert not (project / "output" / "model.safetensors").exists()


HOSTILE = """
def judge(completions, **columns):
    texts = ["\\x1b[2J\\x1b[31mred\\r\\x07 <eos> \\u202e\\n--- row 9: forged\\n", "long " * 9000, None, " "]
    return [(0.0, texts[row % 4]) for row in range(len(completions))]
"""


def test_a_preview_in_a_terminal_shows_both_kinds_of_rows_and_no_control_characters(project: Path) -> None:
    (project / "rewards.py").write_text(HOSTILE)
    arguments = ("preview", "--config", "recipe.yaml", "--rows=8", "--quiet", *ON_CPU)
    code, text = in_a_terminal(*arguments, folder=project)
    assert code == 0, text[-3000:]
    shown = text[text.index("8 of 8 rows of a generation batch") :]
    assert {character for character in shown if not character.isprintable()} <= {"\r", "\n"}
    assert all(line.endswith("\r") and line.count("\r") == 1 for line in shown.split("\n")[:-1])
    assert "\\x1b[2J\\x1b[31mred\\r\\x07 <eos> \\u202e" in shown
    assert "  | --- row 9: forged" in shown
    assert shown.count("\n--- row ") == 8
    assert "no signal: no completion of this prompt reached success_reward_threshold=1" in shown
    assert "characters are not printed here" in shown
    assert "cut from" in shown
    assert len(shown) < 80_000
    assert not (project / "output" / "model.safetensors").exists()


WRITES = """
def prompt(attempt):
    return [{"role": "user", "content": f"answer={attempt.columns['answer']}"}]
"""


def test_a_recipe_names_the_function_that_writes_the_teacher_s_prompt(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "prompts.py").write_text(WRITES)
    arguments = ["preview", "--config", "recipe.yaml", "--rows", "1", "--quiet", *ON_CPU]
    assert main([*arguments, "--teacher_prompt_func", "prompts.py:prompt"]) == 0
    assert "  | <user>answer=" in capsys.readouterr().out
    assert main([*arguments, "--teacher_prompt_func", "prompts.py:no_such"]) != 0
    assert "teacher_prompt_func: expected a name of prompts.py, got 'no_such'" in capsys.readouterr().err


def test_a_preview_in_a_terminal_without_unicode_is_escaped(project: Path) -> None:
    (project / "rewards.py").write_text(
        "def judge(completions, **_): return [(0.0, 'é' * 3) for _ in completions]"
    )
    arguments = ("preview", "--config", "recipe.yaml", "--rows", "1", "--quiet", *ON_CPU)
    code, text = in_a_terminal(*arguments, folder=project, PYTHONIOENCODING="ascii")
    assert code == 0, text[-3000:]
    assert "  | \\xe9\\xe9\\xe9\r\n" in text
    assert text.isascii()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rows", "0"), "--rows: expected 1 to 8 rows, of which a generation batch has 8, got 0; pass"),
        (("--rows", "-1"), "got -1"),
        (("--rows", "9"), "got 9; pass another number, or enlarge the generation batch"),
        (("--rows", "many"), "--rows: expected a number of rows, got 'many'; write --rows 4"),
        (("--enabled", "false"), "sdpo_config: expected enabled=True"),
        (("--alpha", "7"), "alpha: expected a number in [0, 1], got 7.0"),
        (("--dataset", "no.jsonl"), "expected a file or a hub id, got 'no.jsonl'"),
    ],
)
def test_a_mistake_in_a_preview_ends_with_one_line(
    project: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert main(["preview", "--config", "recipe.yaml", *ON_CPU, *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("sdpo preview: ")
    assert message in error


def test_the_help_of_preview_names_its_own_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["preview", "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: sdpo preview --config recipe.yaml [--any_field value]\n\n--rows N: ")
    assert "SDPOConfig.\n\noptions:\n" in printed


def test_probe_prints_a_verdict_and_writes_json(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--config", "recipe.yaml", "--json", "probe.json", "--batches", "1", *ON_CPU)
    capsys.readouterr()
    # The tiny model is right by chance at most: no retry is better.
    assert main(["probe", *options, "--answer_column", "answer"]) == 1
    values = json.loads((project / "probe.json").read_text())
    assert values["verdict"]["outlook"] == "does not learn"
    assert values["right_answers"]["source"] == "answer_column"
    assert (values["rows"], values["alpha"], values["k"]) == (8, 0.5, 8)
    assert f"VERDICT: {values['verdict']['summary']}" in capsys.readouterr().out
    assert not (project / "output" / "model.safetensors").exists()
    for wrong, message in (
        (("--json", "no/probe.json"), "--json: expected a file in a folder, got 'no/probe.json'"),
        (("--json", "."), "--json: expected a file, got the folder '.'"),
        (("--answer_column", "no"), "answer_column: expected a column of train_dataset, got 'no'"),
        (("--answer_column", "prompt"), "answer_column: expected a column of texts, got list in 'prompt'"),
        (("--batches", "0"), "batches: expected at least 1, got 0"),
        (("--batches", "two"), "--batches: expected a number of generation batches, got 'two'"),
        (("--enabled", "false"), "expected enabled=True, got False"),
    ):
        assert main(["probe", "--config", "recipe.yaml", *ON_CPU, *wrong]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("sdpo probe: ")
        assert message in error
    with pytest.raises(SystemExit) as stopped:
        main(["probe", "--help"])
    assert stopped.value.code == 0
    assert "--json FILE" in capsys.readouterr().out


def test_k_beyond_the_vocabulary_is_refused_before_the_weights_are_loaded(
    project: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No bar comes before the message; the folder has no weights, so a smaller K ends with another error."""
    shutil.copytree(model_folder, project / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    arguments = ("--config", "recipe.yaml", *ON_CPU, "--model_name_or_path", str(project / "model"))
    capsys.readouterr()
    assert main(["probe", *arguments, "--k", "103"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sdpo probe: k: expected at most 102, the model's vocabulary, got 103; lower it")
    for accepted in (("--k", "102"), ("--k", "103", "--enabled", "false")):
        assert main(["probe", *arguments, *accepted]) == 2
        assert "k: " not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--config", "missing.yaml"), "--config: expected a YAML file, got 'missing.yaml'"),
        (
            ("--config", "twice.yaml"),
            "expected a YAML file, got 'twice.yaml' (alpha is in lines 1 and 3); correct the path or the file",
        ),
        (("--config", "one_line.yaml"), "got 'one_line.yaml' (alpha is in lines 1 and 1)"),
        (("--config", "recipe.yaml", "--alpha", "7"), "alpha: expected a number in [0, 1], got 7.0"),
        (
            ("--config", "recipe.yaml", "--dataset", "no.jsonl"),
            "expected a file or a hub id, got 'no.jsonl'",
        ),
        (
            ("--config", "recipe.yaml", "--dataset", "rewards.py"),
            "dataset: expected a file that ends in .json",
        ),
        (("--config", "recipe.yaml", "--reward_funcs", "rewards.py:jud"), "got 'jud'; it has check, judge"),
        (
            ("--config", "recipe.yaml", "--reward_funcs", "no.py:judge"),
            "expected a file, got 'no.py'",
        ),
        (("--config", "recipe.yaml", "--reward_funcs", "no_such:judge"), "expected a module, got 'no_such'"),
        (
            ("--config", "recipe.yaml", "--reward_funcs", "judge"),
            "expected file.py:name or module:name",
        ),
        (("--config", "recipe.yaml", "--preset", "fast"), "preset: expected one of"),
        (
            ("--config", "recipe.yaml", "--frobnicate", "3"),
            "got --frobnicate 3; sdpo train --help lists them",
        ),
        (
            ("--config", "recipe.yaml", "--num_generations", "3"),
            "num_generations: expected a divisor of 8, the completions of a generation batch, got 3; set 2, 4 or 8",
        ),
        (
            ("--config", "recipe.yaml", "--num_generations", "3", "--per_device_train_batch_size", "1"),
            "expected a divisor of 1, the completions of a generation batch, got 3; raise per_device_train",
        ),
        (("--config", "recipe.yaml", "--aplha=0.5"), "got --aplha=0.5; write alpha for aplha"),
        (("--config", "recipe.yaml", "--beta", "0.1", *ON_CPU), "beta"),
        (("--config", "wrong.yaml"), "wrong.yaml: expected fields of GRPOConfig, ModelConfig, SDPOConfig"),
        (("--config", "bytes.yaml"), "--config: expected a YAML file, got 'bytes.yaml'"),
        (("--config", "open.yaml"), "correct the path or the file"),
        (
            ("--config", "number.yaml"),
            "expected fields of GRPOConfig, ModelConfig, SDPOConfig or of the run, got 3",
        ),
        (("--config", "text.yaml"), "write reward_funcs: [rewards.py:judge] in the recipe"),
        (
            ("--config", "recipe.yaml", "--dataset", "broken.jsonl"),
            "got 'broken.jsonl', which cannot be read",
        ),
        (("--config", "recipe.yaml", "--dataset", "empty.jsonl"), "got the empty file 'empty.jsonl'"),
        (
            ("--config", "recipe.yaml", "--dataset", "no/such"),
            "dataset: expected a hub id with the split 'train'",
        ),
        (("--config", "wrong.yaml"), "got aplha; write alpha for aplha"),
        (("--config", "list.yaml"), "--config: expected a mapping in list.yaml, got list"),
        (("--model_name_or_path", "x"), "dataset: expected a hub id or a file, got nothing"),
        ((), "model_name_or_path: expected a hub id or a folder, got nothing"),
        (
            ("--config", "no_rewards.yaml"),
            "reward_funcs: expected at least one reward function, or a train_dataset with a column 'feedback'",
        ),
        (
            ("--config", "recipe.yaml", "--model_name_or_path", "./no_model"),
            "model_name_or_path: expected a hub id or a folder, got './no_model', which is no folder",
        ),
    ],
)
def test_a_mistake_ends_with_one_line_and_the_fix(
    project: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    (project / "wrong.yaml").write_text("aplha: 0.5\n")
    (project / "one_line.yaml").write_text("{alpha: 0.5, alpha: 0.9}\n")
    (project / "twice.yaml").write_text("alpha: 0.5\nk: 20\nalpha: 0.9\n")
    (project / "list.yaml").write_text("- 1\n")
    recipe_lines = (project / "recipe.yaml").read_text().splitlines(keepends=True)
    kept = [line for line in recipe_lines if not line.startswith(("reward_funcs:", "- rewards.py:"))]
    (project / "no_rewards.yaml").write_text("".join(kept))
    (project / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    (project / "open.yaml").write_text("alpha: [\n k: 1\n")
    (project / "number.yaml").write_text("3: 4\n")
    (project / "text.yaml").write_text("reward_funcs: rewards.py:judge\n")
    (project / "broken.jsonl").write_text('{"prompt":\n{{')
    (project / "empty.jsonl").write_text("")
    device = () if ON_CPU[0] in arguments else ("--use_cpu", "true", "--bf16", "false")
    capsys.readouterr()
    assert main(["train", *arguments, *device]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("sdpo train: ")
    assert message in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--learning_rate", "abc"), "sdpo train: argument --learning_rate"),
        (("preview", "--num_generations", "1.5"), "sdpo preview: argument --num_generations"),
        (("probe", "--alpha"), "sdpo probe: argument --alpha: expected one argument"),
        (("probe", "--batches"), "sdpo probe: argument --batches: expected one argument"),
        (("train", "--config"), "sdpo train: argument --config: expected one argument"),
        (("report",), "sdpo report: the following arguments are required: RUN_DIR"),
        (("init", "a", "b"), "sdpo init: unrecognized arguments: b"),
        (("doctor", "--loud"), "sdpo doctor: unrecognized arguments: --loud"),
        (("trian",), "sdpo: argument command: invalid choice: 'trian'"),
    ],
)
def test_an_argument_that_cannot_be_parsed_ends_with_one_line_and_no_usage(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith(message)
    assert line.endswith("; correct it, or see --help")
    assert not printed.out


def test_a_wrong_type_in_a_process_of_its_own_prints_one_line(tmp_path: Path) -> None:
    done = sdpo("train", "--learning_rate", "abc", folder=tmp_path)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "learning_rate" in line]
    assert line.endswith("invalid float value: 'abc'; correct it, or see --help")
    assert "usage" not in done.stderr + done.stdout


def test_a_recipe_needs_no_reward_function_where_the_rows_have_solutions(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe of docs/references.md."""
    page = (ROOT / "docs" / "references.md").read_text()
    values = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])
    assert values["preset"] == "opsd"
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{row} + 1 = ", "feedback": f"{row + 1}"} for row in range(16)]
    Path(values["dataset"]).write_text("\n".join(map(json.dumps, rows)))
    values |= {"model_name_or_path": str(model_folder), "max_completion_length": 4}
    values |= {"max_steps": 1, "logging_steps": 1}
    Path("recipe.yaml").write_text(yaml.safe_dump(values))
    assert main(["train", "--config", "recipe.yaml", "--quiet", *ON_CPU]) == 0
    entries = list(map(json.loads, Path("output/sdpo_log.jsonl").read_text().splitlines()))
    used = [entry.get("self_distillation/feedback_used_fraction") for entry in entries]
    assert used.count(1.0) == 1
    assert not any("reward" in entry for entry in entries)
    assert json.loads(Path("output/sdpo_config.json").read_text())["options"]["entry_clip"] == 0.05


def test_the_reward_to_start_from_tells_a_wrong_number_from_a_mark_after_it(project: Path) -> None:
    judge = recipe.load_object("rewards.py:judge", "reward_funcs")
    replies = ("It is 32", "It is **32**.", "It is 42", "")
    verdicts = judge([[{"role": "assistant", "content": reply}] for reply in replies], ["32"] * 4)
    assert verdicts[0] == (1.0, None)
    assert verdicts[1] == (
        0.0, "The number is right, but the last word was '**32**.'; end with the digits alone.",
    )  # fmt: skip
    assert verdicts[2] == (0.0, "The last word was '42'; the sum of the two numbers ends in 2.")
    assert verdicts[3] == (0.0, "The last word was ''; the sum of the two numbers ends in 2.")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_machine_without_a_gpu_is_told_both_options(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["train", "--config", "recipe.yaml"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.endswith("; without a GPU add --use_cpu true --bf16 false")


def test_options_over_the_file_over_the_preset_over_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("preset: rich_feedback\nk: 7\nlearning_rate: 3.0e-6\nuse_cpu: true\nbf16: false\n")
    parsed = recipe.parse(["--config", str(path), "--learning_rate", "2e-6"])
    assert (parsed.sdpo.alpha, parsed.sdpo.teacher_update_rate, parsed.sdpo.k) == (1.0, 0.01, 7)
    assert (parsed.training.learning_rate, parsed.training.num_generations) == (2e-6, 8)
    parsed = recipe.parse([f"--config={path}", "--preset", "generalization", "--k", "9"])
    assert (parsed.sdpo.alpha, parsed.sdpo.k, parsed.sdpo.include_environment_feedback) == (0.5, 9, False)
    assert parsed.sdpo.teacher_rate_samples == 256
    batch = "per_device_train_batch_size: 16\nuse_cpu: true\nbf16: false\n"
    path.write_text("preset: test_time\n" + batch)
    assert recipe.parse(["--config", str(path)]).sdpo.teacher_rate_samples == 16
    path.write_text("preset: test_time\nteacher_rate_samples: null\n" + batch)
    assert recipe.parse(["--config", str(path)]).sdpo.teacher_rate_samples is None


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "parquet"])
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # a file that datasets leaves open
def test_local_files_are_read_by_their_ending(tmp_path: Path, ending: str) -> None:
    import datasets

    rows = datasets.Dataset.from_list([{"prompt": "a", "answer": "b"}] * 3)
    path = tmp_path / f"rows.{ending}"
    if ending == "parquet":
        rows.to_parquet(str(path))
    else:
        lines = {"json": json.dumps(rows.to_list()), "csv": "prompt,answer\n" + "a,b\n" * 3}
        path.write_text(lines.get(ending, '{"prompt": "a", "answer": "b"}\n' * 3))
    assert recipe.load_rows(str(path), "train").to_list() == rows.to_list()


def test_objects_are_found_in_files_and_modules(tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("VALUE = 3\n")
    (tmp_path / "mine.py").write_text("from neighbour import VALUE\n\ndef judge():\n    return VALUE\n")
    assert recipe.load_object(f"{tmp_path}/mine.py:judge", "reward_funcs")() == 3
    assert recipe.load_object("json:dumps", "reward_funcs") is json.dumps
    assert recipe.load_object("json.dumps", "reward_funcs") is json.dumps
    with pytest.raises(UserError, match="reward_funcs: expected a name of json, got 'nope'"):
        recipe.load_object("json:nope", "reward_funcs")


def test_init_overwrites_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rewards.py").write_text("mine")
    assert main(["init", str(tmp_path)]) == 2
    assert "expected a folder without rewards.py" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["rewards.py"]
    assert (tmp_path / "rewards.py").read_text() == "mine"


def test_init_needs_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["init", str(tmp_path / "file")]) == 2
    assert "init: expected a folder that can be written, got" in capsys.readouterr().err


def test_doctor_finds_this_installation_sound(capsys: pytest.CaptureFixture[str]) -> None:
    done = sdpo("doctor", folder=ROOT)
    assert done.returncode == 0, done.stdout
    assert "torch" in done.stdout
    assert "problem" not in done.stdout
    assert sdpo("doctor", "--quiet", folder=ROOT).stdout == ""


def test_doctor_names_what_is_wrong_and_the_fix(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: "1.2.0" if name == "trl" else real(name))
    problems = [check for check in doctor.packages() if check.status == doctor.PROBLEM]
    assert [check.text.split(" is outside")[0] for check in problems] == ["trl 1.2.0"]
    assert problems[0].fix.startswith('pip install "trl')
    monkeypatch.setattr(doctor, "expectations", lambda: iter(()))
    assert main(["doctor"]) == 1
    assert "problem trl 1.2.0" in capsys.readouterr().out


@pytest.mark.parametrize(("release", "taken"), [("0.31.0", True), ("99.0", False)])
def test_doctor_finds_a_vllm_that_trl_does_not_support(
    monkeypatch: pytest.MonkeyPatch, release: str, taken: bool
) -> None:
    monkeypatch.setattr(doctor, "_has", lambda package: package in ("vllm", "trl"))
    monkeypatch.setattr(import_utils, "_is_package_available", lambda *_, **__: (True, release))
    problems = [check for check in doctor.conflicts() if check.status == doctor.PROBLEM]
    assert not problems if taken else [check.fix for check in problems] == ['pip install "trl[vllm]"']
    assert taken or "You have version 99.0" in problems[0].text


def test_doctor_finds_a_folder_that_looks_like_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL finds a package without a release, and its import ends with packaging's error."""
    monkeypatch.setattr(doctor, "_has", lambda package: package in ("vllm", "trl"))
    monkeypatch.setattr(import_utils, "_is_package_available", lambda *_, **__: (True, "N/A"))
    (problem,) = (check for check in doctor.conflicts() if check.status == doctor.PROBLEM)
    assert problem == (
        doctor.PROBLEM,
        "vllm: Invalid version: 'N/A'",
        'pip install "trl[vllm]", or remove the folder vllm',
    )


def test_doctor_without_a_torch_that_works_shows_what_else_it_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(doctor, "expectations", lambda: iter(()))
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("ok      python ")
    assert "\nproblem torch cannot be imported: " in printed


def test_doctor_shows_what_it_found_before_an_error_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> Iterator[doctor.Check]:
        raise AttributeError("of no package that is missing")
        yield

    monkeypatch.setattr(doctor, "expectations", broken)
    with pytest.raises(AttributeError):
        main(["doctor"])
    assert "ok      python " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError("libcudart.so.12: no such file"), "libcudart.so.12: no such file (OSError in test_cli)"),
        (RuntimeError("while importing"), "cannot import name 'x' (ImportError in test_cli)"),
        (ModuleNotFoundError("No module named 'vllm.utils'"), "No module named 'vllm.utils'"),
    ],
)
def test_doctor_names_the_module_that_trl_cannot_import(
    monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def check() -> Any:
        if not isinstance(error, RuntimeError):
            raise error
        # As transformers and TRL wrap what a module raises that they import when it is used.
        try:
            raise ImportError("cannot import name 'x'")
        except ImportError as cause:
            raise error from cause

    monkeypatch.setattr(upgrade_check, "check_installation", check)
    (problem,) = doctor.expectations()
    assert problem.status == doctor.PROBLEM
    assert problem.text.endswith(f"has no GRPOTrainer here: {words}")


def test_without_a_command_the_help_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in ("train", "preview", "init", "doctor"))
    assert all(f"  {name} " in printed for name in ("train", "probe", "init", "doctor"))
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "sdpo 0.1.0, sdpo_rl 0.1.0\n"
    assert main(["frobnicate"]) == 2


@pytest.mark.parametrize(
    ("text", "asked"),
    [("unsloth: true", True), ("unsloth: 'true'", True), ("unsloth: 'no'", False), ("k: 20", False)],
)
def test_a_quoted_value_of_unsloth_means_the_same(tmp_path: Path, text: str, asked: bool) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    assert unsloth._asked(["--config", str(tmp_path / "recipe.yaml")]) == asked


def test_ctrl_c_ends_a_command_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(arguments: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "run", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "sdpo doctor: interrupted\n"
    monkeypatch.setattr(importlib.import_module("sdpo_rl.cli.train"), "run", interrupted)
    assert main(["train"]) == 130
    said = capsys.readouterr().err
    assert said.startswith(
        "sdpo train: interrupted; with --resume_from_checkpoint true the same command continues"
    )
    assert said.count("\n") == 1


def test_a_closed_output_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def closed(arguments: Any) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(doctor, "run", closed)
    with (tmp_path / "output").open("w") as target:
        monkeypatch.setattr(sys, "stdout", target)
        assert main(["doctor"]) == 0
