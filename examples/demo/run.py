"""The machine changed: a language model learns from what an interpreter says, not only from its score.

    python examples/demo/run.py --seeds 1 --output output/demo

The checkpoint is sure of one machine, the habit. Six of its eight opcodes now mean something else, and no prompt
says so. Its answers are nearly always wrong, for a score of 0 and one line from the interpreter, such as
"line 2: expected C524 got C685". Four arms train from there, on the same prompts and through the same trainer:

* SDPO: a teacher, the model itself, rereads each attempt beside the interpreter's line and a successful peer;
* SDPO, peers only: the teacher sees successful peers, and never a line of feedback;
* SDPO, shuffled feedback: each failure is shown the line of a failure on another prompt;
* GRPO: scores alone (`enabled=False`).

The curves are exact, without sampling noise: the probability of the right answer on 200 held-out prompts.
`record.json` and `docs/images/demo.svg` are the `results.json` and `curves.svg` of three seeds.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

# bitsandbytes, which peft imports where it is installed, misses 4-bit kernels that nothing here uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import datasets
import torch
import transformers
import trl
from exact import complete, evaluate
from language import TEMPLATES, load_tokenizer
from machine import (
    HABIT,
    Machine,
    Verdict,
    changed_machine,
    draw_task,
    held_out_tasks,
    interpret,
    what_changed,
)
from report import summary, write_report
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM, TrainerCallback

from sdpo_rl import SDPOConfig, SDPOTrainer

CHECKPOINT = Path(__file__).parent / "checkpoint"
PROMPTS, GROUP = 16, 4  # prompts a step, completions a prompt
SAMPLES = PROMPTS * GROUP


# --- The environment: a score and a sentence for every completion ---------------------------------------------


def interpreter(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[Verdict]:
    """A reward function with feedback: one `(score, feedback)` pair per completion."""
    return [interpret(turns[0]["content"], right) for turns, right in zip(completions, answer, strict=True)]


def shuffling_interpreter(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[Verdict]:
    """The control: the same scores, but a failure gets the feedback of the failure one group further on."""
    verdicts = interpreter(completions, answer)
    failures = [row for row, verdict in enumerate(verdicts) if verdict.score == 0]
    donors = failures[GROUP:] + failures[:GROUP]
    swapped = {
        row: Verdict(0.0, verdicts[donor].feedback) for row, donor in zip(failures, donors, strict=True)
    }
    return [swapped.get(row, verdict) for row, verdict in enumerate(verdicts)]


# --- The arms --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One way to learn: its reward function, its learning rate and what it changes in `sdpo_config`."""

    name: str
    learning_rate: float
    reward: Callable[..., list[Verdict]] = interpreter
    changes: dict[str, Any] = field(default_factory=dict)


# Learning rates: the best of 3e-4, 5e-4 and 7e-4 for each over three seeds; the control keeps that of SDPO.
ARMS = (
    Arm("SDPO", 7e-4),
    Arm("SDPO, peers only", 3e-4, changes={"include_environment_feedback": False}),
    Arm("SDPO, shuffled feedback", 7e-4, reward=shuffling_interpreter),
    Arm("GRPO", 3e-4, changes={"enabled": False}),
)


def sdpo_config(arm: Arm) -> SDPOConfig:
    """What all arms share, in the words that the checkpoint can read, and the arm's own changes."""
    settings = {
        "alpha": 0.5,
        "k": 20,
        "teacher_update_rate": 0.05,
        "environment_feedback_only_without_solution": False,
        "reprompt_template": TEMPLATES.reprompt,
        "solution_template": TEMPLATES.solution,
        "feedback_template": TEMPLATES.feedback,
    }
    return SDPOConfig(**{**settings, **arm.changes})


def grpo_config(arm: Arm, seed: int, steps: int, folder: str) -> trl.GRPOConfig:
    """One batch of fresh samples and one AdamW step on it, `steps` times; everything else as TRL has it."""
    return trl.GRPOConfig(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=SAMPLES,
        num_generations=GROUP,
        max_completion_length=20,
        temperature=1.0,
        learning_rate=arm.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        max_grad_norm=1.0,
        seed=seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
    )


# --- One run ---------------------------------------------------------------------------------------------------


