"""The fused LoRA forward in a training step: where it is used, and that loss and gradients equal PEFT's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lora_cases import Operations, count_fused
from peft import LoraConfig, PeftModel, get_peft_model
from reference_step import Recorder
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from sdpo_rl import trainer as trainer_module
from sdpo_rl.compat import peft_lora, unsloth_lora

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYERS = 2 * len(LINEAR)


def lora_model() -> PeftModel:
    config = LoraConfig(
        r=4, lora_alpha=7, target_modules=LINEAR, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return get_peft_model(tiny.model(), config)


def run(output: Path, **changes: Any) -> Any:
    settings = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 3, "num_iterations": 2}
    return tiny.trainer(output, start=lora_model(), **{**settings, **changes})


def trained(trainer: Any) -> list[tuple[float, dict[str, Tensor]]]:
    """Loss and gradients of each step."""
    recorder = Recorder(trainer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return [(loss, step.gradients) for loss, step in zip(losses, recorder.steps, strict=True)]


@contextmanager
def forward_of_peft() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peft_lora, "fused_lora_forward", lambda model: nullcontext())
        yield


CHECKPOINTING: dict[str, dict[str, Any]] = {
    "no checkpointing": {},
    "checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "checkpointing, as the trainer chooses": {"gradient_checkpointing": True},
    "checkpointing, reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
}


@pytest.mark.parametrize("backend", ["torch", "logits"])
@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_a_step_has_the_loss_and_the_gradients_of_peft(tmp_path: Path, kind: str, backend: str) -> None:
    settings = {**CHECKPOINTING[kind], "sdpo_config": tiny.config(loss_backend=backend)}
    with forward_of_peft():
        expected = trained(run(tmp_path, **settings))
    trainer = run(tmp_path, **settings)
    result = trained(trainer)
    logged = [entry["self_distillation/teacher_distance"] for entry in trainer.state.log_history[:-1]]
    assert logged[-1] > 1e-3, "the teacher equals the student"
    for (loss, gradients), (expected_loss, expected_gradients) in zip(result, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-5, abs=1e-7)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-5, atol=1e-5)
    assert max(gradient.abs().max() for gradient in result[0][1].values()) > 1e-3


@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_a_step_has_fewer_operations(tmp_path: Path, kind: str) -> None:
    counts = []
    for fused in (False, True):
        trainer = run(tmp_path, max_steps=1, **CHECKPOINTING[kind])
        step = trainer.training_step

        def counted(*args: Any, step: Any = step, **kwargs: Any) -> Tensor:
            with Operations() as operations:
                loss = step(*args, **kwargs)
            counts.append(operations.counts)
            return loss

        trainer.training_step = counted
        with nullcontext() if fused else forward_of_peft():
            trainer.train()
    peft, fused = counts
    # The teacher, the student, its recomputation.
    forwards = 2 + (kind != "no checkpointing")
    # Non-reentrant recomputation stops before the last scaling and sum of each of the two blocks.
    stopped = 2 if kind == "checkpointing" else 0
    # Without checkpointing the embeddings need no gradient, and three layers compute none for their input.
    to_inputs = LAYERS - (3 if kind == "no checkpointing" else 0)
    assert fused["addmm_"] - peft["addmm_"] == forwards * LAYERS + to_inputs
    assert peft["mul"] - fused["mul"] == (forwards + 1) * LAYERS - stopped
    assert peft["add"] - fused["add"] == forwards * LAYERS - stopped + to_inputs
    assert fused["clone"] <= peft["clone"]
    assert fused["copy_"] <= peft["copy_"]


def watched(trainer: Any) -> list[tuple[str, int]]:
    """For each forward its purpose and the number of layers with the fused forward."""
    model, seen = trainer.model, []
    loss, step = trainer.compute_loss, trainer.training_step
    purpose = ["generation"]

    def compute_loss(*args: Any, **kwargs: Any) -> Tensor:
        purpose.append("loss" if trainer.model.training else "evaluation")
        try:
            return loss(*args, **kwargs)
        finally:
            purpose.pop()

    def training_step(*args: Any, **kwargs: Any) -> Tensor:
        try:
            return step(*args, **kwargs)
        finally:
            seen.append(("after a step", count_fused(model)))

    trainer.compute_loss, trainer.training_step = compute_loss, training_step
    # Inside the base model: PEFT 0.18 calls that one without its hooks.
    model.get_base_model().model.register_forward_pre_hook(
        lambda *_: seen.append((purpose[-1], count_fused(model)))
    )
    return seen


@pytest.mark.parametrize("enabled", [True, False])
def test_only_the_loss_and_its_gradient_use_it(tmp_path: Path, enabled: bool) -> None:
    trainer = run(
        tmp_path,
        sdpo_config=tiny.config(enabled=enabled),
        eval_dataset=tiny.conversations(4),
        eval_strategy="steps",
        eval_steps=1,
        num_generations_eval=4,
        per_device_eval_batch_size=4,
    )
    seen = watched(trainer)
    trainer.train()
    during = LAYERS if enabled else 0
    assert set(seen) == {("generation", 0), ("loss", during), ("evaluation", 0), ("after a step", 0)}


def test_the_forward_of_peft_is_back_after_a_failed_step(tmp_path: Path) -> None:
    trainer = run(tmp_path)
    seen = []

    def fail(loss: Tensor, **kwargs: Any) -> None:
        seen.append(count_fused(trainer.model))
        raise ZeroDivisionError

    trainer.accelerator.backward = fail
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert seen == [LAYERS]
    assert count_fused(trainer.model) == 0
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.compute_loss(trainer.model, inputs)
    assert count_fused(trainer.model) == 0, "a loss outside of a step"


def test_adapters_may_be_merged_during_the_rollout(tmp_path: Path) -> None:
    """An inference engine merges them, and so may a reward function."""
    expected = trained(run(tmp_path))

    def merging(completions: list[Any], **columns: Any) -> Any:
        trainer.model.merge_adapter()
        trainer.model.unmerge_adapter()
        return tiny.judge(completions, **columns)

    trainer = run(tmp_path, reward_funcs=merging)
    for (loss, gradients), (expected_loss, expected_gradients) in zip(
        trained(trainer), expected, strict=True
    ):
        assert loss == pytest.approx(expected_loss, rel=1e-4)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-4)


def save_products(ctx: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    is_product = operation.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
    return CheckpointPolicy.MUST_SAVE if is_product else CheckpointPolicy.PREFER_RECOMPUTE


SELECTIVE = {
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {
        "use_reentrant": False,
        "context_fn": partial(create_selective_checkpoint_contexts, save_products),
    },
}


def test_it_is_off_where_a_checkpoint_saves_products(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = run(tmp_path, **SELECTIVE)
    seen = watched(trainer)
    trainer.train()
    assert ("loss", 0) in seen
    monkeypatch.setattr(trainer_module.SDPOTrainer, "_may_fuse_lora", True)
    with pytest.raises(RuntimeError, match="mutated"):
        run(tmp_path, **SELECTIVE).train()


def test_it_is_off_where_the_model_is_compiled(tmp_path: Path) -> None:
    trainer = run(tmp_path)
    assert trainer._may_fuse_lora
    trainer.args.torch_compile = True
    seen = watched(trainer)
    trainer.train()
    assert ("loss", 0) in seen


@pytest.mark.parametrize("on", [True, False])
def test_under_unsloth_its_function_takes_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on: bool
) -> None:
    trainer = run(tmp_path, max_steps=2, num_iterations=1, sdpo_config=tiny.config(fused_lora_forward=on))
    entered: list[Any] = []

    @contextmanager
    def fused_attention(model: Any) -> Iterator[None]:
        entered.append(model)
        yield

    monkeypatch.setattr(trainer_module, "_IS_UNSLOTH", True)
    monkeypatch.setattr(unsloth_lora, "fused_attention", fused_attention)
    seen = watched(trainer)
    trainer.train()
    assert ("loss", 0) in seen
    assert entered == [trainer.model] * 2 * on
