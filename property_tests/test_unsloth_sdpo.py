"""SDPO steps over Unsloth's rewritten trainer, against the same steps of `reference_step` in plain transformers.

A fresh process patches TRL, trains and writes down rows, weights, gradients and losses. This process, which has
never seen Unsloth, does each step again: every row alone, no padding, the divergence from its definition.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference_step as reference
import tiny
import torch
import unsloth_driver as driver
from peft import LoraConfig, get_peft_model

pytestmark = pytest.mark.skipif(driver.missing() is not None, reason=str(driver.missing()))

TOLERANCE = 1e-5
PAD = 0
# Of the adapters: one with which the rows that both passes of "two passes" train on include a sampled pad token.
SEED = 9
# Of FastLanguageModel: more tokens than the teacher reads with any row, and fewer than with four rows.
MAX_SEQ_LENGTH = 250
SHORTENED = [f"self_distillation/{name}_reprompt_fraction" for name in ("truncated", "dropped")]
TARGETS = ["q_proj", "v_proj", "down_proj"]


def long_remark(text: str) -> str:
    """Feedback of very different lengths, up to 111 tokens."""
    return "" if tiny.score(text) else "no, " * (1 + 6 * (sum(map(ord, text)) % 5)) + "see {above}"


# Changes of the GRPOConfig, of the SDPOConfig, and the method of the reference.
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any], reference.Method]] = {
    "two micro-batches": (
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        {},
        reference.Method(),
    ),
    "one row at a time": (
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        {},
        reference.Method(),
    ),
    "whole logits": (
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        {"loss_backend": "logits"},
        reference.Method(),
    ),
    "two passes": (
        {"num_iterations": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        {"alpha": 1.0},
        reference.Method(alpha=1.0),
    ),
    "checkpointing": (
        {"gradient_checkpointing": True, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        {},
        reference.Method(),
    ),
}


# --- in the fresh process ---------------------------------------------------------------------------------


def start_model(*, fast: bool, device: str) -> Any:
    """Random adapters over the same random base; with `fast`, by FastLanguageModel."""
    # Packed rows may have more tokens together than `max_seq_length`.
    base = tiny.model(tie_word_embeddings=False, max_position_embeddings=4096)
    if fast:
        from unsloth import FastLanguageModel

        folder = str(Path.cwd() / "tiny")
        base.save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
        model, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=MAX_SEQ_LENGTH, dtype=torch.float32, load_in_4bit=False, device_map=device,
        )  # fmt: skip
        model = FastLanguageModel.get_peft_model(
            model, r=4, lora_alpha=8, target_modules=TARGETS, lora_dropout=0, bias="none",
            use_gradient_checkpointing=False,
        )  # fmt: skip
        model.generation_config.eos_token_id = base.generation_config.eos_token_id
    else:
        # Otherwise A differs from process to process, and with it the sampled rows: PEFT draws it from torch's
        # generator, whose first seed is random, and the trainer sets its own seed only later.
        torch.manual_seed(SEED)
        model = driver.bind_modes(get_peft_model(base, lora()))
    model._unsloth_user_float32 = True
    if device != "cpu":
        # Turns Unsloth's autocast off; otherwise it trains under bfloat16 on a GPU.
        os.environ["UNSLOTH_MIXED_PRECISION"] = "bfloat16"
    driver.randomize_lora(model)
    return model


def sdpo_trainer(changes: dict[str, Any], options: dict[str, Any], *, fast: bool, device: str) -> Any:
    cpu = {} if device == "cpu" else {"use_cpu": False}
    return tiny.trainer(
        Path("out"),
        sdpo_config=tiny.config(**options),
        start=start_model(fast=fast, device=device),
        **{"max_steps": 3, "optim": "adamw_torch", "learning_rate": 0.02, **cpu, **changes},
    )


def record(trainer: Any, file: Path) -> None:
    """Train, and save what the reference needs."""
    tiny.remark = long_remark
    recorder = reference.Recorder(trainer)
    trainer.train()
    for step in recorder.steps:
        for weights in (step.before, step.gradients, step.after):
            weights.update({name: tensor.cpu() for name, tensor in weights.items()})
    for row in recorder.rows:
        row.sampled_with = {name: tensor.cpu() for name, tensor in row.sampled_with.items()}
    args, logs = trainer.args, trainer.state.log_history
    torch.save(
        {
            "steps": recorder.steps,
            "logged": {entry["step"]: entry["loss"] for entry in logs if "loss" in entry},
            "shortened": max(entry[name] for entry in logs for name in SHORTENED if name in entry),
            "generate_every": args.steps_per_generation * trainer.num_iterations,
            "accumulation": args.gradient_accumulation_steps,
        },
        file,
    )


def observe() -> dict[str, Any]:
    """All runs of the plain model, the planted errors and GRPO."""
    for name, (changes, options, _) in RUNS.items():
        trainer = sdpo_trainer(changes, options, fast=False, device="cpu")
        record(trainer, Path(f"{name}.pt"))
    for name, plant in PLANTED.items():
        with pytest.MonkeyPatch.context() as patch:
            plant(patch)
            changes, options, _ = RUNS["two passes"]
            record(sdpo_trainer(changes, options, fast=False, device="cpu"), Path(f"{name}.pt"))
    import sdpo_rl

    return {
        "grpo": observe_grpo(),
        "evaluation": observe_evaluation(),
        "report": sdpo_rl.training_report(trainer),
        "prediction_step": next(c.__name__ for c in type(trainer).__mro__ if "prediction_step" in vars(c)),
        "without_super": overrides_without_super(type(trainer)),
    }


def overrides_without_super(cls: type) -> list[str]:
    """Methods of a class that override an inherited one and never call it."""
    theirs = [base for base in cls.__mro__ if not base.__module__.startswith("sdpo_rl")]
    return sorted(
        name
        for ours in cls.__mro__
        if ours.__module__.startswith("sdpo_rl")
        for name, value in vars(ours).items()
        if inspect.isfunction(value)
        and any(hasattr(base, name) for base in theirs)
        and f"super().{name}" not in inspect.getsource(value)
    )


def padding_is_attended(patch: pytest.MonkeyPatch) -> None:
    from sdpo_rl.step import batch as step_batch

    true = step_batch.left_pad

    def left_pad(*args: Any, **kwargs: Any) -> Any:
        ids, mask = true(*args, **kwargs)
        return ids, torch.ones_like(mask)

    patch.setattr(step_batch, "left_pad", left_pad)


def columns_of_the_wrong_side(patch: pytest.MonkeyPatch) -> None:
    from sdpo_rl.compat import unsloth as unsloth_compat

    def first_columns(inputs: Any, pad_id: int) -> Any:
        old = inputs.get("old_per_token_logps")
        if old is None:
            return dict(inputs)
        return {**inputs, "old_per_token_logps": old[:, : inputs["completion_ids"].shape[1]]}

    patch.setattr(unsloth_compat, "align_old_log_probs", first_columns)


PLANTED: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "padding is attended": padding_is_attended,
    "columns of the wrong side": columns_of_the_wrong_side,
}


def observe_grpo() -> dict[str, Any]:
    """`enabled=False` and Unsloth's own trainer, from the same start, and a third that must differ."""
    import trl

    seen: dict[str, Any] = {}
    after = {}
    changes = {"num_iterations": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    for name in ("base", "ours", "enabled"):
        settings = {**changes, "max_steps": 3, "optim": "adamw_torch", "learning_rate": 0.02}
        shared: dict[str, Any] = {
            "model": start_model(fast=False, device="cpu"),
            "args": tiny.arguments(Path("out"), **settings),
            "processing_class": tiny.tokenizer(),
            "train_dataset": tiny.conversations(),
            "reward_funcs": tiny.parity,
        }
        if name == "base":
            trainer = trl.GRPOTrainer(**shared)
        else:
            from sdpo_rl import SDPOTrainer

            trainer = SDPOTrainer(sdpo_config=tiny.config(enabled=name == "enabled"), **shared)
        losses = name_losses(trainer)
        trainer.train()
        after[name] = reference.trainable(trainer.model)
        seen[name] = losses
    for name in ("ours", "enabled"):
        seen[f"{name} moved apart"] = max(
            float((tensor - after["base"][key]).abs().max()) for key, tensor in after[name].items()
        )
    return seen


def name_losses(trainer: Any) -> list[str]:
    """The names of all gradient functions of each step's loss."""
    names: list[str] = []
    true = trainer.compute_loss

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        loss = true(*args, **kwargs)
        stack, found = [loss.grad_fn], set()
        while stack:
            node = stack.pop()
            if node is not None and node not in found:
                found.add(node)
                stack += [parent for parent, _ in node.next_functions]
        names.append(
            " ".join(sorted({type(node).__name__ for node in found if "Unsloth" in type(node).__name__}))
        )
        return loss

    trainer.compute_loss = compute_loss
    return names


def observe_evaluation() -> dict[str, Any]:
    """An evaluation during training, by Unsloth's own loop."""
    trainer = tiny.trainer(
        Path("out"), start=start_model(fast=False, device="cpu"), eval_dataset=tiny.conversations(2),
        max_steps=2, optim="adamw_torch", eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    trainer.train()
    return {
        key: value for entry in trainer.state.log_history for key, value in entry.items() if "eval" in key
    }


# --- the same steps of the reference ----------------------------------------------------------------------


def lora() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)


def fresh_model() -> Any:
    return get_peft_model(tiny.model(tie_word_embeddings=False), lora())


def differences(file: Path, method: reference.Method) -> reference.Difference:
    """Relative errors of gradients and logged losses, the largest over the steps."""
    data = torch.load(file, weights_only=False)
    assert data["shortened"] == 0.0, "the reference shortens no reprompt, as the trainer did"
    reference_step = reference.ReferenceStep(fresh_model(), method)
    stale = data["accumulation"] % data["generate_every"] != 0
    teacher = data["steps"][0].before
    micro_batches = ticks = 0
    gradient_error = loss_error = 0.0
    for number, step in enumerate(data["steps"], start=1):
        reference_step.student.load_state_dict(step.before, strict=False)
        reference_step.teacher.load_state_dict(teacher, strict=False)
        for row in step.rows:
            # Unsloth scores a row that sampled the pad token as another sequence; such a row has weight 1.
            if PAD in row.completion:
                row.sampled_with = step.before
        loss, gradients = reference_step.step(step.rows, stale=stale)
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        gap = torch.stack([(g - step.gradients[name]).norm() for name, g in gradients.items()]).norm()
        gradient_error = max(gradient_error, (gap / norm).item())
        loss_error = max(loss_error, abs(data["logged"][number] - loss) / loss)
        micro_batches += step.micro_batches
        due = micro_batches // data["generate_every"]
        for _ in range(due - ticks):
            teacher = {
                name: (1 - method.rate) * old + method.rate * step.after[name]
                for name, old in teacher.items()
            }
        ticks = due
    return reference.Difference(gradient_error, loss_error)


# --- tests ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("unsloth")


@pytest.fixture(scope="module")
def seen(folder: Path) -> dict[str, Any]:
    return driver.run("test_unsloth_sdpo:observe", folder)


@pytest.fixture
def _remarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "remark", long_remark)


