"""Feedback from code: the model writes a function, a sandbox runs its tests, the first failure is the feedback.

    python examples/04_code_feedback.py                                             # a model of random weights
    python examples/04_code_feedback.py --model Qwen/Qwen2.5-Coder-0.5B-Instruct    # a pretrained one

The sandbox is that of `private_api`: one function without imports, in a process with limits of time, memory and
output. It is a safeguard for this example, not a security boundary; run code of a model that you do not trust in a
container without a network.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tiny_model import tiny_model, tiny_tokenizer
from trl import GRPOConfig

from sdpo_rl import SDPOConfig, SDPOTrainer

sys.path.insert(0, str(Path(__file__).parent / "private_api"))
from sandbox import Case, run_tests

# A task: the function's name, what it does, and its tests as (arguments, expected value). The prompt does not have
# the tests. Where the description leaves a choice, only a failed test says which is meant.
TASKS = {
    "clamp": (
        "clamp(x, low, high) bounds x",
        [([5, 0, 3], 3), ([-1, 0, 3], 0), ([2, 0, 3], 2)],
    ),
    "initials": (
        "initials(name) returns the initials of a name",
        [(["ada lovelace"], "A.L."), (["alan turing"], "A.T.")],
    ),
    "median": (
        "median(values) returns the median of a list",
        [([[3, 1, 2]], 2), ([[4, 1, 2, 3]], 2.5), ([[]], None)],
    ),
}  # fmt: skip


def source_of(reply: str) -> str:
    """The code of a reply: the first fenced block, or else the whole text."""
    block = re.search(r"```(?:python)?\n(.*?)```", reply, re.DOTALL)
    return (block[1] if block else reply).strip()


def judge(completions: list[Any], name: list[str], **_: Any) -> list[tuple[float, str | None]]:
    """Score 1 if all tests pass; else 0 and the first failure, as the interpreter words it."""
    verdicts = []
    for turns, function in zip(completions, name, strict=True):
        cases = [Case(arguments, expected) for arguments, expected in TASKS[function][1]]
        outcome = run_tests(source_of(turns[0]["content"]), function, cases)
        verdicts.append((float(outcome.passed), outcome.message))
    return verdicts


def show_judge() -> None:
    """Three replies and what the teacher would read about them."""
    for reply in (
        "def clamp(x, low, high):\n    return min(max(x, low), high)",
        "def clamp(x, low, high):\n    return max(x, low)",
        "import os\ndef clamp(x, low, high): return os.getcwd()",
    ):
        ((score, feedback),) = judge([[{"role": "assistant", "content": reply}]], ["clamp"])
        print(f"{score:.0f}  {feedback}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="hub id or folder; default: random weights")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--output", default="output/04")
    options = parser.parse_args()
    show_judge()

    on_gpu = torch.cuda.is_available()
    trainer = SDPOTrainer(
        model=options.model or tiny_model(),
        reward_funcs=judge,
        args=GRPOConfig(
            output_dir=options.output, max_steps=options.steps, per_device_train_batch_size=8,
            num_generations=4, max_completion_length=256 if options.model else 16, learning_rate=1e-5,
            use_cpu=not on_gpu, bf16=on_gpu, logging_steps=1, report_to="none", save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(
            [
                {
                    "prompt": [{"role": "user", "content": f"Write a Python function. {text}. Code only."}],
                    "name": name,
                }
                for name, (text, _) in TASKS.items()
            ]
        ),
        processing_class=None if options.model else tiny_tokenizer(),
        sdpo_config=SDPOConfig.preset("rich_feedback"),
    )  # fmt: skip
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    used = [entry["self_distillation/feedback_used_fraction"] for entry in log]
    print(
        f"reward {log[0]['reward']:.2f} -> {log[-1]['reward']:.2f}, rows that learned from feedback {used[-1]:.2f}"
    )


if __name__ == "__main__":
    main()
