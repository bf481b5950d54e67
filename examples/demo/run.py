"""SDPO against GRPO on a shifted task: a language model learns from an interpreter's feedback, not only its score.

    python examples/demo/run.py --seeds 1 --output output/demo     # or: make demo

The checkpoint was trained on one machine, the habit. Now six of its eight opcodes mean something else, and no
prompt says so. Nearly all of its answers are wrong: the score is 0, and the interpreter returns one line, such as
"line 2: expected C524 got C685". Four arms train the checkpoint on the same prompts with the same trainer:

* SDPO: the teacher's prompt has the interpreter's line and a successful completion of a peer;
* SDPO, peers only: the teacher's prompt has successful completions of peers, and no feedback;
* SDPO, shuffled feedback: each failure gets the line of a failure on another prompt;
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

# bitsandbytes, which peft imports if it is installed, warns about 4-bit kernels that nothing here uses.
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


# --- The environment: a score and a feedback text for every completion -----------------------------------------


def interpreter(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[Verdict]:
    """A reward function with feedback: one `(score, feedback)` pair per completion."""
    return [interpret(turns[0]["content"], right) for turns, right in zip(completions, answer, strict=True)]


def shuffling_interpreter(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[Verdict]:
    """The control: the same scores, but a failure gets the feedback of a failure one group later."""
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
    """One method: its learning rate, its reward function, its changes to `sdpo_config` and its batch."""

    name: str
    learning_rate: float
    reward: Callable[..., list[Verdict]] = interpreter
    changes: dict[str, Any] = field(default_factory=dict)
    prompts: int = PROMPTS  # of a step
    decay: bool = False  # the learning rate falls linearly to 0; otherwise it is constant

    @property
    def samples(self) -> int:
        """Completions of a step."""
        return self.prompts * GROUP


# Learning rates: the best of 3e-4, 5e-4 and 7e-4 for each over three seeds; the control has that of SDPO.
ARMS = (
    Arm("SDPO", 7e-4),
    Arm("SDPO, peers only", 3e-4, changes={"include_environment_feedback": False}),
    Arm("SDPO, shuffled feedback", 7e-4, reward=shuffling_interpreter),
    Arm("GRPO", 3e-4, changes={"enabled": False}),
)


# The settings of every arm that says nothing else.
SETTINGS: dict[str, Any] = {"alpha": 0.5, "k": 20, "teacher_update_rate": 0.05}


def sdpo_config(arm: Arm) -> SDPOConfig:
    """The settings of all arms, with the templates that the checkpoint was trained on, and the arm's changes."""
    settings = {
        **SETTINGS,
        "teacher_rate_samples": None,  # the rates of the arms are those of one update
        "environment_feedback_only_without_solution": False,
        "reprompt_template": TEMPLATES.reprompt,
        "solution_template": TEMPLATES.solution,
        "feedback_template": TEMPLATES.feedback,
    }
    return SDPOConfig(**{**settings, **arm.changes})