@pytest.mark.usefixtures("seen", "_remarks")
@pytest.mark.parametrize("name", RUNS)
def test_a_step_equals_plain_transformers(folder: Path, name: str) -> None:
    difference = differences(folder / f"{name}.pt", RUNS[name][2])
    assert difference.gradient < TOLERANCE
    assert difference.loss < TOLERANCE


@pytest.mark.usefixtures("seen")
def test_the_rows_have_what_the_comparison_needs(folder: Path) -> None:
    steps = {name: torch.load(folder / f"{name}.pt", weights_only=False)["steps"] for name in RUNS}
    rows = [row for name in RUNS for step in steps[name] for row in step.rows]
    assert len({len(row.prompt_ids) for row in rows}) > 2, "ragged prompts"
    assert len({len(row.completion) for row in rows}) > 3, "right padding"
    # Only a step over rows that earlier weights sampled has importance weights.
    stale = steps["two passes"][1].rows
    assert any(PAD in row.completion for row in stale), "the pad token was sampled: try another SEED"


@pytest.mark.usefixtures("seen", "_remarks")
@pytest.mark.parametrize("name", PLANTED)
def test_the_comparison_detects(folder: Path, name: str) -> None:
    assert differences(folder / f"{name}.pt", RUNS["two passes"][2]).gradient > 100 * TOLERANCE


