"""Models whose rows change with the padding before them are found, and no others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from test_hidden_states import MODELS, SHAPE, VOCABULARY, build, recurrent_gemma
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from sdpo_rl.step.batch import left_pad, position_ids
from sdpo_rl.step.forward import forward_arguments
from sdpo_rl.step.model_check import reads_padding

ROW = [5, 6, 7, 8, 9, 10, 11, 12, 13]


def rwkv() -> nn.Module:
    return build("Rwkv", attention_hidden_size=16, context_length=64)


def mixture() -> nn.Module:
    return build("Qwen3Moe", head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)


def mamba() -> nn.Module:
    return build("Mamba", state_size=4)


class Lstm(transformers.PreTrainedModel):
    """A recurrent layer, with the mask applied to its inputs or not at all."""

    config_class = transformers.GPT2Config

    def __init__(self, config: Any, masked: bool) -> None:
        super().__init__(config)
        self.masked = masked
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.layer = nn.LSTM(16, 16, batch_first=True)
        self.head = nn.Linear(16, VOCABULARY)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False) -> CausalLMOutput:
        states = self.embedding(input_ids)
        if self.masked:
            states = states * attention_mask[..., None]
        return CausalLMOutput(logits=self.head(self.layer(states)[0]))


def lstm(masked: bool) -> nn.Module:
    torch.manual_seed(0)
    return Lstm(transformers.GPT2Config(), masked).eval()


class CountsPadding(transformers.GPT2LMHeadModel):
    """Absolute positions, and no argument for them: padding shifts a row."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False) -> Any:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


def counts_padding() -> nn.Module:
    model = MODELS["gpt2, absolute positions"]()
    model.__class__ = CountsPadding
    return model


EXACT = {**MODELS, "mixture of experts": mixture, "mamba": mamba}
READERS: dict[str, Callable[[], nn.Module]] = {
    "rwkv": rwkv,
    "recurrent gemma, whose token 0 alone is zero": recurrent_gemma,
    "lstm": lambda: lstm(masked=False),
    "lstm whose padding is zero": lambda: lstm(masked=True),
    "absolute positions that count padding": counts_padding,
}


# One layer's bias is lost in the rounding.
GROSS = [name for name in READERS if name != "lstm whose padding is zero"]


def gap(model: nn.Module) -> float:
    """By how much padding changes the logits of a row, relative to the largest."""
    ids, mask = left_pad([ROW, ROW[:5]], pad_id=1, device=torch.device("cpu"))
    together = model(**forward_arguments(model, ids, mask, position_ids(mask), len(ROW))).logits[1, -5:]
    alone = model(input_ids=torch.tensor([ROW[:5]]), attention_mask=torch.ones(1, 5).long()).logits[0, -5:]
    return float((together - alone).abs().max() / alone.abs().max())


@pytest.mark.parametrize("name", [*EXACT, *READERS])
@torch.no_grad()
def test_models_that_read_padding_are_found(name: str) -> None:
    model = (EXACT | READERS)[name]()
    assert (gap(model) > 1e-3) == (name in READERS)
    assert reads_padding(model, model, torch.tensor(ROW)) == (name in READERS)
    assert reads_padding(model, model, torch.tensor(ROW[:2])) == (name in READERS)


@pytest.mark.parametrize("name", ["qwen2, tied", "gemma2, soft-capped", "mixture of experts", *GROSS])
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "autocast"])
@torch.no_grad()
def test_in_low_precision_too(name: str, kind: str) -> None:
    model = (EXACT | READERS)[name]()
    if kind != "autocast":
        model = model.to(getattr(torch, kind))
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        assert reads_padding(model, model, torch.tensor(ROW)) == (name in READERS)


def test_one_forward_of_three_short_rows() -> None:
    model = build("Qwen2")
    shapes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    reads_padding(model, model, torch.tensor(ROW * 3))
    assert shapes == [(3, 12)]
    assert SHAPE["max_position_embeddings"] > 12
