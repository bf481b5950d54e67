"""Multimodal models that are trained on text: what has no gradient is frozen, and nothing else.

test_model_families.py has a step of many such models, test_ranks.py runs on two processes.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import model_families
import peft
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_model_families import give_completions
from trl.trainer.utils import use_adapter

from sdpo_rl import SDPOConfig, training_report
from sdpo_rl import trainer as trainer_module
from sdpo_rl.compat.adapters import trainable_preserved
from sdpo_rl.compat.multimodal import freeze_unreached_by_text

# What text does not reach. The last two kinds have no encoder, only projections of patches and of audio.
KINDS = {
    "gemma3": ["model.multi_modal_projector", "model.vision_tower"],
    "gemma4": ["model.audio_tower", "model.embed_audio", "model.embed_vision", "model.vision_tower"],
    "llava": ["model.multi_modal_projector", "model.vision_tower"],
    "mistral3": ["model.multi_modal_projector", "model.vision_tower"],
    "qwen2_5_vl": ["model.visual"],
    "qwen3_5": ["model.visual"],
    "qwen3_vl": ["model.visual"],
    "voxtral": ["model.audio_tower", "model.multi_modal_projector"],
    "fuyu": ["model.vision_embed_tokens"],
    "gemma4_unified": ["model.embed_audio", "model.embed_vision"],
}


def trainable(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def with_gradient(model: Any) -> set[str]:
    """Of the trainable parameters, those that the logits of a text depend on."""
    return trainable(model) - model_families.without_gradient(model)


def adapted(kind: str, **changes: Any) -> Any:
    """A model with adapters on all linear layers, or as `changes` say; both factors have a gradient."""
    settings = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False, **changes}
    return get_peft_model(model_families.random_model(kind), LoraConfig(**settings))


def messages(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [(one.levelname, one.getMessage()) for one in caplog.records if one.name == "sdpo_rl"]


def run(folder: Path, model: Any, **changes: Any) -> Any:
    trainer = tiny.trainer(folder, start=model, **changes)
    give_completions(trainer._unwrapped)
    return trainer


# --- what is frozen ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_has_no_gradient_is_frozen(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model = model_families.random_model(kind)
    everything, expected = trainable(model), with_gradient(model)
    with caplog.at_level(logging.INFO, "sdpo_rl"):
        frozen = freeze_unreached_by_text(model)
    assert trainable(model) == expected
    assert {*frozen} == everything - expected != set()
    parts = ", ".join(KINDS[kind])
    assert messages(caplog) == [
        ("INFO", f"Text does not reach {parts}: {len(frozen)} trainable tensors there are frozen.")
    ]
    assert freeze_unreached_by_text(model) == []
    assert len(messages(caplog)) == 1


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind != "gemma4"]
)  # PEFT cannot adapt its encoders
def test_adapters_without_a_gradient_are_frozen(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(kind)
    everything, expected = trainable(model), with_gradient(model)
    frozen = freeze_unreached_by_text(model)
    assert trainable(model) == expected
    assert len(frozen) == len(everything - expected) > 0
    ((level, message),) = messages(caplog)
    advised = re.search("exclude_modules='(.*)' in", message)
    assert level == "WARNING"
    assert advised is not None
    model = adapted(kind, exclude_modules=advised[1])
    assert freeze_unreached_by_text(model) == []
    assert trainable(model) == expected
    assert len(messages(caplog)) == 1


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["multi_modal_projector", "lm_head"]),
        LoraConfig(r=2, target_modules=["q_proj"], bias="all"),
        peft.VeraConfig(r=2, target_modules=["q_proj"]),
        peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ],
    ids=["modules_to_save", "biases", "VeRA", "prompt tuning", "prefix tuning"],
)
def test_other_adapters_train_where_text_reaches_them(config: Any) -> None:
    model = get_peft_model(model_families.random_model("llava"), config)
    expected = {name for name in trainable(model) if "vision_tower" not in name and "projector" not in name}
    freeze_unreached_by_text(model)
    assert trainable(model) == expected != set()


def test_a_language_model_is_left_as_it_is() -> None:
    for kind in ("qwen3", "qwen3_5_text", "gemma3_text"):
        model = model_families.random_model(kind)
        everything = trainable(model)
        assert freeze_unreached_by_text(model) == []
        assert trainable(model) == everything


def test_nothing_to_train_is_refused() -> None:
    model = adapted("llava", target_modules=["fc1"])
    everything = trainable(model)
    with pytest.raises(ValueError, match=r"in its language model, got 4 in model\.vision_tower alone"):
        freeze_unreached_by_text(model)
    assert trainable(model) == everything


# --- while PEFT switches adapters -------------------------------------------------------------------------


def test_adapters_stay_frozen_when_peft_enables_them() -> None:
    model = adapted("qwen3_vl")
    everything = trainable(model)
    freeze_unreached_by_text(model)
    before = trainable(model)
    with trainable_preserved(model), use_adapter(model, None):
        assert trainable(model) == set()
    assert trainable(model) == before
    with use_adapter(model, None):  # the counter-example
        pass
    assert trainable(model) == everything != before


def test_adapters_stay_frozen_after_an_interruption() -> None:
    model = adapted("qwen3_vl")
    freeze_unreached_by_text(model)
    before = trainable(model)
    with pytest.raises(KeyboardInterrupt), trainable_preserved(model), use_adapter(model, None):
        raise KeyboardInterrupt
    assert trainable(model) == before


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ({"anchor_weight": 0.5, "loss_backend": "auto"}, {}),
        ({"grpo_weight": 0.5}, {"beta": 0.1}),
    ],
    ids=["anchor", "reference"],
)
def test_a_run_with_a_reference_keeps_them_frozen(tmp_path: Path, config: Any, changes: Any) -> None:
    """The reference is the model without its adapters, or with a copy of them: PEFT switches between them."""
    model = adapted("qwen3_vl")
    saving = {"save_strategy": "steps", "save_steps": 1}
    trainer = run(tmp_path, model, sdpo_config=tiny.config(**config), **saving, **changes)
    before = trainable(model)
    trainer.train()
    assert trainable(model) == before
    assert not any("visual" in name for name in before)
    # A checkpoint with two adapters makes the Trainer switch between them.
    model = adapted("qwen3_vl")
    resumed = run(tmp_path, model, sdpo_config=tiny.config(**config), **saving, **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert trainable(model) == before


# --- what a run does --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_run_leaves_the_encoder_as_it_was_and_saves_it(
    tmp_path: Path, gradient_checkpointing: bool
) -> None:
    """With AdamW and weight decay, which shrinks what has a gradient of 0."""
    model = model_families.random_model("qwen3_vl")
    before = {name: parameter.detach().clone() for name, parameter in model.state_dict().items()}
    trainer = run(
        tmp_path,
        model,
        gradient_checkpointing=gradient_checkpointing,
        optim="adamw_torch",
        weight_decay=0.5,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() >= before.keys() - {"lm_head.weight"}
    changed = {name for name in saved if not torch.equal(saved[name], before[name])}
    assert changed
    assert not any("visual" in name for name in changed)
    assert trainer._teacher.state.params.keys() == trainable(model)
    assert not any("visual" in name for name in trainable(model))
    assert "frozen: 51 tensors that text does not reach, such as model.visual." in training_report(trainer)


def test_a_model_of_unsloth_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "_IS_UNSLOTH", True)
    monkeypatch.setattr(trainer_module.unsloth_compat, "check_construction", lambda *_: None)
    model = model_families.random_model("qwen3_vl")
    everything = trainable(model)
    run(tmp_path, model)
    assert trainable(model) == everything


@pytest.mark.filterwarnings("ignore")
def test_grpo_alone_freezes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = model_families.random_model("qwen3_vl")
    everything = trainable(model)
    with caplog.at_level(logging.INFO, "sdpo_rl"):
        trainer = run(tmp_path, model, sdpo_config=SDPOConfig(enabled=False), max_steps=1)
    trainer.train()
    assert trainable(model) == everything
    assert "does not reach" not in caplog.text
    assert "frozen:" not in training_report(trainer)


def test_adapters_that_a_user_froze_stay_frozen(tmp_path: Path) -> None:
    """Also of a plain language model, where TRL switches adapters for its reference."""
    model = get_peft_model(
        tiny.model(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )
    for name, parameter in model.named_parameters():
        if ".layers.0." in name:
            parameter.requires_grad_(False)
    wanted = trainable(model)
    trainer = tiny.trainer(
        tmp_path, start=model, sdpo_config=tiny.config(grpo_weight=0.5), beta=0.1, max_steps=1
    )
    trainer.train()
    assert trainable(model) == wanted