def grpo_config(arm: Arm, seed: int, steps: int, folder: str) -> trl.GRPOConfig:
    """One batch of new samples and one AdamW step on it, `steps` times; other options have TRL's defaults."""
    return trl.GRPOConfig(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=arm.samples,
        num_generations=GROUP,
        max_completion_length=20,
        temperature=1.0,
        learning_rate=arm.learning_rate,
        lr_scheduler_type="linear" if arm.decay else "constant",
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
    """Evaluates the model while an arm trains it, and shows one line of progress."""

    def __init__(self, arm: Arm, steps: int, every: int, score: Callable[[], tuple[float, float]]) -> None:
        self.samples: list[int] = []
        self.probability: list[float] = []
        self.greedy: list[float] = []
        self.reward: list[float] = []  # of every step
        self._batch, self._every, self._score = arm.samples, every, score
        self._bar = tqdm(
            total=steps * arm.samples,
            desc=f"{arm.name:23}",
            bar_format="{desc} {bar} {n:4d}/{total} samples{postfix}  {elapsed}",
            ncols=min(shutil.get_terminal_size().columns, 100),
        )

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """The first point of the curve, before any step."""
        self._evaluate(0)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        """Record the mean reward of the step's samples."""
        if "reward" in logs:
            self.reward.append(logs["reward"])

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Every few steps, a point of the curve."""
        if state.global_step % self._every == 0 or state.global_step == state.max_steps:
            self._evaluate(state.global_step)
        self._bar.update(self._batch)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Close the progress line."""
        self._bar.close()

    def _evaluate(self, step: int) -> None:
        probability, greedy = self._score()
        self.samples.append(step * self._batch)
        self.probability.append(probability)
        self.greedy.append(greedy)
        reward = f"{fmean(self.reward[-self._every :]):.2f}" if self.reward else "   -"
        self._bar.set_postfix_str(f"reward {reward}, held-out {probability:.2f}")


def training_prompts(machine: Machine, seed: int, count: int) -> datasets.Dataset:
    """Bare questions, each a user turn, and a column with the answer, for the interpreter only."""
    rng = random.Random(f"prompts {seed}")
    tasks = [draw_task(rng) for _ in range(count)]
    return datasets.Dataset.from_list(
        [{"prompt": [{"role": "user", "content": t.prompt}], "answer": t.answer(machine)} for t in tasks]
    )


def score(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, machine: Machine
) -> tuple[float, float]:
    """Mean probability of the right answer to a held-out question, and the share that greedy decoding finds."""
    tests = held_out_tasks()
    result = evaluate(model, tokenizer, [t.prompt for t in tests], [t.answer(machine) for t in tests])
    return result.probability.mean().item(), result.greedy.float().mean().item()


def learn(arm: Arm, seed: int, steps: int, every: int) -> dict[str, Any]:
    """Train the checkpoint with one arm on the machine of `seed`; returns curves and examples."""
    machine = changed_machine(seed)
    tokenizer = load_tokenizer(CHECKPOINT)
    model = Qwen2ForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    watch = Watch(arm, steps, every, lambda: score(model, tokenizer, machine))
    start = time.perf_counter()
    with TemporaryDirectory() as folder:
        trainer = SDPOTrainer(
            model=model,
            args=grpo_config(arm, seed, steps, folder),
            sdpo_config=sdpo_config(arm),
            processing_class=tokenizer,
            reward_funcs=[arm.reward],
            train_dataset=training_prompts(machine, seed, count=steps * arm.prompts),
            callbacks=[watch],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return {
        "arm": arm.name,
        "seed": seed,
        "seconds": round(time.perf_counter() - start, 1),
        "samples": watch.samples,
        "probability": watch.probability,
        "greedy": watch.greedy,
        "reward": watch.reward,
        "examples": examples(model, tokenizer, machine),
    }


def examples(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, machine: Machine
) -> list[dict[str, Any]]:
    """Greedy completions of three held-out questions, one of each length, whose opcodes have all changed."""
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


def prepare() -> None:
    """One thread, and no messages of the libraries."""
    torch.set_num_threads(1)  # the model is small: more threads are slower and change the order of summation
    transformers.utils.logging.set_verbosity_error()
    # The trainer warns that the teacher is faster than the paper's: batches are small, and it was chosen so.
    logging.getLogger("sdpo_rl").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def main() -> None:
    parser = argparse.ArgumentParser(description="SDPO against GRPO on a machine whose opcodes have changed.")
    parser.add_argument("--seeds", type=int, default=1, help="repeat everything over this many seeds")
    parser.add_argument("--output", type=Path, default=Path("output/demo"))
    parser.add_argument("--quick", action="store_true", help="a few steps, to check that it runs")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {options.seeds}")
    steps, every = (4, 2) if options.quick else (80, 4)

    prepare()

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
