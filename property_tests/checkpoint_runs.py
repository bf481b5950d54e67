"""Runs that save checkpoints, and the results of a run to compare."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
CLOCKS = {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second"} | {
    f"eval_{name}" for name in ("runtime", "samples_per_second", "steps_per_second")
}


def lora(base: nn.Module | None = None, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(base or tiny.model(), LoraConfig(**{**LORA, **changes}))


def broad_lora() -> nn.Module:
    untied = tiny.model(tie_word_embeddings=False)
    return lora(untied, bias="lora_only", modules_to_save=["lm_head", "embed_tokens"])


def one_of_two_adapters() -> nn.Module:
    model = lora(init_lora_weights=False)
    model.add_adapter("other", LoraConfig(**LORA))
    return model


def prompt_tuned() -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(tiny.model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


def quantized_lora() -> nn.Module:
    """An adapter over a 4-bit base that every run quantizes from the same numbers."""
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    with tempfile.TemporaryDirectory() as folder:
        tiny.model(hidden_size=64, intermediate_size=128).save_pretrained(folder)
        base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, device_map="cpu")
    return lora(base)


def build(
    folder: Path, start: Callable[[], nn.Module] = tiny.model, sdpo: dict | None = None, **changes: Any
) -> Any:
    """Two micro-batches per optimizer step, four steps per epoch, one log entry every third step."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "logging_steps": 3,
        "save_strategy": "steps",
        "save_steps": 1,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 0.5,
    }
    config = tiny.config(loss_backend="logits", **(sdpo or {}))
    return tiny.trainer(folder, start=start(), sdpo_config=config, **{**settings, **changes})


def run(folder: Path, resume: Any = None, **case: Any) -> Any:
    trainer = build(folder, **case)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def outcome(trainer: Any) -> dict[str, Any]:
    """All results of a run by name, without times."""
    result: dict[str, Any] = {
        f"student {name}": p.detach().clone() for name, p in trainer._unwrapped.named_parameters()
    }
    result |= {f"teacher {name}": t for name, t in trainer._teacher.state.params.items()}
    result["ticks"] = trainer._teacher.state.ticks
    for index, slots in trainer.optimizer.state_dict()["state"].items():
        result |= {f"optimizer {index} {slot}": value for slot, value in slots.items()}
    result["scheduler"] = trainer.lr_scheduler.state_dict()
    result["log"] = [
        {name: value for name, value in line.items() if name not in CLOCKS}
        for line in trainer.state.log_history
    ]
    result["diagnostics"] = trainer._diagnostics.state()
    result["next random numbers"] = (torch.get_rng_state(), random.getstate())
    return result


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not same(one[name], other[name])]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def resumed(source: Path, folder: Path, step: int, **case: Any) -> Any:
    """A run that resumes from a copy of `checkpoint-step` of the run in `source`."""
    name = f"checkpoint-{step}"
    shutil.copytree(source / name, folder / name)
    return run(folder, resume=True, **case)
