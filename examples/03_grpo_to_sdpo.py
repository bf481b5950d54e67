"""A GRPO script of TRL, and what changes in it for SDPO.

    python examples/03_grpo_to_sdpo.py --method grpo
    python examples/03_grpo_to_sdpo.py --method sdpo

Three things change:

1. `SDPOTrainer` in place of `GRPOTrainer`, with the same arguments and an `SDPOConfig`.
2. The reward function may return `(score, feedback)` pairs.
3. The learning rate: the best of three for each method, as in the demo.

`SDPOConfig(enabled=False)` is TRL's GRPO, so that one script runs both, with the same seed and questions. The task
is the demo's: the meaning of opcodes has changed, and only the interpreter's message says how.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import Qwen2ForCausalLM
from trl import GRPOConfig

from sdpo_rl import SDPOConfig, SDPOTrainer

DEMO = Path(__file__).parent / "demo"
sys.path.insert(0, str(DEMO))
from exact import evaluate  # noqa: E402 - a folder of scripts, not a package
from language import TEMPLATES, load_tokenizer  # noqa: E402
from machine import changed_machine, draw_task, held_out_tasks, interpret  # noqa: E402

GROUP, ROWS = 4, 64


def scores(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """The reward function of the GRPO script: a number for each completion."""
    return [
        interpret(turns[0]["content"], right).score for turns, right in zip(completions, answer, strict=True)
    ]


def scores_and_feedback(completions: list[Any], answer: list[str], **_: Any) -> list[tuple[float, str]]:
    """The same with what the interpreter says of a wrong completion."""
    return [interpret(turns[0]["content"], right) for turns, right in zip(completions, answer, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", choices=["grpo", "sdpo"], default="sdpo")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", default="output/03")
    options = parser.parse_args()
    sdpo = options.method == "sdpo"

    machine = changed_machine(seed=0)
    rng = random.Random(0)
    tasks = [draw_task(rng) for _ in range(options.steps * ROWS // GROUP)]
    tokenizer = load_tokenizer(DEMO / "checkpoint")
    model = Qwen2ForCausalLM.from_pretrained(DEMO / "checkpoint", dtype=torch.float32)
    trainer = SDPOTrainer(
        model=model,
        reward_funcs=scores_and_feedback if sdpo else scores,
        args=GRPOConfig(
            output_dir=options.output, max_steps=options.steps, per_device_train_batch_size=ROWS,
            num_generations=GROUP, max_completion_length=20, learning_rate=7e-4 if sdpo else 3e-4,
            lr_scheduler_type="constant", weight_decay=0.01, use_cpu=True, bf16=False,
            gradient_checkpointing=False, logging_steps=1, report_to="none", save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(
            [{"prompt": [{"role": "user", "content": t.prompt}], "answer": t.answer(machine)} for t in tasks]
        ),
        processing_class=tokenizer,
        sdpo_config=SDPOConfig(
            enabled=sdpo,
            k=20,
            # The templates that this small model was trained to read; pretrained models take the defaults.
            reprompt_template=TEMPLATES.reprompt,
            solution_template=TEMPLATES.solution,
            feedback_template=TEMPLATES.feedback,
            environment_feedback_only_without_solution=False,
        ),
    )  # fmt: skip

    def right_answers() -> float:
        held_out = held_out_tasks()
        prompts, answers = [t.prompt for t in held_out], [t.answer(machine) for t in held_out]
        return evaluate(model, tokenizer, prompts, answers).probability.mean().item()

    before = right_answers()
    trainer.train()
    print(f"{options.method}: held-out probability of the right answer {before:.3f} -> {right_answers():.3f}")


if __name__ == "__main__":
    main()
