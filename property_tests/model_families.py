"""Tiny causal language models of the architectures of transformers, and how the trainer runs the rows of each."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM


class Way(NamedTuple):
    """How rows run: the layout, whether a prompt in common is read once, and whether lengths run apart."""

    layout: str
    by_row: bool = False
    apart: bool = False


# By the name that a configuration has in `model_type`.
FAMILIES: dict[Way, tuple[str, ...]] = {
    Way("packed", by_row=True): (
        "apertus", "arcee", "aria_text", "bitnet", "cohere", "cohere2", "ctrl", "deepseek_v3", "diffllama",
        "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe", "flex_olmo", "gemma", "gemma2", "gemma3_text",
        "gemma3n_text", "gemma4_text", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "gpt2", "gpt_bigcode",
        "gpt_neox", "granite", "granitemoe", "granitemoeshared", "helium", "hyperclovax", "jais2", "jetmoe",
        "llama", "mellum", "minimax_m2", "ministral3", "mistral", "mixtral", "nanochat", "olmo", "olmo2",
        "olmo3", "olmoe", "persimmon", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
        "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2", "vaultgemma",
    ),
    Way("packed"): ("codegen", "cohere2_moe", "gpt_neo", "gptj", "granite_swa", "granitemoe_swa", "mimo_v2_flash"),
    Way("groups"): (
        "afmoe", "bamba", "biogpt", "bloom", "falcon", "falcon_h1", "falcon_mamba", "gpt_oss", "jamba", "lfm2",
        "lfm2_moe", "mamba", "mamba2", "minimax", "mpt", "olmo_hybrid", "openai-gpt", "opt", "qwen3_5_text",
        "qwen3_next", "xglm", "zaya",
    ),
    Way("groups", apart=True): ("deepseek_v4", "recurrent_gemma", "rwkv"),
}  # fmt: skip

_HEADS, _KEY_HEADS = 4, 2
_NAMES: dict[int, str] = {
    32: "hidden_size d_model n_embd dim embedding_size word_embed_proj_dim attention_hidden_size lru_width",
    48: "intermediate_size ffn_dim n_inner d_ff intermediate_size_mlp",
    64: "mamba_d_ssm mamba_intermediate_size",
    16: "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size mamba_d_head "
    "mamba_head_dim index_head_dim attention_window_size",
    2: "num_hidden_layers n_layer n_layers num_layers num_kv_heads multi_query_group_num linear_num_key_heads "
    "num_experts_per_tok moe_topk moe_k altup_num_inputs expand mamba_expand",
    _HEADS: "num_attention_heads n_head n_heads num_heads mamba_n_heads mamba_num_heads linear_num_value_heads "
    "index_n_heads mamba_dt_rank time_step_rank rotary_dim laurel_rank num_experts num_local_experts "
    "n_routed_experts moe_num_experts",
    8: "head_dim kv_channels attention_head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim rope_head_dim "
    "q_lora_rank kv_lora_rank state_size mamba_d_state chunk_size mamba_chunk_size linear_key_head_dim "
    "linear_value_head_dim sliding_window hidden_size_per_layer_input",
    1: "n_group topk_group n_groups mamba_n_groups n_shared_experts num_shared_experts first_k_dense_replace",
    0: "num_kv_shared_layers pad_token_id",
    256: "max_position_embeddings n_positions n_ctx max_seq_len seq_length",
}  # fmt: skip
_SIZES = {name: size for size, names in _NAMES.items() for name in names.split()}
# What sizes alone do not make small or valid.
_CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8},
    "deepseek_v3": {"num_key_value_heads": _HEADS},
    "glm4_moe_lite": {"num_key_value_heads": _HEADS},
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
}  # fmt: skip


def build(kind: str) -> Any:
    """A model of this `model_type` with random weights; those that no logit depends on are frozen."""
    unused = _without_gradient(_random_model(kind))
    model = _random_model(kind)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in unused)
    return model


def _random_model(kind: str) -> Any:
    config: Any = AutoConfig.for_model(kind)
    sizes = {**_SIZES, "num_key_value_heads": _KEY_HEADS, "vocab_size": len(tiny.tokenizer())}
    sizes |= {"vocab_size_per_layer_input": sizes["vocab_size"], "eos_token_id": 1, "bos_token_id": 1}
    sizes |= {
        name: 0.0 for name, value in vars(config).items() if "drop" in name and isinstance(value, float)
    }
    for name, size in sizes.items():
        _set(config, name, size)
    for name in ("layer_types", "layers_block_type", "block_types", "mlp_layer_types"):
        if layers := getattr(config, name, None):
            _set(config, name, (list(dict.fromkeys(layers)) * 2)[:2])
    for name, value in _CHANGES.get(kind, {}).items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.1)
    return model


def _set(config: Any, name: str, value: Any) -> None:
    """Set a value that the configuration has, unless it is computed or one per layer."""
    with contextlib.suppress(AttributeError, RuntimeError):
        old = getattr(config, name, None)
        if old is not None and isinstance(old, list) == isinstance(value, list):
            setattr(config, name, value)


def _without_gradient(model: Any) -> set[str]:
    ids = torch.arange(6, 26)[None]
    model(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum().backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is None}
