"""The model's context: packed sequences may be longer, a row beyond it is an error or a warning."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import scripted_turns
import tiny
import torch
from datasets import Dataset
from reference_step import compare
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, GPTJConfig, GPTJForCausalLM
from trl import GRPOTrainer

from sdpo_rl import Attempt
from sdpo_rl.compat.generation import GenerationCalls
from sdpo_rl.step import packing, runner

TOLERANCE = 5e-6
OUTSIDE = "A prompt and its completion have"
SHAPE: dict[str, Any] = {
    "vocab_size": len(tiny.VOCABULARY), "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip


def gpt2(context: int) -> nn.Module:
    """Learned positions."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_positions=context, **SHAPE))


def gptj(context: int) -> nn.Module:
    """Rotary positions that are stored in a table."""
    torch.manual_seed(0)
    return GPTJForCausalLM(GPTJConfig(n_positions=context, rotary_dim=8, **SHAPE))


def rotary(context: int) -> nn.Module:
    """Rotary positions that are computed, so that there is one for each token."""
    return tiny.model(max_position_embeddings=context)


# --- packed sequences -------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", ["read once", "read by each row"])
@pytest.mark.parametrize("build", [gpt2, gptj, rotary])
def test_a_packed_sequence_may_be_longer_than_the_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: Callable[[int], nn.Module], prompts: str
) -> None:
    """The steps are those of rows that run alone; nothing but a row needs to fit."""
    context, made = 160, []
    for name in ("pack", "pack_prefixes"):
        true = getattr(packing, name)

        def pack(*args: Any, true: Any = true, **options: Any) -> packing.ModelCall:
            made.append(true(*args, **options))
            return made[-1]

        monkeypatch.setattr(packing, name, pack)
    if prompts == "read by each row":
        monkeypatch.setattr(runner, "row_attention_problem", lambda *_: "of a test")
    trainer = tiny.trainer(
        tmp_path,
        start=build(context),
        sdpo_config=tiny.config(packing="packed"),
        max_steps=2,
        learning_rate=0.05,
    )
    difference = compare(trainer, build(context))
    assert max(difference.gradient, difference.loss) < TOLERANCE
    assert max(call.ids.numel() for call in made) > context
    logs = trainer.state.log_history
    cut = [entry["self_distillation/truncated_reprompt_fraction"] for entry in logs if "grad_norm" in entry]
    assert cut == [0.0, 0.0]


# --- one row ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [12, 24], ids=["a prompt alone", "with its completion"])
@pytest.mark.parametrize("build", [gpt2, gptj])
def test_a_row_without_positions_is_an_error_that_names_the_setting(
    tmp_path: Path, build: Callable[[int], nn.Module], context: int
) -> None:
    trainer = tiny.trainer(tmp_path, start=build(context), max_completion_length=20)
    expected = (
        rf"max_completion_length: expected prompts and completions within the model's context of {context} "
        r"tokens, got a prompt of \d+ and max_completion_length=20, .*; lower max_completion_length, or remove"
    )
    with pytest.raises(ValueError, match=expected):
        trainer.train()


@pytest.mark.parametrize("context", [12, 512])
def test_a_row_beyond_the_context_of_other_models_is_warned_about_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, context: int
) -> None:
    with caplog.at_level(logging.WARNING, logger="sdpo_rl"):
        tiny.trainer(tmp_path, start=rotary(context), max_steps=3).train()
    found = [record.getMessage() for record in caplog.records if OUTSIDE in record.getMessage()]
    if context == 512:
        assert found == []
        return
    (message,) = found
    assert message.endswith(
        "more than the model's context of 12. Lower max_completion_length=8, or remove long prompts."
    )
    # No reprompt fits either, which is another warning.
    (left_out,) = [record.getMessage() for record in caplog.records if "no loss" in record.getMessage()]
    assert "lower max_completion_length where the model's context is the limit" in left_out


def test_a_context_of_minus_one_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """So do XLNet and others say that any length will do."""
    trainer = tiny.trainer(tmp_path, start=rotary(-1))
    with caplog.at_level(logging.WARNING, logger="sdpo_rl"):
        trainer.train()
    assert [record.getMessage() for record in caplog.records if OUTSIDE in record.getMessage()] == []
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert [entry["self_distillation/dropped_reprompt_fraction"] for entry in logs] == [0.0, 0.0]


