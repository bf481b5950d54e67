"""What users of GRPO expect of the trainer: its arguments, GRPO itself where it is disabled."""

from __future__ import annotations

import inspect
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import trl
from peft import LoraConfig
from reference_step import Recorder, trainable
from trainer_logs import FOUR, PREFIX, logs, same
from transformers import ProgressCallback, TrainerCallback

import sdpo_rl
from sdpo_rl import SDPOConfig, SDPOTrainer
from sdpo_rl import trainer as trainer_module
from sdpo_rl.compat import unsloth as unsloth_compat


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
@pytest.mark.parametrize("split", [{}, FOUR], ids=["one micro-batch", "four"])
def test_disabled_is_grpo(tmp_path: Path, loss_type: str, split: dict[str, Any]) -> None:
    """On-policy the ratio is 1, and the loss −A·log p: a mean per row and then over rows, or over all tokens."""
    trainer = tiny.trainer(
        tmp_path,
        sdpo_config=tiny.config(enabled=False),
        loss_type=loss_type,
        temperature=0.8,
        max_steps=3,
        **split,
    )
    recorder = Recorder(trainer)
    trainer.train()
    model = tiny.model()
    for step in recorder.steps:
        model.load_state_dict(step.before, strict=False)
        per_row = []
        for row in step.rows:
            rewards = torch.tensor([tiny.score(r.text) for r in (row, *row.peers)])
            advantage = (rewards[0] - rewards.mean()) / (rewards.std() + 1e-4)
            ids = torch.tensor([row.prompt_ids + row.completion])
            logits = model(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1] / 0.8
            log_probs = logits.log_softmax(-1).gather(-1, ids[0, len(row.prompt_ids) :, None])
            per_row.append(-advantage * log_probs.flatten())
        by_row = torch.stack([row.mean() for row in per_row]).mean()
        loss = by_row if loss_type == "grpo" else torch.cat(per_row).mean()
        named = dict(model.named_parameters())
        gradients = torch.autograd.grad(loss, list(named.values()))
        norm = torch.stack([g.norm() for g in gradients]).norm()
        for name, gradient in zip(named, gradients, strict=True):
            assert (gradient - step.gradients[name]).norm() < 1e-5 * norm, name


def test_disabled_logs_nothing_of_sdpo_and_needs_no_signal(tmp_path: Path) -> None:
    trainer = tiny.trainer(
        tmp_path,
        sdpo_config=SDPOConfig(enabled=False, k=10**6),
        num_iterations=2,
        beta=0.0,
        eval_dataset=tiny.conversations(2),
    )
    trainer.train()
    trainer.evaluate()
    assert not [name for entry in trainer.state.log_history for name in entry if PREFIX in name]
    assert logs(trainer, "entropy")
    assert logs(trainer, "rewards/judge/mean")


def test_the_options_of_a_trainer_cannot_be_exchanged_or_changed(tmp_path: Path) -> None:
    config = tiny.config(apply_chat_template_kwargs={"tag": "a"})
    trainer = tiny.trainer(tmp_path, sdpo_config=config)
    config.apply_chat_template_kwargs["tag"] = "b"
    assert trainer.sdpo_config.template_kwargs == {"tag": "a"}
    with pytest.raises(AttributeError, match="sdpo_config"):
        trainer.sdpo_config = config
    with pytest.raises(AttributeError, match="alpha: expected no change"):
        trainer.sdpo_config.alpha = 0.1


def test_it_is_a_grpo_trainer(tmp_path: Path) -> None:
    assert isinstance(tiny.trainer(tmp_path), trl.GRPOTrainer)


