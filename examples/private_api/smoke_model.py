"""A tiny random model with a tokenizer and a chat template, for `--model tiny`: it learns nothing.

A module of `run.py`; nothing to run.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

SPECIAL = ["<pad>", "<eos>", "<system>", "<user>", "<assistant>"]
CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n"]


def save_model(folder: Path) -> Path:
    """Write the model, always with the same weights, to a folder; its tokens are characters."""
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
    config = Qwen2Config(
        vocab_size=len(entries),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder
