"""Packed rows that read a prompt in common once have the losses and gradients of padded ones, and never mix."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from test_packing import GPT2, OTHERS, PACKABLE, Rows, batch_of, build, gradient, losses
from torch import Tensor, nn

from sdpo_rl.step import forward as step_forward
from sdpo_rl.step import model_check, packing, prefixes
from sdpo_rl.step.head import head_transform
from sdpo_rl.step.model_check import row_attention_problem

# Two groups of a prompt, a prompt that begins like theirs, one that another continues, and one of its own.
ROWS = [([5, 6, 7], [8, 9, 10, 11]), ([5, 6, 19, 20, 21, 22, 23], [24]), ([5, 6, 7], [17]), ([4], [5, 6]),
        ([5, 6, 7], [21, 22, 23, 24, 25, 26, 27]), ([5, 6, 7, 9], [31, 32, 33])]  # fmt: skip
SHARING = [name for name in PACKABLE if name != "llama, eager"]


def shared_calls(rows: Rows, token_limit: float = math.inf) -> list[packing.ModelCall]:
    batch = batch_of(rows)
    found = prefixes.shared_prefixes(batch)
    chosen = prefixes.prefix_rows(batch.sizes, found, token_limit=token_limit)
    return packing.model_calls(batch, "packed", chosen, prefixes=found)


def shared_losses(model: Any, rows: Rows, *, token_limit: float = math.inf) -> list[Tensor]:
    """As `losses`, with each prompt read once."""
    length = max(len(completion) for _, completion in rows)
    calls = shared_calls(rows, token_limit)
    head = packing.run_calls(
        partial(step_forward.completion_head, model, model),
        calls,
        arguments=[step_forward.call_arguments(model, call) for call in calls],
        rows=len(rows),
        length=length,
    )
    transform = head_transform(model.config)
    logits = nn.functional.linear(head.hidden, head.weight, head.bias) * transform.logit_scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    log_probs = logits.log_softmax(-1)
    return [-log_probs[i, range(len(completion)), completion].sum() for i, (_, completion) in enumerate(rows)]


def test_prompts_are_read_once() -> None:
    (call,) = shared_calls(ROWS)
    prompts = {
        (4,),
        (5,),
        (5, 6),
        (5, 6, 7),
        (5, 6, 7, 9),
        *((5, 6, 19, 20, 21, 22, 23)[:n] for n in range(3, 8)),
    }
    assert call.ids.numel() == len(prompts) + sum(len(completion) for _, completion in ROWS)


@pytest.mark.parametrize("name", SHARING)
def test_losses_and_gradients_are_those_of_padded_rows(name: str) -> None:
    model = PACKABLE[name]()
    expected = torch.stack(losses(model, ROWS, "padded"))
    wanted = gradient(model, expected.sum())
    for token_limit in (math.inf, 14):
        got = torch.stack(shared_losses(model, ROWS, token_limit=token_limit))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        assert (gradient(model, got.sum()) - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_they_are_in_double_precision(checkpointed: bool) -> None:
    """GPT-2 has no layer that computes in float32."""
    model = build("GPT2", GPT2, head="LMHeadModel", attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0).double()
    expected = torch.stack(losses(model, ROWS, "padded"))
    wanted = gradient(model, expected.sum())
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    got = torch.stack(shared_losses(model, ROWS))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert (gradient(model, got.sum()) - wanted).norm() < 1e-12 * wanted.norm()


@pytest.mark.parametrize("name", ["llama", "gemma2, soft-capped", "lora"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_they_are_when_activations_are_computed_again(name: str, reentrant: bool) -> None:
    """In the backward pass, when nothing but the arguments says what the rows are."""
    model = PACKABLE[name]()
    expected = torch.stack(losses(model, ROWS, "padded"))
    wanted = gradient(model, expected.sum())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    model.train()
    torch.stack(shared_losses(model, ROWS)).sum().backward()
    got = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert (got - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("name", SHARING)
def test_other_tokens_in_one_row_change_no_other_row(name: str) -> None:
    """Neither its completion, nor its prompt when it is no longer that of its group."""
    model = PACKABLE[name]().double()
    before = shared_losses(model, ROWS)
    for changed in (([5, 6, 7], [38, 37, 36, 35]), ([5, 39, 7], [8, 9, 10, 11])):
        after = shared_losses(model, [changed, *ROWS[1:]])
        for row in range(1, len(ROWS)):
            torch.testing.assert_close(before[row], after[row], rtol=1e-12, atol=1e-12)
            # The norms of most models compute in float32, whose sums depend on what else they add.
            wanted = gradient(model, before[row])
            assert (gradient(model, after[row]) - wanted).norm() <= 1e-6 * wanted.norm()
        assert (before[0] - after[0]).abs() > 1e-3


def test_an_attention_that_sees_the_sequence_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counter-example: every completion sees the completions before it."""
    model = build("Llama")
    expected = torch.stack(losses(model, ROWS, "padded"))

    def causal(config: Any, rows: Any, device: Any) -> None:
        return None

    monkeypatch.setattr(step_forward, "row_masks", causal)
    got = torch.stack(shared_losses(model, ROWS))
    assert ((got - expected).abs() > 1e-3).any()


