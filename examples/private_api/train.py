"""One run on the private API: a pretrained model, one arm, one seed; writes the curve and the log as JSON.

    python examples/private_api/train.py --model Qwen/Qwen2.5-Coder-0.5B-Instruct --question learns --arm SDPO \\
        --output record.json

`--model` is a hub id or a folder. About 3 GB of a GPU per 100 million parameters with full fine-tuning (float32
weights, bfloat16 autocast); without a GPU it runs on the CPU. The record is written at each evaluation, so that a
run that is stopped leaves what it has, marked as incomplete. `run.py` runs several arms and seeds, and writes the
report.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import peft
import torch
import transformers
import trl
from arms import GROUP, QUESTIONS, SAMPLING, Arm, arms
from checks import non_negative, positive
from environment import HELD_OUT, Environment, Question, Reward
from evaluation import Score, answer_ids, autocast, complete, end_turns_with_eos, evaluate, prompt_ids
from record import LOGGED, description, log_columns, write
from sampling import sample_with_graphs
from tasks import TASKS
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from sdpo_rl import SDPOConfig, SDPOTrainer

WARMUP_STEPS = 5
SHOWN = 6  # held-out tasks whose replies are kept, before and after training


class Curve(TrainerCallback):
    """Evaluates the model every few steps, and keeps the log.

    Args:
        evaluate: the model.
        samples_per_step: of the run.
        every: steps from one evaluation to the next.
        save: called after each evaluation.
    """

    def __init__(
        self,
        evaluate: Callable[[], Score],
        samples_per_step: int,
        every: int,
        save: Callable[[Curve], None] = lambda _: None,
    ) -> None:
        self.points: list[tuple[int, float, float]] = []  # samples, probability, accuracy
        self.log: list[dict[str, float]] = []
        self._evaluate, self._samples, self._every, self._save = evaluate, samples_per_step, every, save

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """The first point, before any step."""
        self.evaluate(0)

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """A point every few steps, and at the end."""
        if state.global_step % self._every == 0 or state.global_step == state.max_steps:
            self.evaluate(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        """The metrics of a step."""
        if "reward" in logs:
            values = {
                name: float(f"{float(logs[name]):.4g}") for name in LOGGED if logs.get(name) is not None
            }
            self.log.append({"step": state.global_step, **values})

    def evaluate(self, step: int) -> None:
        """One point of the curve."""
        probability, accuracy = self._evaluate()
        self.points.append((step * self._samples, float(f"{probability:.4g}"), round(accuracy, 4)))
        reward = f", reward {self.log[-1]['reward']:.2f}" if self.log else ""
        print(
            f"{self.points[-1][0]:6d} samples: held-out {accuracy:.2f}, p {probability:.3f}{reward}",
            flush=True,
        )
        self._save(self)


def run_arm(
    model: Any,
    tokenizer: Any,
    task: Environment,
    arm: Arm,
    *,
    seed: int,
    samples: int,
    points: int,
    held_out: Sequence[Question],
    save: Callable[[Curve], None] = lambda _: None,
) -> Curve:
    """Train with one arm; the model is changed in place, also where adapters are added to it.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer, with a chat template.
        task: what to learn.
        arm: what to run.
        seed: of the prompts, the sampling and the shuffling.
        samples: completions to draw in total.
        points: evaluations after the first one.
        held_out: questions to evaluate on.
        save: called after each evaluation.

    Returns:
        The curve and the log of the run.
    """
    if arm.lora_rank is not None:
        adapters = peft.LoraConfig(
            r=arm.lora_rank, lora_alpha=2 * arm.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(model, adapters)
    steps = max(1, samples // arm.samples_per_step)
    curve = Curve(
        lambda: evaluate(model, tokenizer, task, held_out),
        arm.samples_per_step,
        every=max(1, steps // points),
        save=save,
    )
    questions = task.training(seed, steps * arm.samples_per_step // GROUP)
    if arm.method == "supervised":
        supervise(model, tokenizer, arm, questions, seed=seed, steps=steps, curve=curve)
        return curve
    check_columns(task, questions)
    settings = {"enabled": False} if arm.method == "grpo" else arm.all_settings()
    with TemporaryDirectory() as folder:
        trainer = SDPOTrainer(
            model=model,
            args=grpo_config(task, arm, seed=seed, steps=steps, folder=folder),
            sdpo_config=SDPOConfig(**settings),
            processing_class=tokenizer,
            reward_funcs=[Reward(task, shuffle=arm.shuffled_feedback, seed=seed)],
            train_dataset=datasets.Dataset.from_list(
                [{"prompt": question.prompt, "columns": question.columns} for question in questions]
            ),
            callbacks=[curve],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return curve


def grpo_config(task: Environment, arm: Arm, *, seed: int, steps: int, folder: str) -> trl.GRPOConfig:
    """One batch of new samples and one AdamW step on it, `steps` times."""
    return trl.GRPOConfig(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=arm.samples_per_step,
        num_generations=GROUP,
        max_completion_length=task.max_completion,
        temperature=1.0,
        learning_rate=arm.learning_rate,
        lr_scheduler_type="linear" if arm.decay else "constant_with_warmup",
        warmup_steps=WARMUP_STEPS,
        weight_decay=0.01,
        seed=seed,
        bf16=torch.cuda.is_available(),
        # A model with adapters samples in float32: the bfloat16 autocast is around the forward of the outer model.
        tf32=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
    )


def supervise(
    model: Any,
    tokenizer: Any,
    arm: Arm,
    questions: Sequence[Question],
    *,
    seed: int,
    steps: int,
    curve: Curve,
) -> None:
    """For comparison: cross-entropy on the right answers, on the prompts and in the steps of the other arms."""
    torch.manual_seed(seed)
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=arm.learning_rate, weight_decay=0.01)
    curve.evaluate(0)
    model.train()
    for step in range(1, steps + 1):
        size = arm.samples_per_step // GROUP
        batch = questions[(step - 1) * size : step * size]
        rows = [(prompt_ids(tokenizer, question), answer_ids(tokenizer, question)) for question in batch]
        width = max(len(prompt + answer) for prompt, answer in rows)
        ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for row, (prompt, answer) in enumerate(rows):
            ids[row, : len(prompt + answer)] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : len(prompt + answer)] = torch.tensor(answer)
            mask[row, : len(prompt + answer)] = 1
        for group in optimizer.param_groups:
            group["lr"] = arm.learning_rate * min(1.0, step / WARMUP_STEPS)
        with autocast(device):
            loss = model(
                input_ids=ids.to(device), attention_mask=mask.to(device), labels=labels.to(device)
            ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        curve.on_step_end(None, transformers.TrainerState(global_step=step, max_steps=steps))


def replies(
    model: Any, tokenizer: Any, task: Environment, questions: Sequence[Question]
) -> list[dict[str, Any]]:
    """What greedy decoding replies to the first few questions, and how it is judged."""
    rows = []
    # All of them, as in an evaluation: a batch of another size would have its own graph.
    texts = complete(model, tokenizer, task, questions)
    for question, reply in zip(questions[:SHOWN], texts[:SHOWN], strict=True):
        score, feedback = task.judge(reply, **question.columns)
        asked, answer = question.prompt[-1]["content"], question.answer
        rows.append(
            {"question": asked, "reply": reply, "score": score, "feedback": feedback, "answer": answer}
        )
    return rows


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="One run on the private API.")
    parser.add_argument("--model", required=True, help="a hub id, or a folder")
    parser.add_argument("--task", choices=TASKS, default="kit")
    parser.add_argument("--question", choices=QUESTIONS, default="learns")
    parser.add_argument("--arm", required=True, help="the name of one of the question's arms")
    parser.add_argument("--seed", type=non_negative, default=0)
    parser.add_argument(
        "--samples",
        type=positive,
        default=9600,
        help='completions to draw; arms of "lasting", "lasting settings", "large batches" draw 5 times',
    )
    parser.add_argument("--points", type=positive, default=30, help="evaluations after the first one")
    parser.add_argument("--every-step", action="store_true", help="keep the log of every step of a long run")
    parser.add_argument(
        "--sampling",
        choices=SAMPLING,
        default="generate",
        help="how completions are drawn: by transformers, or with one CUDA graph a token",
    )
    parser.add_argument("--output", type=Path, required=True, help="a JSON file")
    options = parser.parse_args(given)
    names = [arm.name for arm in arms(options.question)]
    if options.arm not in names:
        parser.error(f"--arm: expected one of {', '.join(map(repr, names))}; got {options.arm!r}")
    if options.output.is_dir():
        parser.error(
            f"--output: expected a file, got the folder {str(options.output)!r}; add a name, as run.json"
        )
    return options


def check_split(task: Environment, held_out: Sequence[Question], seed: int) -> None:
    """Refuse a task whose training questions are held out as well.

    Raises:
        ValueError: one of the first thousand is.
    """
    prompts = [question.prompt for question in held_out]
    common = next((q.prompt for q in task.training(seed, 1000) if q.prompt in prompts), None)
    if common is not None:
        raise ValueError(
            f"task {task.name!r}: expected training questions that are not held out, got {common!r} in both; draw "
            "other questions for the split 'test'"
        )


def check_columns(task: Environment, questions: Sequence[Question]) -> None:
    """Refuse columns whose values have several types, which a table cannot hold.

    Raises:
        ValueError: a column has; the message names it.
    """
    types: dict[str, set[str]] = {}
    for question in questions:
        for name, value in question.columns.items():
            if value is not None:
                types.setdefault(name, set()).add(type(value).__name__)
    for name, found in types.items():
        if len(found) > 1:
            raise ValueError(
                f"task {task.name!r}: expected values of one type in the column {name!r} of `Question.columns`, "
                f"got {', '.join(sorted(found))}; write them as text, for example with repr()"
            )


def main(given: Sequence[str] | None = None) -> None:
    options = arguments(given)
    # Temporary folders are removed when `run.py` stops a run, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    arm = next(arm for arm in arms(options.question) if arm.name == options.arm)

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    transformers.set_seed(options.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    end_turns_with_eos(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(device)
    # Sampling is from the model's own distribution: penalties of a chat model's settings would change it.
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    if options.sampling == "graph":
        # Accelerate puts an autocast region around the forward of the model that it trains.
        autocast = torch.bfloat16 if device == "cuda" and arm.lora_rank is None else None
        sample_with_graphs(model, autocast)
    task = TASKS[options.task]
    held_out = task.held_out(HELD_OUT)
    check_split(task, held_out, options.seed)
    described = description(options, arm)
    before = replies(model, tokenizer, task, held_out)
    start = time.perf_counter()

    def save(curve: Curve, after: list[dict[str, Any]] | None = None) -> None:
        record = {
            **described,
            "complete": after is not None,
            "seconds": round(time.perf_counter() - start, 1),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if device == "cuda" else None,
            "points": curve.points,
            "log": log_columns(curve.log, every_step=options.every_step),
            "before": before,
            "after": after,
        }
        write(options.output, record)

    curve = run_arm(
        model,
        tokenizer,
        task,
        arm,
        seed=options.seed,
        samples=options.samples * arm.length,
        points=options.points,
        held_out=held_out,
        save=save,
    )
    save(curve, replies(model, tokenizer, task, held_out))


if __name__ == "__main__":
    main()