def test_grpo_is_unsloths_own(seen: dict[str, Any]) -> None:
    grpo = seen["grpo"]
    assert grpo["ours moved apart"] == 0.0
    assert grpo["enabled moved apart"] > 1e-4
    assert grpo["ours"] == grpo["base"]
    assert all("UnslothEfficientGRPO" in names for names in grpo["ours"])
    assert not any(grpo["enabled"])


def test_evaluation_is_unsloths_own(seen: dict[str, Any]) -> None:
    evaluation = seen["evaluation"]
    assert evaluation["eval_loss"] > 0.0
    assert evaluation["eval_self_distillation/reprompt_sample_fraction"] > 0.0


def test_every_override_calls_the_inherited_method(seen: dict[str, Any]) -> None:
    """So vLLM's sleep and wake-up, mode switches and evaluation remain Unsloth's."""
    assert seen["without_super"] == []
    assert seen["prediction_step"] == "_UnslothGRPOTrainer"


def test_the_report_names_the_parts(seen: dict[str, Any]) -> None:
    for part in (
        "trainer: over Unsloth's rewritten GRPOTrainer",
        "compute_loss: SDPOTrainer → _UnslothGRPOTrainer",
        "prediction_step: _UnslothGRPOTrainer",
        "unsloth 2026",
        "classes SDPOTrainer → ResumableTrainer → UnslothGRPOTrainer",
    ):
        assert part in seen["report"]


@pytest.mark.usefixtures("_remarks")
def test_no_reprompt_is_shortened() -> None:
    """The reference shortens none; with all completions of a group wrong, a row gets the longest feedback."""
    method = reference.Method()
    rows = [
        reference.Row(prompt, [], reference.characters(text), [True], {})
        for prompt in tiny.conversations()["prompt"]
        for text in map(chr, range(40, 50))
    ]
    reprompts = [(row.prompt, text) for row in rows if (text := reference.reprompt(row, method)) is not None]
    longest = max(len(reference.render(prompt, text, method)) for prompt, text in reprompts)
    assert longest + tiny.arguments(Path("out")).max_completion_length < MAX_SEQ_LENGTH
