"""The probe on the private API, before any training: which arms will learn?

    python examples/private_api/probe.py --model Qwen/Qwen2.5-Coder-0.5B-Instruct --output output/probe.json

`--model` is a hub id or a folder. Probes SDPO with each α of the question "alpha", and those arms of "learns" that
change its feedback: what training then does is what `run.py` reports for the same arms. Writes one JSON file with
the numbers and the verdict of every arm; the file is written again after each of them.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import torch
import transformers
import trl
from arms import GROUP, QUESTIONS, Arm
from checks import cannot_be_a_folder, check_model, non_negative, positive
from environment import Environment, Reward
from evaluation import end_turns_with_eos
from kit_task import KIT
from record import weights_hash
from train import TASKS, grpo_config
from transformers import AutoModelForCausalLM, AutoTokenizer

import sdpo_rl
from sdpo_rl import SDPOConfig, SDPOTrainer, probe
from sdpo_rl.diagnose.probe.result import ProbeResult

# Each setting once, though two questions have it: "α=0.5" is the arm "SDPO".
ARMS = tuple(
    {
        (arm.shuffled_feedback, *sorted(arm.all_settings().items())): arm
        for question in ("alpha", "learns")
        for arm in QUESTIONS[question]
        if arm.method == "sdpo" and not arm.name.startswith("SDPO, chosen settings")
    }.values()
)


def probe_arm(
    model: Any, tokenizer: Any, task: Environment, arm: Arm, *, seed: int, batches: int
) -> ProbeResult:
    """The probe of one arm, on the prompts that its run would begin with; the model stays as it is.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer, with a chat template.
        task: what to learn.
        arm: what to probe.
        seed: of the prompts, the sampling and the shuffling.
        batches: generation batches.
    """
    questions = task.training(seed, batches * arm.samples_per_step // GROUP)
    rows = [
        {"prompt": question.prompt, "columns": question.columns, "answer": question.answer}
        for question in questions
    ]
    with TemporaryDirectory() as folder:
        trainer = SDPOTrainer(
            model=model,
            args=grpo_config(task, arm, seed=seed, steps=batches, folder=folder),
            sdpo_config=SDPOConfig(**arm.all_settings()),
            processing_class=tokenizer,
            reward_funcs=[Reward(task, shuffle=arm.shuffled_feedback, seed=seed)],
            train_dataset=datasets.Dataset.from_list(rows),
        )
        return probe(trainer, batches=batches, answer_column="answer")


def main() -> None:
    parser = argparse.ArgumentParser(description="The probe on the private API.")
    parser.add_argument("--model", required=True, help="a hub id, or a folder")
    parser.add_argument("--task", choices=TASKS, default=KIT.name)
    parser.add_argument(
        "--arms", nargs="+", default=[arm.name for arm in ARMS], help="names of arms; default: all"
    )
    parser.add_argument("--seed", type=non_negative, default=0)
    parser.add_argument("--batches", type=positive, default=2, help="generation batches of each arm")
    parser.add_argument("--output", type=Path, required=True, help="a JSON file")
    options = parser.parse_args()
    by_name = {arm.name: arm for arm in ARMS}
    if unknown := [name for name in options.arms if name not in by_name]:
        parser.error(f"--arms: expected some of {', '.join(by_name)}, got {', '.join(unknown)}")
    if options.output.is_dir() or cannot_be_a_folder(options.output.parent):
        parser.error(
            f"--output: expected a JSON file in a folder, got {str(options.output)!r}; pass another one"
        )
    try:
        check_model(options.model, TASKS[options.task].held_out(1)[0].prompt)
    except ValueError as error:
        parser.error(str(error))

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    end_turns_with_eos(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(device)
    # Sampling is from the model's own distribution: penalties of a chat model's settings would change it.
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    record: dict[str, Any] = {
        "task": options.task,
        "seed": options.seed,
        "model": Path(options.model).name,
        "weights_sha256": weights_hash(Path(options.model)),
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "python": platform.python_version(),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, trl, sdpo_rl)},
        "probes": {},
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for name in options.arms:
        transformers.set_seed(options.seed)
        arm = by_name[name]
        result = probe_arm(
            model, tokenizer, TASKS[options.task], arm, seed=options.seed, batches=options.batches
        )
        print(f"\n{name}\n{result}", flush=True)
        settings = {**arm.all_settings(), "shuffled_feedback": arm.shuffled_feedback}
        record["probes"][name] = {"settings": settings, **result.to_dict()}
        options.output.write_text(json.dumps(record, indent=1) + "\n")
        # The trainer refers to itself: its memory would be counted with that of the next.
        gc.collect()


if __name__ == "__main__":
    main()
