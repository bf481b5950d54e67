"""The demo's task on several processes: the same program under DDP, FSDP2 and DeepSpeed ZeRO-2/3.

    accelerate launch --config_file examples/accelerate/ddp.yaml   examples/accelerate/train.py
    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/accelerate/train.py
    accelerate launch --config_file examples/accelerate/zero2.yaml examples/accelerate/train.py
    accelerate launch --config_file examples/accelerate/zero3.yaml examples/accelerate/train.py
    torchrun --nproc-per-node 2 examples/accelerate/train.py       # without a GPU: DDP over gloo

Each file asks for two GPUs; `--num_processes` changes that. The rows of a step are split among the processes, even
within a group of four. `--rows` counts those of all processes, so the run is the same on any number of them.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import Qwen2ForCausalLM
from trl import GRPOConfig

from sdpo_rl import SDPOConfig, SDPOTrainer

DEMO = Path(__file__).parents[1] / "demo"
sys.path.insert(0, str(DEMO))
from language import TEMPLATES, load_tokenizer  # noqa: E402 - a folder of scripts, not a package
from machine import changed_machine, draw_task, interpret  # noqa: E402

GROUP = 4


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=64, help="rows of an optimizer step, over all processes")
    parser.add_argument("--output", default="output/accelerate")
    options = parser.parse_args()

    machine = changed_machine(seed=0)
    rng = random.Random(0)
    tasks = [draw_task(rng) for _ in range(options.steps * options.rows // GROUP)]
    rows = [{"prompt": [{"role": "user", "content": t.prompt}], "answer": t.answer(machine)} for t in tasks]
    on_gpu = torch.cuda.is_available()
    arguments = GRPOConfig(
        output_dir=options.output,
        max_steps=options.steps,
        per_device_train_batch_size=options.rows // int(os.environ.get("WORLD_SIZE", "1")),
        num_generations=GROUP,
        max_completion_length=20,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        use_cpu=not on_gpu,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
    )
    trainer = SDPOTrainer(
        model=Qwen2ForCausalLM.from_pretrained(DEMO / "checkpoint", dtype=torch.float32),
        args=arguments,
        sdpo_config=SDPOConfig(
            k=20,
            environment_feedback_only_without_solution=False,
            reprompt_template=TEMPLATES.reprompt,
            solution_template=TEMPLATES.solution,
            feedback_template=TEMPLATES.feedback,
        ),
        processing_class=load_tokenizer(DEMO / "checkpoint"),
        reward_funcs=[
            lambda completions, answer, **_: [
                interpret(turns[0]["content"], right)
                for turns, right in zip(completions, answer, strict=True)
            ]
        ],
        train_dataset=Dataset.from_list(rows),
    )
    trainer.train()

    if trainer.accelerator.is_main_process:
        rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
        tenth = max(len(rewards) // 10, 1)
        first, last = (sum(part) / tenth for part in (rewards[:tenth], rewards[-tenth:]))
        ranks = trainer.accelerator.num_processes
        print(f"{trainer.accelerator.distributed_type} on {ranks} ranks: reward {first:.2f} -> {last:.2f}")
    # A process that ends while a backend's threads still hold tensors of the last reduction aborts.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
