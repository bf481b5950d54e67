"""A pretrained model learns a private API from its error messages: several arms and seeds, and a report.

    python examples/private_api/run.py --model Qwen/Qwen2.5-Coder-0.5B-Instruct        # or: make demo-llm MODEL=...
    python examples/private_api/run.py --model FOLDER --question rate cures --seeds 0 1 2 --devices 0 1 --jobs 4

`--model` is a hub id or a folder; HuggingFaceTB/SmolLM2-135M-Instruct is another small model that it takes.
`tiny` is a random model that the program writes: it learns nothing and only shows that everything runs. Each run of
`train.py` is a process; `--jobs` of them share a device. An arm that several questions have runs once. Runs whose
record is complete are not repeated, so the command can be stopped and started again. Records of other weights,
samples, points or settings are refused: they need an `--output` of their own.

Seeds 100, 101, … are for choosing settings (GRPO's learning rate, the best arm), seeds 0, 1, 2 for what is shown: a
setting that was chosen by the seeds that it is shown with looks better than it is.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
from pathlib import Path
from typing import Any, NoReturn

from arms import FIRST_SEED_FOR_CHOOSING, QUESTIONS, SAMPLING, Arm, arms, recorded_as
from checks import cannot_be_a_folder, check_model, non_negative, positive, read_record
from curves import model_name, summary
from jobs import Job, check_records, run_all
from report import write_report
from tasks import TASKS

TINY = "tiny"  # of `--model`; ./tiny is a folder
SAMPLES, POINTS = 9600, 30
TINY_SAMPLES, TINY_POINTS = 128, 2
TERMINATED = 128 + signal.SIGTERM  # the exit code of a program that SIGTERM ended


def record_path(folder: Path, task: str, question: str, arm: Arm, seed: int) -> Path:
    """Where the record of a run is written, by the question and the arm that it is recorded as."""
    name = re.sub(r"[^\w.=]+", "-", f"{task} {question} {arm.name} {seed}").strip("-")
    return folder / "records" / f"{name}.json"


def jobs(options: argparse.Namespace) -> list[Job]:
    """The runs to make, each once."""
    weights = weights_of(options.model)
    found: dict[Path, Job] = {}
    for seed in options.seeds:
        for question, arm in chosen_arms(options):
            recorded_question, recorded_arm = recorded_as(question, arm)
            path = record_path(options.output, options.task, recorded_question, recorded_arm, seed)
            every_step = arm.name in options.every_step or recorded_arm.name in options.every_step
            given = (
                *("--model", options.model, "--task", options.task),
                *("--question", recorded_question, "--arm", recorded_arm.name, "--seed", str(seed)),
                *("--samples", str(options.samples), "--points", str(options.points)),
                *(["--every-step"] if every_step else []),
                *("--sampling", options.sampling),
                *("--output", str(path)),
            )
            expected = {
                "model": model_name(options.model),
                **({} if weights is None else {"weights_sha256": weights}),
                "samples": options.samples * arm.length,
                "points": options.points,
                **recorded_arm.recorded(),
            }
            found.setdefault(path, Job(arm.name, seed, path, given, arm.length, arm.memory, expected))
    return list(found.values())


def weights_of(model: str) -> str | None:
    """The hash of a folder's weights; `None` for a hub id, which a record has by name only."""
    if not Path(model).is_dir():
        return None
    from record import weights_hash

    return weights_hash(Path(model))


def chosen_arms(options: argparse.Namespace) -> list[tuple[str, Arm]]:
    """The arms of the questions that `--arms` picks."""
    return [
        (question, arm)
        for question in options.question
        for arm in arms(question)
        if options.arms is None or arm.name in options.arms
    ]


def report(question: str, options: argparse.Namespace) -> None:
    """Print the results of a question, and write its page."""
    runs = []
    for name, arm in chosen_arms(options):
        for seed in options.seeds if name == question else []:
            path = record_path(options.output, options.task, *recorded_as(name, arm), seed)
            if (record := read_record(path)) is not None:
                runs.append({**record, "arm": arm.name})
    if runs:
        print(f"\n{question}\n{summary(runs)}")
        folder = options.output / re.sub(r"\W+", "-", f"{options.task} {question}")
        print(write_report(runs, folder))


