"""A pretrained model learns a private API from its error messages: several arms and seeds, and a report.

    python examples/private_api/run.py --model Qwen/Qwen2.5-Coder-0.5B-Instruct        # or: make demo-llm MODEL=...
    python examples/private_api/run.py --model FOLDER --question rate --seeds 0 1 2 --jobs 4

`--model` is a hub id or a folder; Qwen2.5-Coder-0.5B-Instruct and SmolLM2-135M-Instruct were tried. Each run is a
process of `train.py`; `--jobs` of them share the device. Runs whose record exists are not repeated, so the command
can be stopped and started again.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from arms import QUESTIONS, Arm, arms
from report import summary, write_report

TRAIN = Path(__file__).with_name("train.py")


def record_path(folder: Path, task: str, question: str, arm: Arm, seed: int) -> Path:
    """Where the record of a run is written."""
    name = re.sub(r"[^\w.=]+", "-", f"{task} {question} {arm.name} {seed}").strip("-")
    return folder / "records" / f"{name}.json"


def run_one(path: Path, arguments: list[str]) -> str | None:
    """Run `train.py` unless its record exists; returns the end of its output if it failed."""
    if path.exists():
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    log = path.with_suffix(".log")
    with log.open("w") as file:
        done = subprocess.run(
            [sys.executable, str(TRAIN), *arguments, "--output", str(path)],
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        )
    return None if done.returncode == 0 else log.read_text()[-2000:]


def main() -> int:
    parser = argparse.ArgumentParser(description="Several arms and seeds on the private API, and a report.")
    parser.add_argument("--model", required=True, help="a hub id, or a folder")
    parser.add_argument("--task", choices=("kit", "house_style"), default="kit")
    parser.add_argument("--question", choices=QUESTIONS, default="learns")
    parser.add_argument("--arms", nargs="+", help="some of the question's arms; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--samples", type=int, default=9600, help="completions a run draws")
    parser.add_argument("--points", type=int, default=30, help="evaluations of a run")
    parser.add_argument("--jobs", type=int, default=1, help="runs that share the device")
    parser.add_argument("--output", type=Path, default=Path("output/private_api"))
    options = parser.parse_args()
    if not options.model:
        parser.error("--model: expected a hub id or a folder, got nothing: make demo-llm MODEL=...")
    chosen = [arm for arm in arms(options.question) if options.arms is None or arm.name in options.arms]
    if options.arms is not None and len(chosen) < len(options.arms):
        names = ", ".join(arm.name for arm in arms(options.question))
        parser.error(f"--arms: expected some of {names}; got {', '.join(options.arms)}")

    paths = []
    with ThreadPoolExecutor(options.jobs) as pool:
        running = []
        for seed in options.seeds:
            for arm in chosen:
                paths.append(record_path(options.output, options.task, options.question, arm, seed))
                arguments = [
                    *("--model", options.model, "--task", options.task),
                    *("--question", options.question, "--arm", arm.name, "--seed", str(seed)),
                    *("--samples", str(options.samples), "--points", str(options.points)),
                ]
                running.append((f"{arm.name}, seed {seed}", pool.submit(run_one, paths[-1], arguments)))
        failures = 0
        for name, job in running:
            error = job.result()
            failures += error is not None
            print(f"{name}: {'done' if error is None else 'failed'}", flush=True)
            if error is not None:
                print(error, file=sys.stderr)
    runs = [json.loads(path.read_text()) for path in paths if path.exists()]
    if runs:
        print("\n" + summary(runs))
        print(f"\n{write_report(runs, options.output)}")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
