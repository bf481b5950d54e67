"""The trainer's forwards beside those of its loss: old log-probabilities, GRPO's own, models that read padding."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import transformers
from reference_step import compare
from test_fused_work import Recorder
from torch import Tensor, nn

import sdpo
from sdpo_rl.step import micro_batch, model_check
from sdpo_rl.step.batch import left_pad

TOLERANCE = 5e-6
LENGTH = 3
ROWS = [[9, 20, 30, 40, 50, 60, 70], [10, 21, 31, 41, 51], [11, 22, 32, 42]]


def batch() -> tuple[Tensor, Tensor, int]:
    """Rows padded on the left, and one of two completion tokens on the right."""
    ids, mask = left_pad(ROWS, pad_id=0, device=torch.device("cpu"))
    mask[1, -1] = 0
    return ids, mask, LENGTH


def row_by_row(model: nn.Module, temperature: float = 1.0) -> Tensor:
    """The log-probabilities [B, T] of every row alone and without padding."""
    expected = torch.zeros(len(ROWS), LENGTH)
    with torch.no_grad():
        for i, row in enumerate(ROWS):
            logits = model(input_ids=torch.tensor([row])).logits[0, -LENGTH - 1 : -1] / temperature
            expected[i] = logits.log_softmax(-1).gather(-1, torch.tensor(row[-LENGTH:])[:, None])[:, 0]
    return expected


# --- old log-probabilities --------------------------------------------------------------------------------


def absolute() -> nn.Module:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=len(tiny.VOCABULARY), n_embd=16, n_layer=2, n_head=2, n_positions=64,
            initializer_range=0.3, bos_token_id=2, eos_token_id=1,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip


def rwkv() -> nn.Module:
    torch.manual_seed(0)
    model = transformers.RwkvForCausalLM(
        transformers.RwkvConfig(
            vocab_size=len(tiny.VOCABULARY), hidden_size=32, num_hidden_layers=2, context_length=128,
            bos_token_id=2, eos_token_id=1, pad_token_id=0,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.2)
    model.generation_config.eos_token_id = [1, *range(6, len(tiny.VOCABULARY), 6)]
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "relative positions": tiny.model,
    "absolute positions": absolute,
    "reads padding": rwkv,
}


@pytest.mark.parametrize("rows", [None, 2])
@pytest.mark.parametrize("name", MODELS)
def test_old_log_probabilities_are_those_of_each_row_alone(
    tmp_path: Path, name: str, rows: int | None
) -> None:
    trainer = tiny.trainer(
        tmp_path, start=MODELS[name](), temperature=0.7, sdpo_config=tiny.config(loss_backend="auto")
    )
    got, *others = trainer._get_per_token_logps_and_entropies(trainer.model, *batch(), batch_size=rows)
    assert others == [None, None]
    expected = row_by_row(trainer.model, 0.7)
    mask = batch()[1][:, -LENGTH:].bool()
    torch.testing.assert_close(got[mask], expected[mask], rtol=1e-4, atol=1e-4)


def largest_tensor(path: Path, backend: str) -> int:
    trainer = tiny.trainer(
        path,
        start=tiny.model(vocab_size=5000),
        sdpo_config=tiny.config(loss_backend=backend, loss_chunk_size=4),
    )
    ids = torch.randint(5000, (8, 64))
    arguments = trainer.model, ids, torch.ones_like(ids), 60
    trainer._get_per_token_logps_and_entropies(*arguments)  # the check of the model is behind
    with Recorder() as recorder:
        trainer._get_per_token_logps_and_entropies(*arguments)
    return recorder.largest


def test_old_log_probabilities_need_no_whole_logits(tmp_path: Path) -> None:
    assert largest_tensor(tmp_path, "torch") < 8 * 60 * 5000 / 10
    assert largest_tensor(tmp_path, "logits") >= 8 * 60 * 5000


# --- GRPO's own -------------------------------------------------------------------------------------------


def test_disabled_gives_the_model_all_that_grpo_gives_it(tmp_path: Path) -> None:
    """Images reach the model, in the batches of their rows, with TRL's own arguments."""
    trainer = tiny.trainer(tmp_path, sdpo_config=tiny.config(enabled=False))
    seen: list[dict[str, Any]] = []

    def model(**inputs: Any) -> Any:
        seen.append(inputs)
        return SimpleNamespace(log_probs=torch.zeros(inputs["input_ids"].shape))

    pixels = torch.arange(3.0)[:, None]
    trainer._get_per_token_logps_and_entropies(
        model, *batch(), batch_size=2, pixel_values=pixels, num_images=[1, 1, 1]
    )
    assert [inputs["pixel_values"].flatten().tolist() for inputs in seen] == [[0.0, 1.0], [2.0]]
    assert all(inputs["fused_lm_head"] for inputs in seen)


def half_precision_head() -> nn.Module:
    return tiny.model().to(torch.bfloat16)