# --- the test of the model --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", SHARING)
def test_a_model_may_read_prompts_once(name: str, dtype: torch.dtype) -> None:
    model = PACKABLE[name]().to(dtype)
    window = getattr(model.config, "sliding_window", None)
    assert row_attention_problem(model, batch_of(ROWS)) == ""
    assert getattr(model.config, "sliding_window", None) == window


DECLARED = {
    "llama, eager": "'eager', not 'sdpa'",
    "recurrent gemma": "attention_window_size",
    "bloom, alibi": "'eager', not 'sdpa'",
    "falcon, alibi": "does not take such a mask",
    "jamba, recurrent layers": "change by .* with the tokens of another row",
}


@pytest.mark.parametrize("name", DECLARED)
def test_a_model_that_may_not(name: str) -> None:
    reason = row_attention_problem({**PACKABLE, **OTHERS}[name](), batch_of(ROWS))
    assert re.search(DECLARED[name], reason)


def test_a_window_that_the_mask_lacks_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """In rows far shorter than the window."""
    model = build("Mistral", sliding_window=4096)
    assert row_attention_problem(model, batch_of(ROWS)) == ""
    true = step_forward.row_masks

    def without_window(config: Any, rows: Any, device: Any) -> Any:
        return true(type("Config", (), {}), rows, device)

    monkeypatch.setattr(step_forward, "row_masks", without_window)
    assert "differ by" in row_attention_problem(model, batch_of(ROWS))


def test_a_leak_between_completions_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    def causal(config: Any, rows: Any, device: Any) -> Tensor:
        tokens = sum(rows.own)
        return torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=device).tril()

    monkeypatch.setattr(step_forward, "row_masks", causal)
    assert "tokens of another row" in row_attention_problem(build("Qwen2"), batch_of(ROWS))


def test_positions_that_restart_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    true = packing.pack_prefixes

    def restart(*args: Any) -> packing.ModelCall:
        call = true(*args)
        assert call.rows is not None
        return call._replace(positions=torch.cat([torch.arange(own) for own in call.rows.own])[None])

    monkeypatch.setattr(model_check, "pack_prefixes", restart)
    assert "differ by" in row_attention_problem(build("Qwen2"), batch_of(ROWS))


def test_a_compiled_model_and_another_library_s_are_refused() -> None:
    model = build("Llama")
    model.max_seq_length = 64
    assert "not that of transformers" in row_attention_problem(model, batch_of(ROWS))
    compiled = torch.compile(build("Llama"), backend="eager")
    assert row_attention_problem(compiled, batch_of(ROWS)) == "it is compiled"


def test_prefix_tuning_takes_no_packed_rows() -> None:
    """Its keys are more than the sequence's."""
    model = get_peft_model(
        build("Llama"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    ).eval()
    assert model_check.supported_layout(model, batch_of(ROWS)).layout != "packed"