@pytest.mark.parametrize("length", [140, 141], ids=["within the context", "beyond it"])
def test_a_row_of_several_turns_is_warned_about_as_it_was_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, length: int
) -> None:
    """TRL generates a turn after a tool call with the whole limit, and cuts the completion afterwards."""
    tokens = scripted_turns.tokenizer()
    end, call = scripted_turns.END, scripted_turns.call("multiply", '{"a": 2, "b": 3}')
    generate = scripted_turns.script(tokens, [*[[call, "x" * 100 + end]] * 7, [f"x{end}"]])
    prompts: list[int] = []

    def turn(self: Any, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        prompts.append(max(map(len, prompt_ids)))
        return generate(prompt_ids, *args, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", turn)
    dataset = Dataset.from_dict({"prompt": [tiny.user("multiply")] * 2})
    with caplog.at_level(logging.WARNING, logger="sdpo_rl"):
        for context in (2048, None):
            tiny.trainer(
                tmp_path,
                start=scripted_turns.model(max_position_embeddings=context or prompts[0] + 140),
                processing_class=tokens,
                train_dataset=dataset,
                tools=[scripted_turns.multiply],
                max_completion_length=length,
                max_steps=1,
            ).train()
    assert len(prompts) == 4
    found = [record.getMessage() for record in caplog.records if OUTSIDE in record.getMessage()]
    if length == 140:
        assert found == []
    else:
        (message,) = found
        assert message.startswith(f"{OUTSIDE} {prompts[0] + 141} tokens")


@pytest.mark.parametrize("fits", [True, False])
def test_a_teacher_s_prompt_beyond_the_context_has_no_loss(tmp_path: Path, fits: bool) -> None:
    def longer(attempt: Attempt) -> Any:
        return tiny.user("x" * 80)

    trainer = tiny.trainer(tmp_path, start=rotary(160 if fits else 80), teacher_prompt_func=longer)
    trainer.train()
    fractions = [
        entry["self_distillation/dropped_reprompt_fraction"]
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    assert fractions == [0.0 if fits else 1.0] * 2


def calls(length: int | None = 4) -> GenerationCalls:
    return GenerationCalls(torch.device("cpu"), context_length=10, max_completion_length=length)


@pytest.mark.parametrize(
    ("length", "error", "explained"),
    [
        (7, IndexError("index out of range in self"), True),
        (7, RuntimeError("index 10 is out of bounds for dimension 1 with size 10"), True),
        (7, RuntimeError("CUDA error: device-side assert triggered"), True),
        (6, IndexError("index out of range in self"), False),
        (6, RuntimeError("CUDA error: device-side assert triggered"), False),
        (7, RuntimeError("CUDA out of memory"), False),
        (7, KeyError("out of range"), False),
        (7, IndexError("list index out of range"), False),
        (7, RuntimeError("select(): index 9 out of range for tensor of size [3] at dimension 0"), False),
    ],
)
def test_only_an_error_of_a_table_of_positions_is_explained(
    length: int, error: Exception, explained: bool
) -> None:
    def generate(prompt_ids: Any) -> Any:
        raise error

    with pytest.raises(Exception) as caught:
        calls().call(generate, [[5], [5] * length])
    if explained:
        assert isinstance(caught.value, ValueError)
        assert caught.value.__cause__ is error
        assert "got a prompt of 7 and max_completion_length=4" in str(caught.value)
    else:
        assert caught.value is error


def test_completions_without_a_limit_never_fit() -> None:
    def generate(prompt_ids: Any) -> Any:
        raise IndexError("index out of range in self")

    with pytest.raises(ValueError, match="got a prompt of 1 and max_completion_length=None"):
        calls(None).call(generate, [[5]])


def test_a_row_of_exactly_the_context_is_not_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    found = calls()
    with caplog.at_level(logging.WARNING, logger="sdpo_rl"):
        found.call(lambda prompt_ids: ([[1] * 4, [1]], None), [[5] * 6, [5] * 7])
        assert caplog.records == []
        found.call(lambda prompt_ids: ([[1] * 4, [1]], None), [[5] * 7, [5] * 7])
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{OUTSIDE} 11 tokens, more than the model's context of 10.")