@pytest.mark.parametrize("cast", [True, False])
def test_disabled_has_the_head_in_float32_where_grpo_has(tmp_path: Path, cast: bool) -> None:
    trainer = tiny.trainer(
        tmp_path,
        start=half_precision_head(),
        sdpo_config=tiny.config(enabled=False),
        cast_lm_head_to_fp32=cast,
    )
    with torch.no_grad():
        ids, mask, length = batch()
        got, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, length)
        hidden = trainer.model.model(input_ids=ids, attention_mask=mask).last_hidden_state[
            :, -length - 1 : -1
        ]
    exact = (hidden.float() @ trainer.model.lm_head.weight.float().T).log_softmax(-1)
    expected = exact.gather(-1, ids[:, -length:, None])[..., 0]
    kept = mask[:, -length:].bool()
    gap = (got - expected)[kept].abs().max()
    assert (gap < 1e-5) == cast
    assert gap < 0.1


@pytest.mark.parametrize("backend", ["torch", "logits"])
@pytest.mark.parametrize("cast", [True, False])
def test_the_head_in_float32_is_not_autocast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cast: bool, backend: str
) -> None:
    """Both losses see products of the float32 weight with the hidden states, which autocast would round."""
    gaps: list[float] = []
    hidden: list[Tensor] = []

    def distance(log_probs: Tensor, states: Tensor, weight: Tensor, tokens: Tensor, mask: Tensor) -> None:
        exact = (states.double() @ weight.double().T).log_softmax(-1)
        expected = exact.gather(-1, tokens[..., None])[..., 0]
        gaps.append(float((log_probs - expected)[mask].detach().abs().max()))

    fused, plain = sdpo.fused_distillation_loss, sdpo.token_statistics

    def watch_fused(student: sdpo.LMHead, *args: Any, **kwargs: Any) -> Any:
        output = fused(student, *args, **kwargs)
        distance(output.log_probs, student.hidden, student.weight, args[1], kwargs["loss_mask"])
        return output

    def watch_plain(student: Tensor, teacher: Tensor, tokens: Tensor, **kwargs: Any) -> Any:
        output = plain(student, teacher, tokens, **kwargs)
        states = hidden[-1][:, -tokens.shape[1] - 1 : -1]
        distance(output.log_probs, states, trainer.model.lm_head.weight, tokens, tokens >= 0)
        return output

    monkeypatch.setattr(sdpo, "fused_distillation_loss", watch_fused)
    monkeypatch.setattr(sdpo, "token_statistics", watch_plain)
    trainer = tiny.trainer(
        tmp_path,
        sdpo_config=tiny.config(loss_backend=backend, packing="padded"),
        bf16=True,
        cast_lm_head_to_fp32=cast,
        max_steps=1,
    )
    trainer.model.lm_head.register_forward_pre_hook(lambda module, args: hidden.append(args[0].detach()))
    trainer.train()
    assert gaps
    assert (max(gaps) < 1e-4) == cast


# --- models that read padding -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "logits"])
@pytest.mark.parametrize("changes", [{}, {"num_iterations": 2}], ids=["on-policy", "twice"])
def test_rows_of_a_model_that_reads_padding_run_apart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, backend: str, changes: dict[str, Any]
) -> None:
    trainer = tiny.trainer(
        tmp_path, start=rwkv(), sdpo_config=tiny.config(loss_backend=backend), max_steps=3, **changes
    )
    with caplog.at_level(logging.WARNING, "sdpo_rl"):
        difference = compare(trainer, rwkv())
    assert max(difference.gradient, difference.loss) < 10 * TOLERANCE
    assert sum("RwkvForCausalLM reads the padding" in message for message in caplog.messages) == 1


def test_together_they_change_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_check, "reads_padding", lambda *_: False)
    trainer = tiny.trainer(tmp_path, start=rwkv(), max_steps=1)
    assert compare(trainer, rwkv()).loss > 1e-3


@pytest.mark.parametrize(("rows", "refused"), [(2, True), (1, False)])
def test_on_several_processes_they_must_be_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, refused: bool
) -> None:
    monkeypatch.setattr(micro_batch.StepContext, "in_lockstep", property(lambda self: True))
    trainer = tiny.trainer(
        tmp_path,
        start=rwkv(),
        max_steps=1,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=8 // rows,
    )
    if not refused:
        trainer.train()
        return
    with pytest.raises(ValueError, match="per_device_train_batch_size: expected 1, got 2; RwkvForCausalLM"):
        trainer.train()


def test_other_models_are_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    check = model_check.reads_padding

    def counted(*args: Any) -> bool:
        calls.append(check(*args))
        return calls[-1]

    monkeypatch.setattr(model_check, "reads_padding", counted)
    tiny.trainer(tmp_path, max_steps=3, num_iterations=2).train()
    assert calls == [False]
