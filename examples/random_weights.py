"""A checkpoint of random weights in a published shape, with a character tokenizer, to measure memory and time.

A module of `unsloth_7b_24gb.py`, `benchmarks/recipe.py` and `tiny_model.py`; nothing to run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "7b": {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
           "intermediate_size": 18944, "vocab_size": 152064},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 128, "vocab_size": 256},
}  # fmt: skip
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_weights(folder: Path, shape: str) -> None:
    """Write a bf16 checkpoint of random weights and a character tokenizer to `folder`, unless it has one."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = SHAPES[shape]
    wide, narrow = size["hidden_size"], size["intermediate_size"]
    key_value = wide // size["num_attention_heads"] * size["num_key_value_heads"]
    layer = {
        "input_layernorm.weight": None,
        "post_attention_layernorm.weight": None,
        "self_attn.q_proj.weight": (wide, wide),
        "self_attn.k_proj.weight": (key_value, wide),
        "self_attn.v_proj.weight": (key_value, wide),
        "self_attn.o_proj.weight": (wide, wide),
        "self_attn.q_proj.bias": (wide,),
        "self_attn.k_proj.bias": (key_value,),
        "self_attn.v_proj.bias": (key_value,),
        "mlp.gate_proj.weight": (narrow, wide),
        "mlp.up_proj.weight": (narrow, wide),
        "mlp.down_proj.weight": (wide, narrow),
    }
    ends = (size["vocab_size"], wide)
    shards: list[dict[str, Any]] = [
        {"model.embed_tokens.weight": ends},
        {"lm_head.weight": ends, "model.norm.weight": None},
    ]
    shards += [
        {f"model.layers.{i}.{name}": shape_ for name, shape_ in layer.items()}
        for i in range(size["num_hidden_layers"])
    ]
    generator = torch.Generator(device).manual_seed(0)
    index: dict[str, str] = {}
    for number, shapes in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {
            key: torch.ones(wide, dtype=torch.bfloat16)
            if rows is None
            else torch.empty(rows, dtype=torch.bfloat16, device=device)
            .normal_(0, 0.02, generator=generator)
            .cpu()
            for key, rows in shapes.items()
        }
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    words = ["<pad>", "<eos>", "<unk>", "\n", *map(chr, range(32, 127))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    inner.save(str(folder / "tokenizer.json"))
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    documents = {
        "model.safetensors.index.json": {"metadata": {}, "weight_map": index},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE, **special,
        },
        "generation_config.json": {"pad_token_id": 0, "eos_token_id": 1, "do_sample": True},
        "config.json": {
            "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "dtype": "bfloat16",
            "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, **size,
        },
    }  # fmt: skip
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document))


def character_tokenizer(folder: str) -> Any:
    """The character tokenizer of `folder`; `AutoTokenizer` would build a Qwen2 tokenizer from the same files."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=f"{folder}/tokenizer.json", pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        chat_template=CHAT_TEMPLATE, padding_side="left",
    )  # fmt: skip
