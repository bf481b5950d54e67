"""Models that read later tokens, have other positions or read padding are found, and no others."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from reference_step import compare
from test_hidden_states import MODELS, SHAPE, VOCABULARY, build, recurrent_gemma
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from sdpo_rl.step import forward_mode
from sdpo_rl.step.batch import TokenBatch, left_pad, position_ids
from sdpo_rl.step.forward import forward_arguments
from sdpo_rl.step.model_check import autoregression_problem, reads_padding

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


class Foresees(transformers.LlamaForCausalLM):
    """Attention to every token of a row, always or only where the batch has padding."""

    only_padded = False

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if not self.only_padded or not attention_mask.all():
            attention_mask = attention_mask[:, None, None].bool().expand(-1, 1, input_ids.shape[1], -1)
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


def foresees(*, only_padded: bool = False, **changes: Any) -> nn.Module:
    model = build("Llama", **changes)
    model.__class__ = Foresees
    model.only_padded = only_padded
    return model


EXACT = {**MODELS, "mixture of experts": mixture, "mamba": mamba}
READERS: dict[str, Callable[[], nn.Module]] = {
    "rwkv": rwkv,
    "recurrent gemma, whose token 0 alone is zero": recurrent_gemma,
    "lstm": lambda: lstm(masked=False),
    "lstm whose padding is zero": lambda: lstm(masked=True),
    "absolute positions that count padding": counts_padding,
    "llama that foresees where there is padding": lambda: foresees(only_padded=True),
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
@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # of `mkldnn.flags`
@torch.no_grad()
def test_in_low_precision_too(name: str, kind: str) -> None:
    model = (EXACT | READERS)[name]()
    if kind != "autocast":
        model = model.to(getattr(torch, kind))
    # Without oneDNN, which has no LSTM in bfloat16 for a CPU without AVX-512.
    without = torch.backends.mkldnn.flags(enabled=False)
    with without, torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        assert reads_padding(model, model, torch.tensor(ROW)) == (name in READERS)


def test_two_forwards_of_short_rows() -> None:
    model = build("Qwen2")
    shapes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    reads_padding(model, model, torch.tensor(ROW * 3))
    assert shapes == [(3, 12), (2, 8)]
    assert SHAPE["max_position_embeddings"] > 12


# --- later tokens and positions ---------------------------------------------------------------------------


def encoder(name: str, head: str = "ForCausalLM", **changes: Any) -> nn.Module:
    settings = {**SHAPE, "initializer_range": 0.5, **changes}
    del settings["num_key_value_heads"]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings)
    return getattr(transformers, f"{name}{head}")(config).eval()


# By what the error says of each.
REFUSED: dict[str, tuple[Callable[..., nn.Module], str]] = {
    "doge": (
        lambda **changes: build("Doge", num_key_value_heads=2, **changes),
        "DogeForCausalLM, whose logits change by .* with later tokens of a row; such a model cannot be trained",
    ),
    "bert": (
        lambda **changes: encoder("Bert", "LMHeadModel", **changes),
        "BertLMHeadModel, whose logits change by .* with later tokens of a row; set is_decoder=True",
    ),
    "roberta": (
        lambda **changes: encoder("Roberta", is_decoder=True, **changes),
        "RobertaForCausalLM, whose logits change by .* without position_ids",
    ),
    "llama that foresees": (
        foresees,
        "Foresees, whose logits change by .* with later tokens of a row; such a model cannot be trained",
    ),
}
REGRESSIVE = {
    **EXACT,
    **READERS,
    "bert that is a decoder": lambda: encoder("Bert", "LMHeadModel", is_decoder=True),
}


def batch(row: list[int] = ROW) -> TokenBatch:
    ids = torch.tensor([row])
    return TokenBatch(ids, torch.ones_like(ids), [(len(row) - 1, 1)])


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_is_not_autoregressive_is_refused(tmp_path: Path, name: str) -> None:
    make, message = REFUSED[name]
    # In the trainer's vocabulary, and longer than its rows.
    model = make(vocab_size=len(tiny.VOCABULARY), max_position_embeddings=512)
    with pytest.raises(ValueError, match=f"model: expected .*, got {message}"):
        tiny.trainer(tmp_path, start=model, max_steps=1).train()


@pytest.mark.parametrize("name", REGRESSIVE)
def test_an_autoregressive_model_is_not(name: str) -> None:
    model = REGRESSIVE[name]()
    for row in (ROW, ROW[:2], [7, 7]):
        assert autoregression_problem(model, batch(row)) == ""


@pytest.mark.parametrize("value", [-math.inf, torch.finfo(torch.float32).min])
def test_a_masked_entry_of_the_logits_hides_nothing(value: float) -> None:
    """Relative to it, every difference of the others would be 0."""
    for name, make in {
        **{name: make for name, (make, _) in REFUSED.items()},
        "llama": MODELS["llama"],
    }.items():
        model = make()
        forward = model.forward

        def masked(*args: Any, forward: Callable[..., Any] = forward, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            output.logits = output.logits.index_fill(-1, torch.tensor([3]), value)
            return output

        model.forward = masked
        assert bool(autoregression_problem(model, batch())) == (name in REFUSED), name
        assert not reads_padding(model, model, torch.tensor(ROW)) or name != "llama"


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "autocast"])
@pytest.mark.parametrize(
    "name", [*REFUSED, "qwen2, tied", "gemma2, soft-capped", "mixture of experts", "rwkv"]
)
def test_nor_in_low_precision(name: str, kind: str) -> None:
    model = REFUSED[name][0]() if name in REFUSED else REGRESSIVE[name]()
    if kind != "autocast":
        model = model.to(getattr(torch, kind))
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        assert bool(autoregression_problem(model, batch())) == (name in REFUSED)


def test_a_model_that_foresees_where_there_is_padding_runs_without(tmp_path: Path) -> None:
    shape = {"vocab_size": len(tiny.VOCABULARY), "max_position_embeddings": 512}
    trainer = tiny.trainer(
        tmp_path,
        start=foresees(only_padded=True, **shape),
        sdpo_config=tiny.config(packing="groups"),
        max_steps=1,
    )
    difference = compare(trainer, build("Llama", **shape))
    assert max(difference.gradient, difference.loss) < 5e-5


@pytest.mark.parametrize("name", ["qwen2, tied", "lora", "lstm"])
def test_it_takes_two_short_forwards_and_changes_nothing(name: str) -> None:
    model = REGRESSIVE[name]()
    calls: list[tuple[tuple[int, ...], bool]] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(
            (tuple(kwargs["input_ids"].shape), torch.is_grad_enabled())
        ),
        with_kwargs=True,
    )
    before = {key: value.clone() for key, value in model.state_dict().items()}
    autoregression_problem(model, batch())
    # Positions that a model does not take cannot be wrong.
    assert calls == [((2, 9), False)] * (1 if name == "lstm" else 2)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_every_process_refuses_a_model_that_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny.trainer(tmp_path, max_steps=1)
    monkeypatch.setattr(forward_mode, "autoregression_problem", lambda *_: "")
    monkeypatch.setattr(trainer.accelerator, "reduce", lambda value, **_: value + 1.0)
    with pytest.raises(ValueError, match="got Qwen2ForCausalLM, which failed this test on another process"):
        trainer.train()
