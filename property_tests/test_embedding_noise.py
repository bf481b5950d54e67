"""`GRPOConfig(neftune_noise_alpha=...)`: noise on the student's embeddings, at most α/√(L·D) for L tokens."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from torch import Tensor
from transformers import TrainerCallback

from sdpo_rl import SDPOTrainer

ALPHA, NEW = 5.0, 8


class Embedded(TrainerCallback):
    """Records the width of every call of the embeddings that adds noise, and the largest noise."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        model.get_input_embeddings().register_forward_hook(self.record)  # after the one that adds the noise

    def record(self, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        noise = (output - module.weight[inputs[0]]).detach().abs().max().item()
        if noise > 0.0:
            self.calls.append((inputs[0].shape[1], noise))


def make(folder: Path, callback: TrainerCallback, packing: str) -> SDPOTrainer:
    return tiny.trainer(
        folder,
        sdpo_config=tiny.config(packing=packing),
        callbacks=[callback],
        eval_dataset=tiny.conversations(4),
        neftune_noise_alpha=ALPHA,
        max_completion_length=NEW,
        max_steps=1,
    )


def check_noise(trainer: SDPOTrainer, embedded: Embedded) -> None:
    """No call of the embeddings has the noise of a row longer than the longest."""
    prompts = [len(row["prompt"][0]["content"]) for row in tiny.conversations()]
    longest = max(prompts) + 2 + NEW  # a token per character, and the marks of the two turns
    width = trainer.model.config.hidden_size
    assert embedded.calls
    for tokens, noise in embedded.calls:
        assert 0.95 * ALPHA / math.sqrt(tokens * width) < noise <= 1.001 * ALPHA / math.sqrt(tokens * width)
        assert tokens <= longest


@pytest.mark.parametrize(
    ("packing", "layout", "evaluates_first"),
    [("auto", "groups", False), ("auto", "groups", True), ("padded", "padded", False)],
    ids=["auto", "evaluates first", "padded"],
)
def test_noise_is_that_of_rows(tmp_path: Path, packing: str, layout: str, evaluates_first: bool) -> None:
    embedded = Embedded()
    trainer = make(tmp_path, embedded, packing)
    if evaluates_first:  # chooses the layout before the embeddings have noise
        trainer.evaluate()
        assert not embedded.calls
    trainer.train()
    assert trainer._forward_mode.layout.layout == layout
    check_noise(trainer, embedded)


def test_packed_rows_are_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = SDPOTrainer._step_context
    monkeypatch.setattr(
        SDPOTrainer, "_step_context", lambda *args: replace(context(*args), embedding_noise=False)
    )
    embedded = Embedded()
    trainer = make(tmp_path, embedded, "auto")
    trainer.train()
    with pytest.raises(AssertionError):
        check_noise(trainer, embedded)


def test_packed_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"packing: expected .* 'packed', got .*neftune_noise_alpha"):
        make(tmp_path, Embedded(), "packed").train()
