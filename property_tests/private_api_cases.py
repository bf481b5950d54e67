"""A tiny model for the programs of the private API, and questions of a task."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import torch
from programs import EXAMPLES
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(EXAMPLES / "private_api"))

from environment import Environment, Question, Split

HERE = EXAMPLES / "private_api"
SPECIAL = ["<pad>", "<eos>", "<system>", "<user>", "<assistant>"]
CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n"]


def drawn(task: Environment, split: Split, count: int) -> list[Question]:
    """Questions of a split."""
    rng = random.Random(split)
    return [task.draw(rng, split) for _ in range(count)]


def save_model(folder: Path) -> Path:
    """A tiny random model with a character tokenizer."""
    entries = {entry: index for index, entry in enumerate(SPECIAL + CHARACTERS)}
    backend = Tokenizer(models.WordLevel(entries, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=SPECIAL[2:],
        padding_side="left",
        chat_template="{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}",
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(entries),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def fast_teacher(run: dict[str, Any]) -> bool:
    """Whether the teacher of a record is four times as fast as the paper's, whose rate is for 256 completions."""
    settings = run["settings"]
    if not settings or settings.get("teacher_mode", "ema") != "ema":
        return False
    per = settings.get("teacher_rate_samples") or run["samples_per_step"]
    return bool(settings["teacher_update_rate"] == 0.05 and per == 64)