def command_line() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        description="Several arms and seeds on the private API, and a report of each question."
    )
    parser.add_argument("--model", required=True, help=f"a hub id, a folder, or {TINY}: a random one")
    parser.add_argument("--task", choices=TASKS, default="kit")
    parser.add_argument("--question", choices=QUESTIONS, nargs="+", default=["learns"])
    parser.add_argument("--arms", nargs="+", help="some of the questions' arms; default: all")
    parser.add_argument(
        "--seeds",
        type=non_negative,
        nargs="+",
        default=[0],
        help=f"0, 1, 2 for results; from {FIRST_SEED_FOR_CHOOSING} on for choosing settings, which no result shows",
    )
    parser.add_argument(
        "--samples",
        type=positive,
        help='completions a run draws; those of "lasting", "lasting settings", "large batches" 5 times as many; '
        f"default: {SAMPLES}, or {TINY_SAMPLES} of the model {TINY}",
    )
    parser.add_argument(
        "--points",
        type=positive,
        help=f"evaluations of a run; default: {POINTS}, or {TINY_POINTS} of the model {TINY}",
    )
    parser.add_argument(
        "--jobs",
        type=positive,
        default=1,
        help="runs that share a device; those in batches of 256, or with all logits, count as two",
    )
    parser.add_argument(
        "--devices", nargs="+", help="numbers of GPUs; default: the first one that is visible"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help="time limit: then no run starts, and those that run are stopped with what they have",
    )
    parser.add_argument(
        "--every-step",
        nargs="+",
        default=[],
        metavar="ARM",
        help="arms whose records keep the log of every step",
    )
    parser.add_argument(
        "--sampling",
        choices=SAMPLING,
        default="generate",
        help="how completions are drawn: by transformers, or with one CUDA graph a token",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help=f"default: output/private_api, or output/private_api_{TINY} of the model {TINY}",
    )
    return parser


def arguments() -> argparse.Namespace:
    """What the command line says, with the defaults of its model."""
    parser = command_line()
    options = parser.parse_args()
    if not options.model:
        parser.error(
            "--model: expected a hub id or a folder, got nothing: make demo-llm MODEL=..., or, to see that "
            f"everything runs, make demo-llm MODEL={TINY}"
        )
    is_tiny = options.model == TINY
    options.samples = options.samples or (TINY_SAMPLES if is_tiny else SAMPLES)
    options.points = options.points or (TINY_POINTS if is_tiny else POINTS)
    options.output = options.output or Path("output", f"private_api_{TINY}" if is_tiny else "private_api")
    if cannot_be_a_folder(options.output):
        parser.error(
            f"--output: expected a folder, got {str(options.output)!r}, which is a file or below one; pass "
            "another one"
        )
    names = [arm.name for question in options.question for arm in arms(question)]
    for option, given in (("--arms", options.arms or []), ("--every-step", options.every_step)):
        if unknown := [name for name in given if name not in names]:
            expected, got = (", ".join(map(repr, some)) for some in (names, unknown))
            parser.error(f"{option}: expected some of {expected}, each in quotes; got {got}")
    return options


def terminated(*_: Any) -> NoReturn:
    """End as after an interrupt, so that the runs are stopped; a second signal does not end that."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(TERMINATED)


def main() -> int:
    options = arguments()
    # Imports ask whether there is a GPU. This answer leaves CUDA alone, so that the runs can be forks.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if options.model == TINY:
        from smoke_model import save_model
        from transformers.utils import logging

        logging.disable_progress_bar()
        options.model = str(save_model(options.output / TINY))
    try:
        check_model(options.model, TASKS[options.task].held_out(1)[0].prompt)
    except ValueError as error:
        command_line().error(str(error))
    todo = jobs(options)
    try:
        check_records(todo)
    except ValueError as error:
        raise SystemExit(f"run.py: {error}") from None
    from train import main as train

    before = signal.signal(signal.SIGTERM, terminated)
    failures = run_all(
        todo,
        train,
        devices=options.devices or [None],
        per_device=options.jobs,
        minutes=options.minutes,
    )
    signal.signal(signal.SIGTERM, before)
    for question in options.question:
        report(question, options)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
