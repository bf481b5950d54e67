"""What docs/vllm.md says of bfloat16 where two models of one run are compared."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM


def merged(dtype: torch.dtype, size: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, an update B·A of about `size`, and the weight that PEFT merges."""
    torch.manual_seed(0)
    linear = nn.Linear(256, 256, bias=False)
    nn.init.normal_(linear.weight, std=0.02)
    config = LoraConfig(r=8, lora_alpha=8, target_modules=["0"])
    model = get_peft_model(nn.Sequential(linear).to(dtype), config, autocast_adapter_dtype=False)  # type: ignore[arg-type]
    layer = model.base_model.model[0]  # type: ignore[index, union-attr]
    before = layer.base_layer.weight.detach().clone()
    a, b = (getattr(layer, f"lora_{half}")["default"].weight for half in "AB")
    with torch.no_grad():
        b.normal_(std=size / a.std().item() / 8**0.5)
        update = b.float() @ a.float()
    model.merge_adapter()
    return before.float(), update, layer.base_layer.weight.detach().float()


def test_a_merge_in_bfloat16_loses_changes_below_half_of_the_last_bit() -> None:
    before, update, after = merged(torch.bfloat16, 1e-5)
    last_bit = 2.0 ** (before.abs().log2().floor() - 7)
    # Away from the bounds of a power of two, where the last bit is half as large on one side.
    lost = update.abs() < 0.24 * last_bit
    assert lost.float().mean() > 0.5
    assert torch.equal(after[lost], before[lost])
    kept = update.abs() > 0.51 * last_bit
    assert kept.any()
    assert (after != before)[kept].all()
    before, update, after = merged(torch.float32, 1e-5)
    torch.testing.assert_close(after - before, update, rtol=1e-2, atol=1e-8)


def test_a_cast_rounds_the_rotary_embedding_and_from_pretrained_does_not(tmp_path: Path) -> None:
    model = tiny.model()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    cast = model.to(torch.bfloat16)
    assert cast.dtype == loaded.dtype == torch.bfloat16
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
    assert cast.model.rotary_emb.inv_freq.dtype == torch.bfloat16
    difference = cast.model.rotary_emb.inv_freq.float() / loaded.model.rotary_emb.inv_freq - 1
    assert difference.abs().max() == pytest.approx(0, abs=2**-8)
    assert difference.abs().max() > 2**-12


@torch.no_grad()
def test_rounded_frequencies_change_log_probabilities_more_than_bfloat16_does() -> None:
    shape = {"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 512}
    # Queries and keys as large as in a 7B model with random weights.
    spread = 0.02 * (3584 / shape["hidden_size"]) ** 0.5
    exact = tiny.model(**shape, initializer_range=spread).bfloat16().float()
    ids = torch.randint(2, 512, (2, 391), generator=torch.Generator().manual_seed(0))

    def log_probs(dtype: torch.dtype, frequencies: torch.dtype) -> torch.Tensor:
        model = copy.deepcopy(exact).to(dtype)
        model.model.rotary_emb.inv_freq = inverse.to(frequencies).float()
        logits = model(ids).logits[:, 135:-1].float()
        return logits.log_softmax(-1).gather(-1, ids[:, 136:, None])

    inverse = tiny.model(**shape).model.rotary_emb.inv_freq.clone()
    reference = log_probs(torch.float32, torch.float32)
    precision = (log_probs(torch.bfloat16, torch.float32) - reference).abs().mean()
    frequencies = (log_probs(torch.float32, torch.bfloat16) - reference).abs().mean()
    assert frequencies > 2 * precision