class Watch(TrainerCallback):
    """Evaluates exactly while the model trains, and keeps one line of progress."""

    def __init__(self, label: str, steps: int, every: int, score: Callable[[], tuple[float, float]]) -> None:
        self.samples: list[int] = []
        self.probability: list[float] = []
        self.greedy: list[float] = []
        self.reward: list[float] = []  # of every step
        self._every, self._score = every, score
        self._bar = tqdm(
            total=steps * SAMPLES,
            desc=f"{label:23}",
            bar_format="{desc} {bar} {n:4d}/{total} samples{postfix}  {elapsed}",
            ncols=min(shutil.get_terminal_size().columns, 100),
        )

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """The first point of the curve, before any step."""
        self._evaluate(0)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        """Keep the mean reward of the step's samples."""
        if "reward" in logs:
            self.reward.append(logs["reward"])

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """A point of the curve, every few steps."""
        if state.global_step % self._every == 0 or state.global_step == state.max_steps:
            self._evaluate(state.global_step)
        self._bar.update(SAMPLES)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Leave the finished line on the screen."""
        self._bar.close()

    def _evaluate(self, step: int) -> None:
        probability, greedy = self._score()
        self.samples.append(step * SAMPLES)
        self.probability.append(probability)
        self.greedy.append(greedy)
        reward = f"{fmean(self.reward[-self._every :]):.2f}" if self.reward else "   -"
        self._bar.set_postfix_str(f"reward {reward}, held-out {probability:.2f}")


def training_prompts(machine: Machine, seed: int, count: int) -> datasets.Dataset:
    """Bare questions, each in a user turn, and a column with the answer that only the interpreter reads."""
    rng = random.Random(f"prompts {seed}")
    tasks = [draw_task(rng) for _ in range(count)]
    return datasets.Dataset.from_list(
        [{"prompt": [{"role": "user", "content": t.prompt}], "answer": t.answer(machine)} for t in tasks]
    )


def learn(arm: Arm, seed: int, steps: int, every: int) -> dict[str, Any]:
    """Train the checkpoint by one arm on the machine of `seed`; the curves, and the examples after training."""
    machine = changed_machine(seed)
    tokenizer = load_tokenizer(CHECKPOINT)
    model = Qwen2ForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    tests = held_out_tasks()
    questions, answers = [t.prompt for t in tests], [t.answer(machine) for t in tests]

    def score() -> tuple[float, float]:
        result = evaluate(model, tokenizer, questions, answers)
        return result.probability.mean().item(), result.greedy.float().mean().item()

    watch = Watch(arm.name, steps, every, score)
    begun = time.perf_counter()
    with TemporaryDirectory() as folder:
        trainer = SDPOTrainer(
            model=model,
            args=grpo_config(arm, seed, steps, folder),
            sdpo_config=sdpo_config(arm),
            processing_class=tokenizer,
            reward_funcs=[arm.reward],
            train_dataset=training_prompts(machine, seed, count=steps * PROMPTS),
            callbacks=[watch],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return {
        "arm": arm.name,
        "seed": seed,
        "seconds": round(time.perf_counter() - begun, 1),
        "samples": watch.samples,
        "probability": watch.probability,
        "greedy": watch.greedy,
        "reward": watch.reward,
        "examples": examples(model, tokenizer, machine),
    }


def examples(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, machine: Machine
) -> list[dict[str, Any]]:
    """What the model writes on three held-out questions, one of each length, whose opcodes have all changed."""
    changed = {opcode for opcode in machine if machine[opcode] != HABIT[opcode]}
    by_length = {len(t.program): t for t in reversed(held_out_tasks()) if set(t.program) <= changed}
    tasks = [by_length[length] for length in sorted(by_length)]
    questions, answers = [t.prompt for t in tasks], [t.answer(machine) for t in tasks]
    probabilities = evaluate(model, tokenizer, questions, answers).probability.tolist()
    return [
        {
            "question": question,
            "answer": answer,
            "completion": complete(model, tokenizer, question),
            "probability": probability,
        }
        for question, answer, probability in zip(questions, answers, probabilities, strict=True)
    ]


# --- All runs --------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description="SDPO against GRPO on a machine that has changed.")
    parser.add_argument("--seeds", type=int, default=1, help="repeat everything over this many seeds")
    parser.add_argument("--output", type=Path, default=Path("output/demo"))
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {options.seeds}")
    steps, every = (4, 2) if options.quick else (80, 4)

    torch.set_num_threads(1)  # the model is small: more threads are slower, and they change the order of sums
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()

    runs = []
    for seed in range(options.seeds):
        print(f"seed {seed}: {what_changed(changed_machine(seed))}", flush=True)
        runs += [learn(arm, seed, steps, every) for arm in ARMS]
    untrained = Qwen2ForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    results = {
        "quick": options.quick,
        "prompts_per_step": PROMPTS,
        "completions_per_prompt": GROUP,
        "arms": {arm.name: {"learning_rate": arm.learning_rate, **arm.changes} for arm in ARMS},
        "machines": [{"seed": seed, **changed_machine(seed)} for seed in range(options.seeds)],
        "before": examples(untrained, load_tokenizer(CHECKPOINT), changed_machine(0)),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, trl)},
        "python": platform.python_version(),
        "runs": runs,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print("\n" + summary(results))
    print(f"\n{write_report(results, options.output)}")


if __name__ == "__main__":
    main()
