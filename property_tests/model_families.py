"""Tiny language models of the architectures of transformers, and how the trainer runs the rows of each.

Multimodal ones have their encoders of images or audio, of which a run on text reaches nothing.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedConfig


class Way(NamedTuple):
    """How rows run: the layout, whether a prompt in common is read once, and whether lengths run apart."""

    layout: str
    by_row: bool = False
    apart: bool = False


# By the name that a configuration has in `model_type`.
FAMILIES: dict[Way, tuple[str, ...]] = {
    Way("packed", by_row=True): (
        "apertus", "arcee", "aria", "aria_text", "bitnet", "cohere", "cohere2", "ctrl", "deepseek_v3", "diffllama",
        "ernie4_5", "ernie4_5_moe", "exaone4", "exaone4_5", "exaone_moe", "flex_olmo", "fuyu", "gemma", "gemma2",
        "gemma3", "gemma3_text", "gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified", "glm", "glm4",
        "glm4_moe", "glm4_moe_lite", "gpt2", "gpt_bigcode", "gpt_neox", "granite", "granite_speech", "granitemoe",
        "granitemoeshared", "helium", "hyperclovax", "idefics3", "internvl", "jais2", "jetmoe", "lfm2_vl", "llama",
        "llava", "llava_onevision", "mellum", "minimax_m2", "ministral3", "mistral", "mistral3", "mixtral",
        "nanochat", "olmo", "olmo2", "olmo3", "olmoe", "persimmon", "phi", "phi3", "qwen2", "qwen2_audio",
        "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_vl", "qwen3_vl_moe", "seed_oss", "smollm3", "smolvlm",
        "solar_open", "stablelm", "starcoder2", "vaultgemma", "voxtral",
    ),
    Way("packed"): ("codegen", "cohere2_moe", "gpt_neo", "gptj", "granite_swa", "granitemoe_swa", "mimo_v2_flash"),
    Way("groups"): (
        "afmoe", "bamba", "biogpt", "bloom", "falcon", "falcon_h1", "falcon_mamba", "glm4v", "gpt_oss", "jamba",
        "lfm2", "lfm2_moe", "mamba", "mamba2", "minicpmv4_6", "minimax", "mpt", "olmo_hybrid", "openai-gpt", "opt",
        "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen3_next", "xglm", "zaya",
    ),
    Way("groups", apart=True): ("deepseek_v4", "recurrent_gemma", "rwkv"),
}  # fmt: skip

_HEADS, _KEY_HEADS = 4, 2
_NAMES: dict[int, str] = {
    32: "hidden_size d_model n_embd dim embedding_size word_embed_proj_dim attention_hidden_size lru_width "
    "out_hidden_size projection_dim output_proj_dims mm_embed_dim audio_embed_dim",
    48: "intermediate_size ffn_dim n_inner d_ff intermediate_size_mlp encoder_ffn_dim",
    64: "mamba_d_ssm mamba_intermediate_size",
    16: "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size mamba_d_head "
    "mamba_head_dim index_head_dim attention_window_size",
    2: "num_hidden_layers n_layer n_layers num_layers num_kv_heads multi_query_group_num linear_num_key_heads "
    "num_experts_per_tok moe_topk moe_k altup_num_inputs expand mamba_expand depth encoder_layers",
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
_MROPE = {
    "text_config": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    }
}
# What sizes alone do not make small or valid.
_CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8},
    "deepseek_v3": {"num_key_value_heads": _HEADS},
    "glm4_moe_lite": {"num_key_value_heads": _HEADS},
    "glm4v": _MROPE,
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "qwen2_5_vl": _MROPE,
    "qwen2_vl": {**_MROPE, "vision_config": {"embed_dim": 32}},
}  # fmt: skip
# Parts that a configuration does not have by default.
_GIVEN = {
    "gemma4": {
        "vision_config": {"model_type": "gemma4_vision"},
        "audio_config": {"model_type": "gemma4_audio"},
    },
    "gemma4_unified": {
        "vision_config": {"model_type": "gemma4_unified_vision"},
        "audio_config": {"model_type": "gemma4_unified_audio"},
    },
}


def is_multimodal(config: Any) -> bool:
    """Whether a configuration has that of a language model as a part."""
    return config.get_text_config() is not config


def build(kind: str) -> Any:
    """A model of this `model_type` with random weights; those that no logit depends on are frozen."""
    unused = without_gradient(random_model(kind))
    model = random_model(kind)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in unused)
    return model


def random_model(kind: str) -> Any:
    """A model of this `model_type` with random weights, all of them trainable."""
    config: Any = AutoConfig.for_model(kind, **_GIVEN.get(kind, {}))
    _shrink(config, _CHANGES.get(kind, {}))
    torch.manual_seed(0)
    auto: Any = AutoModelForMultimodalLM if is_multimodal(config) else AutoModelForCausalLM
    model = auto.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.1)
    return model


def _shrink(config: Any, changes: dict[str, Any]) -> None:
    """Give a configuration and those inside it the sizes above; `changes` has what is different, by name."""
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
    inner = {name: value for name, value in vars(config).items() if isinstance(value, PreTrainedConfig)}
    for name, value in inner.items():
        _shrink(value, changes.get(name, {}))
    for name in changes.keys() - inner.keys():
        setattr(config, name, changes[name])


def _set(config: Any, name: str, value: Any) -> None:
    """Set a value that the configuration has, unless it is computed or one per layer."""
    with contextlib.suppress(AttributeError, RuntimeError):
        old = getattr(config, name, None)
        if old is not None and isinstance(old, list) == isinstance(value, list):
            setattr(config, name, value)


def without_gradient(model: Any) -> set[str]:
    """The names of the parameters that no logit of a text depends on."""
    ids = torch.arange(6, 26)[None]
    model(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum().backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is None}
