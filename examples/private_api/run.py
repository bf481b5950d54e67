"""A pretrained model learns a private API from its error messages: several arms and seeds, and a report.

    python examples/private_api/run.py --model Qwen/Qwen2.5-Coder-0.5B-Instruct        # or: make demo-llm MODEL=...
    python examples/private_api/run.py --model FOLDER --question rate cures --seeds 0 1 2 --devices 0 1 --jobs 4

`--model` is a hub id or a folder; Qwen2.5-Coder-0.5B-Instruct and SmolLM2-135M-Instruct were tried. Each run of
`train.py` is a process; `--jobs` of them share a device. An arm that several questions have runs once. Runs whose
record is complete are not repeated, so the command can be stopped and started again. Records of another model or of
another number of samples are refused: each needs an `--output` of its own.

Seeds 100, 101, … are for choosing settings (GRPO's learning rate, the best arm), seeds 0, 1, 2 for what is shown: a
setting that was chosen by the seeds that it is shown with looks better than it is.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from arms import FIRST_SEED_FOR_CHOOSING, QUESTIONS, SAMPLING, Arm, arms, recorded_as
from curves import model_name, summary
from jobs import Job, check_records, read, run_all
from report import write_report
from tasks import TASKS


def record_path(folder: Path, task: str, question: str, arm: Arm, seed: int) -> Path:
    """Where the record of a run is written, by the question and the arm that it is recorded as."""
    name = re.sub(r"[^\w.=]+", "-", f"{task} {question} {arm.name} {seed}").strip("-")
    return folder / "records" / f"{name}.json"


def jobs(options: argparse.Namespace) -> list[Job]:
    """The runs to make, each once."""
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
            expected = {"model": model_name(options.model), "samples": options.samples * arm.length}
            found.setdefault(path, Job(arm.name, seed, path, given, arm.length, arm.memory, expected))
    return list(found.values())


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
            if (record := read(path)) is not None:
                runs.append({**record, "arm": arm.name})
    if runs:
        print(f"\n{question}\n{summary(runs)}")
        folder = options.output / re.sub(r"\W+", "-", f"{options.task} {question}")
        print(write_report(runs, folder))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Several arms and seeds on the private API, and a report of each question."
    )
    parser.add_argument("--model", required=True, help="a hub id, or a folder")
    parser.add_argument("--task", choices=TASKS, default="kit")
    parser.add_argument("--question", choices=QUESTIONS, nargs="+", default=["learns"])
    parser.add_argument("--arms", nargs="+", help="some of the questions' arms; default: all")
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0],
        help=f"0, 1, 2 for results; from {FIRST_SEED_FOR_CHOOSING} on for choosing settings, which no result shows",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=9600,
        help='completions a run draws; those of "lasting", "lasting settings", "large batches" 5 times as many',
    )
    parser.add_argument("--points", type=int, default=30, help="evaluations of a run")
    parser.add_argument(
        "--jobs",
        type=int,
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
    parser.add_argument("--output", type=Path, default=Path("output/private_api"))
    options = parser.parse_args()
    if not options.model:
        parser.error("--model: expected a hub id or a folder, got nothing: make demo-llm MODEL=...")
    names = [arm.name for question in options.question for arm in arms(question)]
    for option, given in (("--arms", options.arms or []), ("--every-step", options.every_step)):
        if unknown := [name for name in given if name not in names]:
            parser.error(f"{option}: expected some of {', '.join(names)}; got {', '.join(unknown)}")
    return options


def main() -> int:
    options = arguments()
    todo = jobs(options)
    try:
        check_records(todo)
    except ValueError as error:
        raise SystemExit(f"run.py: {error}") from None
    # Imports ask whether there is a GPU. This answer leaves CUDA alone, so that the runs can be forks.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    from train import main as train

    failures = run_all(
        todo,
        train,
        devices=options.devices or [None],
        per_device=options.jobs,
        minutes=options.minutes,
    )
    for question in options.question:
        report(question, options)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
