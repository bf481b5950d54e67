"""LM heads that cannot be fused, and one beside adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftConfig, get_peft_model
from reference_step import trainable
from trainer_logs import same

IN_THE_HEAD: dict[str, tuple[Callable[[], PeftConfig], bool]] = {
    "trained tokens of a tied embedding": (
        lambda: LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[80, 81]),
        True,
    ),
    "trained tokens of the head": (
        lambda: LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"lm_head": [80]}),
        False,
    ),
    "ia3": (lambda: IA3Config(target_modules=["lm_head", "q_proj"], feedforward_modules=[]), False),
    "loha": (lambda: LoHaConfig(r=2, target_modules=["lm_head", "q_proj"]), False),
}


def with_an_adapted_head(folder: Path, name: str, backend: str, patch: pytest.MonkeyPatch) -> Any:
    # Some releases of TRL refuse some of these for the sake of its own loss.
    patch.setattr("trl.trainer.grpo_trainer.BaseTunerLayer", type("NoTunerLayer", (), {}), raising=False)
    make, tied = IN_THE_HEAD[name]
    torch.manual_seed(0)
    model = get_peft_model(tiny.model(tie_word_embeddings=tied), make())
    return tiny.trainer(folder, start=model, sdpo_config=tiny.config(loss_backend=backend))


@pytest.mark.parametrize("name", IN_THE_HEAD)
def test_an_adapted_head_is_trained_with_whole_logits(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ends = {}
    for backend in ("auto", "logits"):
        trainer = with_an_adapted_head(tmp_path, name, backend, monkeypatch)
        before = trainable(trainer.model)
        caplog.clear()
        trainer.train()
        ends[backend] = trainable(trainer.model)
        assert not trainer._forward_mode.fused
        warned = [r for r in caplog.records if "falling back to loss_backend='logits'" in r.getMessage()]
        assert len(warned) == (backend == "auto")
        head = [n for n in before if "lm_head" in n or "token" in n]
        assert head
        assert any(not torch.equal(before[n], ends[backend][n]) for n in head)
    assert same(ends["auto"], ends["logits"])


@pytest.mark.parametrize("name", IN_THE_HEAD)
def test_an_explicit_backend_refuses_an_adapted_head(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = with_an_adapted_head(tmp_path, name, "torch", monkeypatch)
    with pytest.raises(
        ValueError, match=r"LM head: expected a plain linear layer, got peft\.\S+, .*loss_backend='logits'"
    ):
        trainer.train()


def test_the_reference_of_a_head_beside_adapters_is_the_head_that_training_began_with(
    tmp_path: Path,
) -> None:
    ends = {}
    for backend in ("auto", "logits"):
        torch.manual_seed(0)
        trainer = tiny.trainer(
            tmp_path,
            start=tiny.model(tie_word_embeddings=False),
            peft_config=LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
            sdpo_config=tiny.config(grpo_weight=0.5, is_clip=2.0, loss_backend=backend),
            beta=0.3,
            learning_rate=1e-2,
            max_steps=3,
        )
        trainer.train()
        assert trainer._forward_mode.fused == (backend == "auto")
        ends[backend] = trainable(trainer.model)
    for name, end in ends["auto"].items():
        torch.testing.assert_close(end, ends["logits"][name], rtol=1e-4, atol=1e-4)
