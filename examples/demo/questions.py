"""The questions of docs/results.md on the embedded task: several settings of the demo, from the same seeds.

    python examples/demo/questions.py --question alpha --seeds 0 1 2

Each run trains the demo's checkpoint as `run.py` does, with one arm of a question, and writes one record. Runs that
have a record are not repeated, so the command can be stopped and started again, and several seeds can run at once,
each as a process of its own. The four arms of the demo itself are in `record.json`; an arm that several questions
have runs once. `results.py` makes the tables and figures of the documentation from the records.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import run as demo
import torch
import transformers
import trl
from language import load_tokenizer
from machine import changed_machine
from pretrain import cross_entropy
from transformers import Qwen2ForCausalLM

import sdpo_rl

# The demo's own `run` and `probe` stay the first of their names.
sys.path.append(str(Path(__file__).resolve().parents[1] / "private_api"))

from record import write

HERE = Path(__file__).parent
RECORDS = HERE / "records"
SAMPLES = 5120  # of a run, as in the demo
POINTS = 10  # evaluations after the first one
DEMO, GRPO = demo.ARMS[0], demo.ARMS[-1]
SUPERVISED = "supervised"


class Question(NamedTuple):
    """The arms that a question compares."""

    arms: tuple[demo.Arm, ...]
    length: int = 1  # samples of its runs, as a multiple of SAMPLES


def _sdpo(name: str, prompts: int = demo.PROMPTS, *, decay: bool = False, **changes: Any) -> demo.Arm:
    return demo.Arm(name, DEMO.learning_rate, changes=changes, prompts=prompts, decay=decay)


def _collapsing(cure: str, **changes: Any) -> demo.Arm:
    return _sdpo(f"collapsing + {cure}", **{"alpha": 0.0, **changes})


# The preset `long_run` beside its α and a learning rate that falls.
_LONG_RUN: dict[str, Any] = {"teacher_rate_samples": 256, "grpo_weight": 0.5, "grpo_weight_final": 1.0}
_SRPO: dict[str, Any] = {
    "routing": "srpo",
    "loss_aggregation": "batch-token-mean",
    "token_weights": "confidence",
}

QUESTIONS: dict[str, Question] = {
    # Does SDPO learn what GRPO cannot? Supervised steps on the right answers are for comparison.
    "learns": Question((*demo.ARMS, demo.Arm(SUPERVISED, DEMO.learning_rate))),
    "alpha": Question(tuple(_sdpo(f"α={alpha:g}", alpha=alpha) for alpha in (0.0, 0.1, 0.5, 1.0))),
    # Each remedy alone on a setting that collapses.
    "cures": Question(
        (
            _sdpo("collapsing", alpha=0.0),
            _collapsing("rate 0.01", teacher_update_rate=0.01),
            demo.Arm("collapsing + lr 0.0003", 3e-4, changes={"alpha": 0.0}),
            _collapsing("batch-token-mean", loss_aggregation="batch-token-mean"),
            _collapsing("SRPO", **_SRPO),
            _collapsing("hybrid λ=0.5", grpo_weight=0.5),
            _collapsing("trust region", teacher_mode="trust_region"),
            # As old on average as the moving average, which is 1 / rate batches.
            _collapsing("teacher restart", teacher_mode="frozen", teacher_restart_every=40),
            _collapsing("anchor 0.1", anchor_weight=0.1),
            _collapsing("α=0.5", alpha=0.5),
        )
    ),
    # Is it the teacher's rate, and does the rate belong to samples? .185 per 256 is as fast as .05 per 64.
    "rate": Question(
        tuple(
            _sdpo(
                f"α={alpha:g}, rate {rate:g} per {samples}",
                samples // demo.GROUP,
                alpha=alpha,
                teacher_update_rate=rate,
            )
            for samples, alpha, rates in (
                (64, 0.5, (0.0, 0.0025, 0.01, 0.05, 1.0)),
                (64, 0.0, (0.0, 0.01, 0.05)),
                (256, 0.0, (0.05, 0.185)),
            )
            for rate in rates
        )
    ),
    "support": Question(
        (
            _sdpo("K=5", k=5),
            _sdpo("K=20", k=20),
            _sdpo("K=5, no tail", k=5, tail="renormalize"),
            _sdpo("full vocabulary", support="full"),
        )
    ),
    "lasting": Question(
        (
            DEMO,
            _sdpo("SDPO, rate per 256 samples", teacher_rate_samples=256),
            _sdpo("SDPO, hybrid λ=0.5", grpo_weight=0.5),
            _sdpo("SDPO, hybrid λ=0.5, rate per 256 samples", grpo_weight=0.5, teacher_rate_samples=256),
            _sdpo("SDPO + long_run", **_LONG_RUN, decay=True),
            _sdpo("SDPO + long_run, no decay", **_LONG_RUN),
            _sdpo("SDPO + long_run, no GRPO", teacher_rate_samples=256, decay=True),
            _sdpo("SDPO + long_run, λ=0.5", **{**_LONG_RUN, "grpo_weight_final": None}, decay=True),
            _collapsing("long_run", **_LONG_RUN, decay=True),
            _collapsing("long_run, no GRPO", teacher_rate_samples=256, decay=True),
            _collapsing("long_run, λ=0.5", **{**_LONG_RUN, "grpo_weight_final": None}, decay=True),
            _sdpo("SDPO, frozen teacher", teacher_mode="frozen"),
            _sdpo("SDPO, trust region", teacher_mode="trust_region"),
            _collapsing("SRPO", **_SRPO),
            GRPO,
        ),
        length=5,
    ),
}


def recorded_as(question: str, arm: demo.Arm) -> tuple[str, demo.Arm]:
    """The question and the arm that an arm is recorded as: the first with the same settings and length.

    Examples:
        >>> recorded_as("support", QUESTIONS["support"].arms[1])[1].name
        'SDPO'
    """
    length = QUESTIONS[question].length
    for other, (arms, its_length) in QUESTIONS.items():
        for candidate in arms:
            if its_length == length and _identity(candidate) == _identity(arm):
                return other, candidate
    raise ValueError(f"arm: expected an arm of QUESTIONS, got {arm.name!r}; add it to one of them")


def _identity(arm: demo.Arm) -> tuple[Any, ...]:
    """What makes two arms the same run, whatever they are called."""
    settings = {} if arm.name == SUPERVISED else {**demo.SETTINGS, **arm.changes}
    return arm.name == SUPERVISED, arm.learning_rate, arm.decay, arm.reward, arm.prompts, settings


def record_path(folder: Path, question: str, arm: demo.Arm, seed: int) -> Path:
    """Where the record of a run is, by the question and the arm that it is recorded as."""
    question, arm = recorded_as(question, arm)
    name = re.sub(r"[^\w.=]+", "-", f"{question} {arm.name} {seed}")
    return folder / f"{name}.json"


def supervise(arm: demo.Arm, seed: int, steps: int, every: int) -> dict[str, Any]:
    """Train on the right answers to the prompts of the other arms, in as many steps; returns curves.

    The loss is that of `pretrain.py`: cross-entropy, in which tokens of the prompt count half.
    """
    machine = changed_machine(seed)
    tokenizer = load_tokenizer(demo.CHECKPOINT)
    model = Qwen2ForCausalLM.from_pretrained(demo.CHECKPOINT, dtype=torch.float32)
    watch = demo.Watch(arm, steps, every, lambda: demo.score(model, tokenizer, machine))
    optimizer = torch.optim.AdamW(model.parameters(), lr=arm.learning_rate, weight_decay=0.01)
    rows = demo.training_prompts(machine, seed, steps * arm.prompts)
    documents = [(row["prompt"][0]["content"], row["answer"]) for row in rows]
    watch.on_train_begin()
    for step in range(1, steps + 1):
        batch = documents[(step - 1) * arm.prompts : step * arm.prompts]
        loss, weight = cross_entropy(model, tokenizer, batch)
        (loss / weight).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        watch.on_step_end(None, transformers.TrainerState(global_step=step, max_steps=steps))
    watch.on_train_end()
    return {"samples": watch.samples, "probability": watch.probability, "greedy": watch.greedy}


def run_arm(question: str, arm: demo.Arm, seed: int, samples: int) -> dict[str, Any]:
    """Train with one arm; the record of the run."""
    steps = max(1, samples * QUESTIONS[question].length // arm.samples)
    train = supervise if arm.name == SUPERVISED else demo.learn
    start = time.process_time()
    found = train(arm, seed, steps, max(1, steps // POINTS))
    return {
        **described(question, arm, seed),
        "samples": steps * arm.samples,
        "complete": True,
        "cpu_seconds": round(time.process_time() - start, 1),
        "device": processor(),
        "python": platform.python_version(),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, trl, sdpo_rl)},
        "points": points(found),
    }


def described(question: str, arm: demo.Arm, seed: int) -> dict[str, Any]:
    """What a record says about its arm."""
    enabled = arm.name != SUPERVISED and arm.changes.get("enabled", True)
    return {
        "question": question,
        "arm": arm.name,
        "seed": seed,
        "learning_rate": arm.learning_rate,
        "samples_per_step": arm.samples,
        "settings": {**demo.SETTINGS, **arm.changes} if enabled else {},
        **({"decay": True} if arm.decay else {}),
    }


def points(found: dict[str, Any]) -> list[list[float]]:
    """Samples, probability and greedy accuracy of each evaluation, rounded."""
    rows = zip(found["samples"], found["probability"], found["greedy"], strict=True)
    return [[samples, float(f"{p:.4g}"), round(accuracy, 4)] for samples, p, accuracy in rows]


def processor() -> str:
    """The name of the processor, where the system says it."""
    known = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", known.read_text()) if known.exists() else []
    return names[0] if names else platform.machine()


def demo_runs() -> list[dict[str, Any]]:
    """The runs of `make demo` in `record.json`, as records, with the evaluations that other runs have."""
    known = json.loads((HERE / "record.json").read_text())
    arms = {arm.name: arm for arm in demo.ARMS}
    return [
        {
            **described("learns", arms[run["arm"]], run["seed"]),
            "samples": SAMPLES,
            "complete": True,
            "python": known["python"],
            "versions": known["versions"],
            "points": [point for point in points(run) if point[0] % (SAMPLES // POINTS) == 0],
        }
        for run in known["runs"]
    ]


def todo(
    questions: Sequence[str], seeds: Sequence[int], folder: Path
) -> dict[Path, tuple[str, demo.Arm, int]]:
    """The runs without a record, each once, by the path of their record."""
    arms = {arm.name: arm for arm in demo.ARMS}
    known = {record_path(folder, "learns", arms[run["arm"]], run["seed"]) for run in demo_runs()}
    found: dict[Path, tuple[str, demo.Arm, int]] = {}
    for question in questions:
        for arm in QUESTIONS[question].arms:
            for seed in seeds:
                path = record_path(folder, question, arm, seed)
                if path not in known and not path.exists():
                    found.setdefault(path, (*recorded_as(question, arm), seed))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Settings of the demo, from the same seeds.")
    parser.add_argument("--question", nargs="+", choices=QUESTIONS, default=list(QUESTIONS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=SAMPLES, help="completions of a run")
    parser.add_argument("--output", type=Path, default=RECORDS, help="a folder for the records")
    options = parser.parse_args()
    demo.prepare()
    for path, (question, arm, seed) in todo(options.question, options.seeds, options.output).items():
        if not path.exists():  # another process may have made it since
            write(path, run_arm(question, arm, seed, options.samples))


if __name__ == "__main__":
    main()
