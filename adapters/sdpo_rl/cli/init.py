"""`sdpo init`: a recipe and a reward file to start from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from . import Parser, UserError

RECIPE = """\
# sdpo train --config recipe.yaml --dry_run    checks it
# sdpo preview --config recipe.yaml            shows what the teacher reads
# sdpo probe --config recipe.yaml              measures whether the model can teach itself
# sdpo train --config recipe.yaml              trains
# Without a GPU add --use_cpu true --bf16 false

model_name_or_path: Qwen/Qwen2.5-0.5B-Instruct
dataset: tasks.jsonl            # or a hub id; a column prompt, and what your reward function needs
reward_funcs: [rewards.py:judge]
output_dir: output

# GRPOConfig
per_device_train_batch_size: 16
num_generations: 8
max_completion_length: 256
learning_rate: 1.0e-5
lr_scheduler_type: constant_with_warmup
warmup_steps: 10
max_steps: 200
logging_steps: 1
report_to: none

# ModelConfig
use_peft: true
lora_r: 16
lora_target_modules: all-linear

# SDPOConfig
alpha: 0.5
k: 100
teacher_update_rate: 0.05       # the paper's, for 256 completions; the update after 16 has a smaller one
"""
REWARDS = '''\
"""The reward function of recipe.yaml: a score, and in words what is wrong. The teacher reads the words."""


def judge(completions, answer, **columns):
    """One (score, feedback) pair per completion; `answer` is a column of the dataset."""
    return [check(turns[0]["content"], right) for turns, right in zip(completions, answer)]


def check(reply, right):
    found = reply.split()[-1] if reply.strip() else ""
    if found == right:
        return 1.0, None
    if found.strip("*.,!$") == right:
        return 0.0, f"The number is right, but the last word was {found!r}; end with the digits alone."
    return 0.0, f"The last word was {found!r}; the sum of the two numbers ends in {right[-1]}."
'''
TASKS = "".join(
    json.dumps(
        {
            "prompt": [{"role": "user", "content": f"What is {a} + {b}? End with the number alone."}],
            "answer": str(a + b),
        }
    )
    + "\n"
    for a in range(11, 19)
    for b in range(21, 29)
)


def run(arguments: Sequence[str]) -> int:
    """Write the three files; returns the exit code."""
    parser = Parser(prog="sdpo init", description="A recipe and a reward file to start from.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path(), help="where to write; default: here")
    folder = parser.parse_args(list(arguments)).folder
    files = {"recipe.yaml": RECIPE, "rewards.py": REWARDS, "tasks.jsonl": TASKS}
    if present := [name for name in files if (folder / name).exists()]:
        raise UserError(f"expected a folder without {', '.join(present)}, got {folder}; name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text)
    except OSError as error:
        raise UserError(
            f"expected a folder that can be written, got {str(folder)!r} ({error}); name another folder"
        ) from error
    for name in files:
        print(f"wrote {folder / name}")
    print(f"next: cd {folder} && sdpo train --config recipe.yaml --dry_run")
    return 0
