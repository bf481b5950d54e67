"""How many calls of the model a micro-batch takes: what a call costs, and how long a packed sequence may be."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from peft import LoraConfig, get_peft_model
from reference_step import compare
from test_packing import ROWS, batch_of, build
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPTNeoConfig, GPTNeoForCausalLM

from sdpo_rl import training_report
from sdpo_rl.step import packing, runner
from sdpo_rl.step.call_cost import call_cost
from sdpo_rl.step.model_check import sequence_limit, supported_layout
from sdpo_rl.step.runner import ChosenLayout

# Completions drawn from the lognormal distribution of `examples/benchmarks/step.py`.
RAGGED = [342, 209, 194, 95, 577, 151, 395, 385]
PROMPT = 60


def of_size(width: int, *, four_bits: bool = False, max_seq_length: int | None = None) -> Any:
    text = SimpleNamespace(hidden_size=width, _attn_implementation="sdpa", max_position_embeddings=32768)
    config = SimpleNamespace(get_text_config=lambda: text)
    return SimpleNamespace(config=config, is_loaded_in_4bit=four_bits, max_seq_length=max_seq_length)


def calls_of(
    model: Any, lengths: list[int], layout: str, sequence_limit: float = math.inf
) -> list[list[int]]:
    batch = batch_of([([7] * PROMPT, [5] * length) for length in lengths])
    context: Any = SimpleNamespace(
        config=tiny.config(packing="auto"),
        unwrapped=model,
        layout=layout,
        by_row=False,
        reads_padding=False,
        sequence_limit=sequence_limit,
    )
    return runner._plan(context, runner._Wanted(batch, math.inf, averages=False)).calls


# --- what a call costs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("four_bits", [False, True])
def test_eight_ragged_rows_are_one_call(four_bits: bool) -> None:
    """Two calls that both wait for the host take twice the time of one, whatever padding they save."""
    model = of_size(3584, four_bits=four_bits, max_seq_length=2048)
    assert [sorted(rows) for rows in calls_of(model, RAGGED, "groups")] == [list(range(8))]


def test_many_ragged_rows_are_several_calls_that_save_padding() -> None:
    lengths = RAGGED * 8
    calls = calls_of(of_size(3584), lengths, "groups")
    computed = sum(len(rows) * (PROMPT + max(lengths[row] for row in rows)) for rows in calls)
    assert len(calls) > 1
    assert computed < 0.75 * len(lengths) * (PROMPT + max(lengths))
    for rows in calls:
        assert (
            len(rows) * (PROMPT + max(lengths[row] for row in rows)) > call_cost(of_size(3584)).min_tokens / 2
        )


def test_a_call_costs_more_in_4_bits_and_in_a_small_model() -> None:
    assert call_cost(of_size(3584, four_bits=True)).overhead_tokens > call_cost(of_size(3584)).overhead_tokens
    assert call_cost(of_size(896)).min_tokens == 16 * call_cost(of_size(3584)).min_tokens


def test_quantized_weights_are_seen(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny.model().save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings)
    assert call_cost(model).overhead_tokens == 450
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert call_cost(adapted).overhead_tokens == 450


# --- how long a packed sequence may be --------------------------------------------------------------------


def truncating(*, sees_rows: bool, **changes: Any) -> nn.Module:
    """A model that cuts off what is longer than its `max_seq_length`, unless it sees several rows."""
    model = build("Llama", **changes)
    model.max_seq_length = 24
    true = type(model).forward

    def forward(
        self: Any, input_ids: Any, attention_mask: Any = None, position_ids: Any = None, **others: Any
    ) -> Any:
        several = position_ids is not None and len(position_ids) == 1 and (position_ids == 0).sum() > 1
        if not (sees_rows and several):
            input_ids, attention_mask, position_ids = (
                part if part is None else part[:, : self.max_seq_length]
                for part in (input_ids, attention_mask, position_ids)
            )
        return true(
            self, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **others
        )

    model.__class__ = type("Truncating", (type(model),), {"forward": forward})
    return model


def test_a_model_that_cuts_the_test_rows_off_takes_groups() -> None:
    model = truncating(sees_rows=False)
    model.max_seq_length = 10
    layout, reason = supported_layout(model, batch_of(ROWS))
    assert layout == "groups"
    assert "every position" in reason


@pytest.mark.parametrize(("sees_rows", "limit"), [(True, 64), (False, 24)])
def test_a_model_that_sees_rows_packs_more_than_its_max_seq_length(sees_rows: bool, limit: int) -> None:
    model = truncating(sees_rows=sees_rows)
    assert sequence_limit(model, batch_of(ROWS)) == limit
    assert model.max_seq_length == 24


def test_a_model_without_max_seq_length_has_no_limit() -> None:
    assert sequence_limit(build("Llama"), batch_of(ROWS)) == math.inf


def test_a_causal_mask_that_is_stored_limits_a_sequence() -> None:
    config = GPTNeoConfig(
        vocab_size=48, hidden_size=16, num_layers=1, num_heads=2, attention_types=[[["global"], 1]],
        max_position_embeddings=40,
    )  # fmt: skip
    assert sequence_limit(GPTNeoForCausalLM(config), batch_of(ROWS)) == 40


def test_a_limit_that_cannot_be_made_shorter_stays() -> None:
    model = truncating(sees_rows=True)
    del model.max_seq_length
    type(model).max_seq_length = 24
    assert sequence_limit(model, batch_of(ROWS)) == 24


def test_frequencies_that_change_with_the_length_keep_the_limit() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = truncating(sees_rows=True, rope_parameters=rope)
    assert sequence_limit(model, batch_of(ROWS)) == 24


def test_the_rows_of_a_benchmark_within_max_seq_length_and_beyond_it() -> None:
    model = of_size(3584, four_bits=True, max_seq_length=2048)
    assert len(calls_of(model, RAGGED, "packed", sequence_limit=2048)) == 2
    assert calls_of(model, RAGGED, "packed", sequence_limit=32768) == [list(range(8))]


@pytest.mark.parametrize("sees_rows", [True, False])
def test_a_step_takes_one_call_if_it_may_and_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sees_rows: bool
) -> None:
    made: list[int] = []
    true = packing.model_calls

    def count(*args: Any, **kwargs: Any) -> Any:
        calls = true(*args, **kwargs)
        made.append(len(calls))
        return calls

    monkeypatch.setattr(packing, "model_calls", count)
    model = tiny.model(max_position_embeddings=4096)
    longest = 110
    model.max_seq_length = longest
    monkeypatch.setattr(
        runner, "sequence_limit", lambda *args: sequence_limit(*args) if sees_rows else float(longest)
    )
    trainer = tiny.trainer(
        tmp_path, start=model, sdpo_config=tiny.config(packing="packed"), max_steps=2, learning_rate=0.05
    )
    difference = compare(trainer, tiny.model())
    assert max(difference.gradient, difference.loss) < 5e-6
    assert (max(made) == 1) == sees_rows
    if not sees_rows:
        assert f"forwards: packed (at most {longest} tokens, and a prompt" in training_report(trainer)


def test_the_limit_is_part_of_the_note() -> None:
    assert ChosenLayout("packed", by_row_reason="of a test").note == (
        "a prompt in common is read for every row, because of a test"
    )
    assert ChosenLayout("packed", by_row_reason="of a test", sequence_limit=64.0).note == (
        "at most 64 tokens, and a prompt in common is read for every row, because of a test"
    )
