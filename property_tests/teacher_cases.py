"""Models with a teacher, and the expected teacher: the averaged weights, written into the model itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tiny
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback

from sdpo_rl import SDPOConfig
from sdpo_rl.step import forward as step_forward
from sdpo_rl.teacher.store import TeacherStore

Weights = dict[str, Tensor]
RATE = 0.3
IDS = torch.tensor([[4, 80, 81, 82, 5, 70, 71], [0, 4, 90, 5, 91, 92, 93]])
MASK = (IDS != 0).long()


# --- models -----------------------------------------------------------------------------------------------


def lora(model: nn.Module | None = None, **changes: Any) -> PeftModel:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    torch.manual_seed(0)
    return get_peft_model(model or tiny.model(), LoraConfig(**{**settings, **changes}))


def warm_started() -> PeftModel:
    """An adapter that was trained before: neither of its factors is zero."""
    return lora(init_lora_weights=False)


def prompt_tuned() -> PeftModel:
    return get_peft_model(tiny.model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


def quantized(bits: int, folder: Path) -> PeftModel:
    tiny.model(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    settings = (
        BitsAndBytesConfig(load_in_8bit=True)
        if bits == 8
        else BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    )
    return lora(AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, device_map="cpu"))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "full, tied embeddings": tiny.model,
    "full, untied head": lambda: tiny.model(tie_word_embeddings=False),
    "full, bfloat16": lambda: tiny.model().bfloat16(),
    "LoRA": lora,
    "LoRA, warm start": warm_started,
    "LoRA, trained biases": lambda: lora(bias="lora_only"),
    "LoRA, all biases": lambda: lora(bias="all"),
    "LoRA, whole head": lambda: lora(
        tiny.model(tie_word_embeddings=False), modules_to_save=["lm_head", "embed_tokens"]
    ),
    "LoRA, tied head": lambda: lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "LoRA, tokens of a tied embedding": lambda: lora(trainable_token_indices=[80, 81]),
    "LoRA, tokens of an untied embedding": lambda: lora(
        tiny.model(tie_word_embeddings=False), trainable_token_indices=[80, 81]
    ),
    "DoRA": lambda: lora(use_dora=True),
    "prompt tuning": prompt_tuned,
}


# --- the expected teacher ---------------------------------------------------------------------------------


def trained(model: nn.Module) -> Weights:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


class Students(TrainerCallback):
    """The trained weights at the start and after every optimizer step."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.seen = [trained(model)]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(trained(self.model))


def average(students: list[Weights]) -> dict[str, Tensor]:
    """The paper's moving average in float64."""
    result = {name: weight.double() for name, weight in students[0].items()}
    for student in students[1:]:
        result = {name: (1 - RATE) * old + RATE * student[name].double() for name, old in result.items()}
    return result


@contextmanager
def overwritten(model: nn.Module, weights: Weights) -> Iterator[None]:
    """The model with other values written into its parameters."""
    parameters = dict(model.named_parameters())
    originals = {name: parameters[name].detach().clone() for name in weights}
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)
    yield
    with torch.no_grad():
        for name, weight in originals.items():
            parameters[name].copy_(weight)


def logits(model: Any, params: Weights | None = None) -> Tensor:
    model.eval()
    arguments = {"input_ids": IDS, "attention_mask": MASK, "use_cache": False}
    with torch.no_grad():
        return step_forward.completion_logits(model, model, arguments, length=4, params=params)


def started(model: nn.Module, **config: Any) -> TeacherStore:
    """A teacher when training begins; the rate is that of one update."""
    store = TeacherStore(model, SDPOConfig(**{"teacher_rate_samples": None, **config}), seed=0)
    store.on_train_begin(model)
    return store


def run(model: nn.Module, folder: Path, **config: Any) -> tuple[Any, Students]:
    trainer = tiny.trainer(
        folder,
        start=model,
        sdpo_config=tiny.config(loss_backend="logits", teacher_update_rate=RATE, **config),
        max_steps=3,
    )
    students = Students(trainer._unwrapped)
    trainer.add_callback(students)
    trainer.train()
    return trainer, students


def check(trainer: Any, students: Students, *, tolerance: float = 1e-6) -> None:
    """The state is the average, and the forward sees all of it."""
    store, model = trainer._teacher, trainer._unwrapped
    expected = average(students.seen)
    assert store.state.params.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(store.state.params[name].double(), weight, rtol=tolerance, atol=tolerance)
    (params,) = store.forwards(model, training=True)
    seen = logits(model, params)
    with overwritten(model, params):
        assert torch.equal(seen, logits(model))
    for name in params:
        others = {other: weight for other, weight in params.items() if other != name}
        same = torch.equal(params[name], students.seen[-1][name])
        assert same or not torch.equal(seen, logits(model, others)), f"the forward does not see {name}"
