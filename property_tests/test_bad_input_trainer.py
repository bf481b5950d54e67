"""Bad arguments and options of a trainer: refused as in test_bad_input.py, and before anything is sampled."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from bad_input import Case, run
from bad_trainer_input import build, train, without_generate
from peft import PrefixTuningConfig, get_peft_model
from trl import GRPOConfig

from sdpo_rl import SDPOConfig, SDPOTrainer

PREFIXES = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)


def regrouped(path: Path) -> None:
    arguments = tiny.arguments(path)
    arguments.num_generations = 3
    SDPOTrainer(
        model=without_generate(),
        args=arguments,
        processing_class=tiny.tokenizer(),
        reward_funcs=tiny.judge,
        train_dataset=tiny.conversations(),
    )


def nothing_trains(path: Path) -> None:
    model = without_generate()
    model.requires_grad_(False)
    train(path, start=model)


def by_name(path: Path) -> None:
    """Without its weights, which are not to be loaded before the refusal."""
    tiny.model().save_pretrained(path / "model")
    (path / "model" / "model.safetensors").unlink()
    train(path, start=str(path / "model"), sdpo_config=SDPOConfig(k=103))


TRAINER = [
    Case(
        "config of another kind",
        lambda path: train(path, sdpo_config={"alpha": 1.0}),
        TypeError,
        ("sdpo_config", "SDPOConfig", "dict"),
    ),
    Case(
        "k beyond the vocabulary",
        lambda path: train(path, sdpo_config=SDPOConfig(k=103)),
        ValueError,
        ("k: expected at most 102", "got 103", "lower it"),
    ),
    Case("k beyond the vocabulary of a model by name", by_name, ValueError, ("k", "103", "102")),
    Case(
        "neither a pad token nor an end",
        lambda path: build(path, processing_class=tiny.tokenizer(pad_token=None, eos_token=None)),
        ValueError,
        ("processing_class", "pad token", "end-of-sequence token", "set `tokenizer.pad_token`"),
    ),
    Case(
        "a batch that the group does not divide",
        lambda path: train(path, per_device_train_batch_size=6),
        ValueError,
        ("generation_batch_size (6)", "divisible by num_generations", "4"),
    ),
    Case(
        "a group that no longer divides the batch",
        regrouped,
        ValueError,
        ("generation_batch_size", "num_generations (3)", "got 8", "per_device_train_batch_size"),
    ),
    Case(
        "more demonstrations than peers",
        lambda path: build(path, sdpo_config=tiny.config(num_demonstrations=4)),
        ValueError,
        ("num_demonstrations: expected at most 3", "of 4 completions", "got 4", "num_generations"),
    ),
    Case(
        "more demonstrations than completions",
        lambda path: build(
            path, sdpo_config=tiny.config(num_demonstrations=5, dont_reprompt_on_self_success=False)
        ),
        ValueError,
        ("num_demonstrations: expected at most 4", "got 5"),
    ),
    *(
        Case(
            f"temperature {value}",
            lambda path, value=value: build(path, temperature=value),
            ValueError,
            ("temperature: expected a finite number > 0", f"got {value}", "set 1.0"),
        )
        for value in (float("inf"), float("nan"))
    ),
    Case(
        "no temperature",
        lambda path: build(path, temperature=0.0),
        ValueError,
        ("temperature: expected a finite number > 0", "got 0.0", "set 1.0"),
    ),
    Case(
        "kernels on a CPU",
        lambda path: build(path, sdpo_config=tiny.config(loss_backend="triton")),
        ValueError,
        ("loss_backend", "'triton'", "'auto'"),
    ),
    Case(
        "a model that is none",
        lambda path: SDPOTrainer(model={}, args=tiny.arguments(path)),
        TypeError,
        ("model", "a model's name", "dict"),
    ),
    Case(
        "lora_ema without adapters",
        lambda path: train(path, sdpo_config=tiny.config(teacher_mode="lora_ema")),
        ValueError,
        ("teacher_mode='lora_ema'", "adapters", "got none", "peft_config", "teacher_mode='ema'"),
    ),
    Case(
        "prefix tuning with checkpointing",
        lambda path: build(path, peft_config=PREFIXES, gradient_checkpointing=True),
        ValueError,
        ("gradient_checkpointing: expected False with PREFIX_TUNING", "got True", "or use LoRA"),
    ),
    Case(
        "a model with prefixes, with checkpointing",
        lambda path: build(path, start=get_peft_model(tiny.model(), PREFIXES), gradient_checkpointing=True),
        ValueError,
        ("gradient_checkpointing: expected False with PREFIX_TUNING", "gradient_checkpointing=False"),
    ),
    Case(
        "rewards as args",
        lambda path: SDPOTrainer(without_generate(), tiny.judge, tiny.judge),
        TypeError,
        ("args: expected a GRPOConfig", "got function", "(model, reward_funcs, args, train_dataset)"),
    ),
    Case(
        "args as rewards",
        lambda path: SDPOTrainer(without_generate(), tiny.arguments(path), tiny.judge),
        TypeError,
        ("reward_funcs[0]: expected a function", "GRPOConfig", "(model, reward_funcs, args, train_dataset)"),
    ),
    Case("no model", lambda path: SDPOTrainer(args=tiny.arguments(path)), TypeError, ("model", "None")),
    Case(
        "nothing trains",
        nothing_trains,
        ValueError,
        ("model: expected trainable parameters", "requires_grad", "unfreeze"),
    ),
    Case(
        "an argument that nobody takes",
        lambda path: SDPOTrainer(model=without_generate(), args=tiny.arguments(path), sdpo_cfg=SDPOConfig()),
        TypeError,
        ("SDPOTrainer", "'sdpo_cfg'", "expected sdpo_config"),
    ),
    *(
        Case(
            f"another trainer's name, {name}",
            lambda path, name=name: SDPOTrainer(
                model=without_generate(), args=tiny.arguments(path), reward_funcs=tiny.judge, **{name: None}
            ),
            TypeError,
            ("SDPOTrainer", repr(name), "expected", *meant),
        )
        for name, *meant in (
            ("config", "sdpo_config", "args"),
            ("tokenizer", "processing_class"),
            ("training_args", "args"),
            ("dataset", "train_dataset"),
            ("reward_functions", "reward_funcs"),
        )
    ),
    Case(
        "a name like no other",
        lambda path: SDPOTrainer(model=without_generate(), args=tiny.arguments(path), zzz=1),
        TypeError,
        ("SDPOTrainer", "'zzz'", "expected one of", "'processing_class'", "'sdpo_config'", "'train_dataset'"),
    ),
]


@run(TRAINER)
def test_trainer(case: Case, tmp_path: Path) -> None:
    case.check(tmp_path)


def test_a_good_trainer_does_ask_the_model_to_generate(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="asked to generate"):
        train(tmp_path)


def test_outputs_are_not_returned(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path)
    with pytest.raises(ValueError, match="expected return_outputs=False"):
        trainer.compute_loss(trainer.model, {}, return_outputs=True)


def test_a_group_of_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 2 generations"):
        GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, num_generations=1)
