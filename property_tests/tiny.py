"""A language model small enough for a test: characters as tokens, two layers, rewards that depend on the text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    PrinterCallback,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from trl import GRPOConfig

from sdpo_rl import SDPOConfig, SDPOTrainer

PAD, EOS, UNK, SYSTEM, USER, BOT = "<pad>", "<eos>", "<unk>", "<system>", "<user>", "<bot>"
VOCABULARY = [PAD, EOS, UNK, SYSTEM, USER, BOT, "\n", *map(chr, range(32, 127))]
GROUP = 4

CHAT_TEMPLATE = (
    "{% if tools %}{{ '<system>tools: ' + (tools | map(attribute='function.name') | join(',')) }}{% endif %}"
    "{% for message in messages %}"
    "{{ {'system': '<system>', 'user': '<user>', 'assistant': '<bot>', 'tool': '<user>'}[message['role']] }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bot>' }}{% if tag %}{{ tag }}{% endif %}{% endif %}"
)


def tokenizer(**changes: Any) -> PreTrainedTokenizerFast:
    """One token per character of printable ASCII, six special ones, and a chat template."""
    inner = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token=UNK))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    settings = {
        "pad_token": PAD,
        "eos_token": EOS,
        "unk_token": UNK,
        "additional_special_tokens": [SYSTEM, USER, BOT],
        "chat_template": CHAT_TEMPLATE,
    }
    return PreTrainedTokenizerFast(tokenizer_object=inner, **{**settings, **changes})


def model(seed: int = 0, **changes: Any) -> Qwen2ForCausalLM:
    """Random weights, large enough that the context changes the predictions."""
    return _model(Qwen2Config, Qwen2ForCausalLM, seed, **changes)


def experts(seed: int = 0, **changes: Any) -> Qwen3MoeForCausalLM:
    """A Mixture-of-Experts model with four experts a layer, two of them per token."""
    routed = {"head_dim": 8, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    return _model(Qwen3MoeConfig, Qwen3MoeForCausalLM, seed, **routed, **changes)


def _model(config_class: Any, model_class: Any, seed: int, **changes: Any) -> Any:
    settings = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config_class(**{**settings, **changes}))
    # Every sixth character also ends a completion, so that completions differ in length.
    model.generation_config.eos_token_id = [1, *range(6, len(VOCABULARY), 6)]
    return model


def user(text: str) -> list[dict[str, str]]:
    """A conversation of one turn."""
    return [{"role": "user", "content": text}]


def conversations(rows: int = 8, **columns: list[Any]) -> Dataset:
    """Questions of different lengths, so that batches need padding."""
    return Dataset.from_dict(
        {"prompt": [user("say " + "no " * (i % 3) + str(i)) for i in range(rows)], **columns}
    )


def plain(rows: int = 8) -> Dataset:
    """The same questions as strings."""
    return Dataset.from_dict({"prompt": ["say " + "no " * (i % 3) + f"{i}: " for i in range(rows)]})


def text_of(completion: str | list[dict[str, str]]) -> str:
    """The text of a completion, plain or conversational."""
    return completion if isinstance(completion, str) else completion[0]["content"]


def score(text: str) -> float:
    """1 for about half of all texts, a function of the text."""
    return float(sum(map(ord, text)) % 2)


def remark(text: str) -> str:
    """Feedback on a failed attempt; empty for a success."""
    return "" if score(text) else f"not {text[:3]}{{}}"


def parity(completions: list[Any], **_: Any) -> list[float]:
    """A reward without feedback."""
    return [score(text_of(completion)) for completion in completions]


def judge(completions: list[Any], **_: Any) -> list[tuple[float, str]]:
    """The same reward with feedback."""
    return [(score(text_of(completion)), remark(text_of(completion))) for completion in completions]


def arguments(output: Path, **changes: Any) -> GRPOConfig:
    """A run on the CPU: two prompts per generation batch, every step logged, no clipping, constant rate."""
    settings: dict[str, Any] = {
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "num_generations": GROUP,
        "max_completion_length": 8,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    return GRPOConfig(str(output), **{**settings, **changes})


def config(**changes: Any) -> SDPOConfig:
    """SDPO with a small support, a teacher that moves in small batches, and a deterministic demonstration."""
    settings: dict[str, Any] = {
        "k": 20,
        "demonstration_policy": "first",
        "teacher_update_rate": 0.3,
        "teacher_rate_samples": None,  # of one update: batches of a few completions would hardly move the teacher
        "loss_backend": "torch",
    }
    return SDPOConfig(**{**settings, **changes})


def trainer(
    output: Path,
    *,
    sdpo_config: SDPOConfig | None = None,
    reward_funcs: Any = judge,
    train_dataset: Any = None,
    processing_class: Any = None,
    peft_config: Any = None,
    callbacks: Any = None,
    eval_dataset: Any = None,
    tools: Any = None,
    start: Any = None,
    teacher_prompt_func: Any = None,
    **changes: Any,
) -> SDPOTrainer:
    """A trainer over the tiny model (or `start`); further keywords change its `GRPOConfig`."""
    trainer = SDPOTrainer(
        model=model() if start is None else start,
        args=arguments(output, **changes),
        sdpo_config=sdpo_config or config(),
        processing_class=processing_class or tokenizer(),
        reward_funcs=reward_funcs,
        train_dataset=conversations() if train_dataset is None else train_dataset,
        eval_dataset=eval_dataset,
        peft_config=peft_config,
        callbacks=callbacks,
        tools=tools,
        teacher_prompt_func=teacher_prompt_func,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