def test_the_positional_order_is_that_of_grpo(tmp_path: Path) -> None:
    ours, theirs = (list(inspect.signature(cls).parameters) for cls in (SDPOTrainer, trl.GRPOTrainer))
    positional = ours[: ours.index("sdpo_config")]
    assert positional == theirs[: len(positional)]
    assert positional[-1] == "optimizers"
    assert inspect.signature(SDPOTrainer).parameters["sdpo_config"].kind is inspect.Parameter.KEYWORD_ONLY
    optimizer = torch.optim.SGD(tiny.model().parameters())
    given = (
        tiny.model(), tiny.judge, tiny.arguments(tmp_path), tiny.conversations(4), tiny.conversations(8),
        tiny.tokenizer(), None, [ProgressCallback()], (optimizer, None),
    )  # fmt: skip
    trainer = SDPOTrainer(*given, sdpo_config=tiny.config(k=3))
    assert trainer.args is given[2]
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (4, 8)
    assert trainer.processing_class is given[5]
    assert trainer.optimizer is optimizer
    assert trainer.sdpo_config.k == 3
    assert [reward.__name__ for reward in trainer.reward_funcs] == ["judge"]
    with pytest.raises(TypeError, match="reward_funcs"):
        SDPOTrainer(tiny.model(), tiny.arguments(tmp_path))
    with pytest.raises(TypeError, match="args"):
        SDPOTrainer(tiny.model(), tiny.judge, tiny.config())


@pytest.mark.parametrize("fused", [True, False])
def test_lora_layers_have_the_forward_of_peft_where_the_fused_one_is_off(tmp_path: Path, fused: bool) -> None:
    trainer = tiny.trainer(
        tmp_path,
        sdpo_config=tiny.config(fused_lora_forward=fused),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
        max_steps=1,
    )
    layer = next(m for name, m in trainer.model.named_modules() if name.endswith("q_proj"))
    replaced: list[bool] = []
    trainer.model.register_forward_pre_hook(lambda *_: replaced.append("forward" in vars(layer)))
    trainer.train()
    assert any(replaced) == fused
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("enabled", [True, False])
def test_unsloth_s_attention_is_changed_for_sdpo_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, enabled: bool
) -> None:
    """Unsloth's GRPO packs rows, too; with `enabled=False` its numbers are Unsloth's."""
    changed: list[bool] = []
    monkeypatch.setattr(trainer_module, "_IS_UNSLOTH", True)
    monkeypatch.setattr(unsloth_compat, "check_construction", lambda *_: None)
    monkeypatch.setattr(unsloth_compat, "use_varlen_kernel", lambda: changed.append(True))
    tiny.trainer(tmp_path, sdpo_config=tiny.config(enabled=enabled))
    assert changed == [True] * enabled


def test_a_trainer_patched_too_late_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl, "GRPOTrainer", type("Patched", (trl.GRPOTrainer,), {}))
    with pytest.raises(RuntimeError, match=r"(?s)patched after.*PatchFastRL.*from sdpo_rl import"):
        tiny.trainer(tmp_path)


def test_a_model_by_its_name(tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path / "model")
    tokenizer = tiny.tokenizer()
    assert tokenizer("a{}\n<user>")["input_ids"] == [tiny.VOCABULARY.index(t) for t in [*"a{}\n", "<user>"]]
    trainer = tiny.trainer(tmp_path / "out", start=str(tmp_path / "model"), processing_class=tokenizer)
    trainer.train()
    counter_example = tiny.trainer(tmp_path / "counter-example")
    counter_example.train()
    assert same(trainable(trainer.model), trainable(counter_example.model))


def test_a_process_that_sees_several_gpus_is_refused(tmp_path: Path) -> None:
    """By TRL: the Trainer would use `nn.DataParallel`."""
    arguments = tiny.arguments(tmp_path)
    assert arguments.n_gpu <= 1
    arguments._n_gpu = 2
    with pytest.raises(ValueError, match=r"nn\.DataParallel.*accelerate launch.*CUDA_VISIBLE_DEVICES"):
        SDPOTrainer(
            model=tiny.model(),
            args=arguments,
            sdpo_config=tiny.config(),
            processing_class=tiny.tokenizer(),
            reward_funcs=tiny.judge,
            train_dataset=tiny.conversations(),
        )


def test_callbacks_are_called(tmp_path: Path) -> None:
    seen: Counter[str] = Counter()

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen["step"] += 1

        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
            seen["divergence"] += f"{PREFIX}divergence" in logs

    tiny.trainer(tmp_path, callbacks=[Watch()], max_steps=3).train()
    assert seen == {"step": 3, "divergence": 3}


def test_one_class_one_name() -> None:

    assert sdpo_rl.SDPOTrainer is SDPOTrainer
    with pytest.raises(AttributeError, match="no attribute 'SDPOTrianer'"):
        _ = sdpo_rl.SDPOTrianer
    assert {"SDPOConfig", "SDPOTrainer", "training_arguments"} <= set(dir(sdpo_rl))
