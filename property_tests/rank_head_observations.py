"""What a rank sees of the loss's logits, in a process that rank_driver.py starts.

    WORLD_SIZE=2 RANK=0 ... python rank_head_observations.py FOLDER zero3

One rank computes the loss from whole logits without DeepSpeed, two ranks from chunks of them under ZeRO-3. The
result is written to the folder as `WORLD-RANK.pt`.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rank_driver import DEEPSPEED, Run, make_trainer, rank, strategy, world_size
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CHUNK = 4  # tokens
RATE = 0.5
_ACCUMULATED = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
RUNS = {
    "tied": Run(),
    "untied": Run(config={"packing": "padded"}, tied=False),
    "lora": Run(adapter="lora"),
    "lora with a trained head": Run(adapter="head", tied=False),
    "checkpointed": Run({"gradient_checkpointing": True}),
    "micro-batches": Run(_ACCUMULATED, {"token_weights": "confidence", "token_fraction": 0.5}, tied=False),
    "the second rank has nothing to learn": Run(succeeds=lambda row: row == 1, feedback=False),
    "several forwards": Run(config={"packing": "packed", "max_tokens_per_forward": 60}),
    "trust region": Run(config={"teacher_mode": "trust_region"}, tied=False),
    # The policy loss takes a second pass, whose gradients are computed in backward.
    "a GRPO part with ratios of rows": Run(
        {
            **_ACCUMULATED,
            "steps_per_generation": 2,
            "num_iterations": 2,
            "importance_sampling_level": "sequence",
            "off_policy_mask_threshold": 1e-3,
            "top_entropy_quantile": 0.53,
        },
        {"grpo_weight": 0.5},
        tied=False,
    ),
    "evidence in a GRPO part": Run(config={"grpo_weight": 0.5, "token_weights": "evidence"}),
}
# With weights of 16 bits, and, as the counter-example, without chunks.
BFLOAT16 = {"bfloat16": "zero3", "bfloat16 under ZeRO-2": "zero2"}
OTHERS = {**dict.fromkeys(BFLOAT16, Run()), "whole logits": Run(config={"loss_backend": "logits"})}


class Logits(TorchDispatchMode):
    """The largest number of tokens whose logits are in one tensor."""

    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.tokens = 0
        self._vocabulary = vocabulary
        self._transposed_weight = (hidden, vocabulary)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if not isinstance(tensor, Tensor) or tensor.shape[-2:] == self._transposed_weight:
                continue
            if tensor.dim() > 1 and tensor.shape[-1] == self._vocabulary:
                self.tokens = max(self.tokens, tensor.numel() // self._vocabulary)
        return output


def masters(model: Any) -> dict[str, Tensor]:
    """What DeepSpeed's optimizer updates, beside the model's weights of 16 bits."""
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(parameter).clone() for name, parameter in model.named_parameters()}


def observe(folder: Path, run: Run, **changes: Any) -> dict[str, Any]:
    """Losses, gradients and the largest logits of each of two steps of plain gradient descent."""
    from transformers import TrainerCallback

    from sdpo_rl.teacher import shards

    trainer = make_trainer(folder, run, max_steps=2, learning_rate=RATE, **changes)
    begin: dict[str, Tensor] = {}
    weights: list[dict[str, Tensor]] = []
    logits: list[int] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            weights.append(self.whole())
            begin.update(masters(trainer._unwrapped) if trainer.args.bf16 else weights[0])

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            weights.append(self.whole())

        def whole(self) -> dict[str, Tensor]:
            model = trainer._unwrapped
            full = shards.full_tensors(model, shards.local_shards(model))
            return {name: tensor.clone() for name, tensor in full.items()}

    train = trainer.training_step

    def watched(*args: Any, **kwargs: Any) -> Any:
        text = trainer._unwrapped.config.get_text_config()
        with Logits(text.vocab_size, text.hidden_size) as seen:
            loss = train(*args, **kwargs)
        logits.append(seen.tokens)
        return loss

    trainer.training_step = watched
    trainer.add_callback(Watch())
    trainer.train()
    return {
        "begin": begin,
        "loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "gradients": [
            {name: (before[name] - after[name]) / RATE for name in before}
            for before, after in pairwise(weights)
        ],
        # Not of the first step, in which the trainer compares layouts and head with the model's own logits.
        "logits": max(logits[trainer.args.gradient_accumulation_steps :]),
        "weights": {parameter.dtype for parameter in trainer._unwrapped.parameters()},
    }


def observe_other_number(folder: Path) -> str:
    """What two ranks are told of the checkpoint that one rank wrote under ZeRO-3."""
    from deepspeed.runtime.zero.utils import ZeRORuntimeException

    place = folder / "other number"
    saving = Run({"save_strategy": "steps", "save_steps": 1, "max_steps": 1})
    if world_size() == 1:
        alone = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0",
        }
        os.environ.update(alone)
    with strategy("zero3"):
        trainer = make_trainer(place, saving, **DEEPSPEED["zero3"])
        if world_size() == 1:
            trainer.train()
            return ""
        try:
            trainer.train(resume_from_checkpoint=str(place / "checkpoint-1"))
        except (ZeRORuntimeException, AssertionError) as error:  # the second rank finds no file of its own
            return str(error)
    return "resumed"


def observe_16_bits(folder: Path, run: Run, stage: str) -> dict[str, Any]:
    """DeepSpeed's weights of 16 bits, which transformers takes for a GPU's."""
    deepspeed = DEEPSPEED[stage]["deepspeed"] | {"bf16": {"enabled": True}}
    with patch("transformers.training_args.is_torch_bf16_gpu_available", lambda: True):
        return observe(folder, run, **DEEPSPEED[stage] | {"deepspeed": deepspeed, "bf16": True})


def main(folder: Path) -> None:
    seen: dict[str, Any] = {}
    for name, run in (RUNS | OTHERS).items():
        if world_size() == 1:
            config = {**run.config, "loss_backend": "logits"}
            seen[name] = observe(folder / name, replace(run, config=config))
        else:
            chunked = replace(run, config={"loss_chunk_size": CHUNK, **run.config})
            with strategy("zero3"):
                if name in BFLOAT16:
                    seen[name] = observe_16_bits(folder / name, chunked, BFLOAT16[name])
                else:
                    seen[name] = observe(folder / name, chunked, **DEEPSPEED["zero3"])
        print(name, "done", flush=True)
    seen["other number"] = observe_other_number(folder)
    torch.save(seen, folder / f"{world_size()}-{rank()}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
