"""An optimizer step of the trainer against the same step of `reference_step`.

Sums, batches, padding, accumulation and the teacher's clock are the trainer's; loss and gradient must be those
of `reference_step`, which has none of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from reference_step import Method, Row, compare
from torch import Tensor, nn

from sdpo_rl import trainer as trainer_module
from sdpo_rl.rollout import reprompts
from sdpo_rl.step import batch as step_batch
from sdpo_rl.step import forward as step_forward
from sdpo_rl.step import loss as step_loss
from sdpo_rl.step.denominator import StepWindow

TOLERANCE = 5e-6
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])


# --- equality ---------------------------------------------------------------------------------------------


def fresh_model(lora: bool = False) -> nn.Module:
    return get_peft_model(tiny.model(), copy.deepcopy(LORA)) if lora else tiny.model()


def multi_turn() -> Dataset:
    """A system prompt and an earlier exchange before the question."""
    return Dataset.from_dict(
        {
            "prompt": [
                [
                    {"role": "system", "content": "be brief{}"},
                    {"role": "user", "content": "hello" * (i % 2)},
                    {"role": "assistant", "content": "yes?"},
                    {"role": "user", "content": f"say {i}"},
                ]
                for i in range(8)
            ]
        }
    )


FOUR: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}

ACCUMULATION: dict[str, dict[str, Any]] = {
    "one micro-batch": {},
    "four micro-batches": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "one row at a time": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "one generation batch for two steps": {"per_device_train_batch_size": 4, "steps_per_generation": 2},
    "one generation batch for two steps of two": {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
    },
    "two generation batches in one step": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "steps_per_generation": 2,
    },
    "a step across the border of two generation batches": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 3,
    },
    "an epoch that ends within a step": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 1,
        "num_train_epochs": 2,
        "max_steps": -1,
        "train_dataset": tiny.conversations(3),
    },
    "a stream whose pass ends within a step": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 3,
        "steps_per_generation": 4,
        "max_steps": 5,
        "train_dataset": tiny.conversations().to_iterable_dataset(),
    },
    "two passes over a generation batch": {"num_iterations": 2},
    "two passes of two steps": {
        "num_iterations": 2,
        "per_device_train_batch_size": 4,
        "steps_per_generation": 2,
        "learning_rate": 0.05,
    },
}

OBJECTIVES: dict[str, tuple[dict[str, Any], Method]] = {
    "forward": ({"alpha": 0.0}, Method(alpha=0.0)),
    "between": ({"alpha": 0.25}, Method(alpha=0.25)),
    "reverse": ({"alpha": 1.0}, Method(alpha=1.0)),
    "one token": ({"k": 1}, Method(k=1)),
    "renormalized": ({"tail": "renormalize"}, Method(tail=False)),
    "top of the teacher": ({"support": "teacher"}, Method(top_of="teacher")),
    "whole vocabulary": ({"support": "full"}, Method(k=None)),
    "whole vocabulary, reverse": ({"support": "full", "alpha": 1.0}, Method(k=None, alpha=1.0)),
    "sampled token": ({"support": "sampled", "alpha": 1.0}, Method(sampled=True)),
    "sequence mean": ({"loss_aggregation": "sequence-mean"}, Method(sequence_mean=True)),
    "frozen teacher": ({"teacher_mode": "frozen"}, Method(teacher="frozen")),
    "live teacher": ({"teacher_mode": "live"}, Method(teacher="live")),
    "trust region": ({"teacher_mode": "trust_region"}, Method(teacher="trust_region")),
    "teacher equal to the student after every update": ({"teacher_update_rate": 1.0}, Method(rate=1.0)),
    "rate per 16 completions": ({"teacher_rate_samples": 16}, Method(rate_samples=16)),
    "offloaded teacher": ({"teacher_offload": "cpu"}, Method()),
    "two demonstrations": ({"num_demonstrations": 2}, Method(shown=2)),
    "feedback beside a demonstration": (
        {"environment_feedback_only_without_solution": False},
        Method(feedback_too=True),
    ),
}


@pytest.mark.parametrize("backend", ["torch", "logits"])
@pytest.mark.parametrize("split", ACCUMULATION)
def test_a_step_is_the_same_however_it_is_split(tmp_path: Path, split: str, backend: str) -> None:
    trainer = tiny.trainer(
        tmp_path, sdpo_config=tiny.config(loss_backend=backend), **{"max_steps": 4, **ACCUMULATION[split]}
    )
    difference = compare(trainer, fresh_model())
    assert difference.gradient < TOLERANCE
    assert difference.loss < TOLERANCE


@pytest.mark.parametrize("backend", ["torch", "logits"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective(tmp_path: Path, objective: str, backend: str) -> None:
    changes, method = OBJECTIVES[objective]
    trainer = tiny.trainer(
        tmp_path,
        sdpo_config=tiny.config(**changes, loss_backend=backend),
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )
    difference = compare(trainer, fresh_model(), method)
    assert difference.gradient < TOLERANCE
    assert difference.loss < TOLERANCE


@pytest.mark.parametrize("backend", ["torch", "logits"])
def test_the_temperature_divides_the_logits_of_both_models(tmp_path: Path, backend: str) -> None:
    trainer = tiny.trainer(
        tmp_path,
        sdpo_config=tiny.config(loss_backend=backend),
        temperature=0.6,
        num_iterations=2,
        max_steps=3,
    )
    assert compare(trainer, fresh_model(), Method(temperature=0.6)).gradient < TOLERANCE


@pytest.mark.parametrize(
    "changes", [{"is_clip": None}, {"is_clip": 1.01}], ids=["weights off", "weights cut early"]
)
def test_the_importance_weights(tmp_path: Path, changes: dict[str, Any]) -> None:
    trainer = tiny.trainer(
        tmp_path, sdpo_config=tiny.config(**changes), num_iterations=3, max_steps=5, learning_rate=0.05
    )
    assert compare(trainer, fresh_model(), Method(clip=changes["is_clip"])).gradient < TOLERANCE


@pytest.mark.parametrize("samples", [None, 16])
def test_the_teacher_may_be_updated_after_every_optimizer_step(tmp_path: Path, samples: int | None) -> None:
    config = tiny.config(teacher_tick="optimizer_step", teacher_rate_samples=samples)
    trainer = tiny.trainer(tmp_path, sdpo_config=config, num_iterations=2, max_steps=4)
    method = Method(tick_every_step=True, rate_samples=samples)
    assert compare(trainer, fresh_model(), method).gradient < TOLERANCE


@pytest.mark.parametrize("backend", ["torch", "logits"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_adapters_and_checkpointing(tmp_path: Path, lora: bool, checkpointing: bool, backend: str) -> None:
    trainer = tiny.trainer(
        tmp_path,
        sdpo_config=tiny.config(loss_backend=backend),
        peft_config=copy.deepcopy(LORA) if lora else None,
        gradient_checkpointing=checkpointing,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=3,
        learning_rate=0.05,
    )
    assert compare(trainer, fresh_model(lora)).gradient < TOLERANCE


def test_plain_prompts(tmp_path: Path) -> None:
    assert compare(tiny.trainer(tmp_path, train_dataset=tiny.plain()), fresh_model()).gradient < TOLERANCE


def test_system_prompt_and_earlier_turns_are_kept(tmp_path: Path) -> None:
    assert compare(tiny.trainer(tmp_path, train_dataset=multi_turn()), fresh_model()).gradient < TOLERANCE


def test_chat_template_arguments_reach_the_teacher(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, chat_template_kwargs={"tag": "ok:"})
    assert compare(trainer, fresh_model(), Method(tag="ok:")).gradient < TOLERANCE


def tool_tokens(output: dict[str, Any], batch: list[Row]) -> None:
    """Every third token is from a tool."""
    mask = torch.ones_like(output["completion_mask"])
    mask[:, ::3] = 0
    output["tool_mask"] = mask
    output["loss_mask"] = step_batch.completion_loss_mask(output["completion_mask"], output["row_mask"], mask)
    for row in batch:
        row.counts = [i % 3 != 0 for i in range(len(row.completion))]


def engine_log_probs(output: dict[str, Any], batch: list[Row]) -> None:
    """An inference engine with other log-probabilities, which could not score every fourth token."""
    old = output["old_per_token_logps"]
    gap = torch.linspace(-1.0, 1.5, old.numel()).view_as(old)
    gap[:, ::4] = 0.0
    output["sampling_per_token_logps"] = torch.where(gap == 0.0, float("nan"), old - gap)
    for row, row_gap in zip(batch, gap, strict=True):
        row.engine_gap = row_gap[: len(row.completion)].tolist()


def test_tokens_from_tools_have_no_loss(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, **FOUR)
    difference = compare(trainer, fresh_model(), alter=tool_tokens)
    assert max(difference.gradient, difference.loss) < TOLERANCE


def test_the_difference_to_the_inference_engine_is_corrected(tmp_path: Path) -> None:
    trainer = tiny.trainer(
        tmp_path, sdpo_config=tiny.config(rollout_is_clip=1.5), num_iterations=2, max_steps=3
    )
    difference = compare(trainer, fresh_model(), Method(engine_clip=1.5), alter=engine_log_probs)
    assert difference.gradient < TOLERANCE


def test_cut_off_completions_have_no_loss_when_masked(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, mask_truncated_completions=True, max_completion_length=4, **FOUR)
    difference = compare(trainer, fresh_model())
    assert max(difference.gradient, difference.loss) < TOLERANCE


def test_an_evaluation_between_steps_changes_no_step(tmp_path: Path) -> None:
    trainer = tiny.trainer(
        tmp_path,
        eval_dataset=tiny.conversations(2),
        eval_strategy="steps",
        eval_steps=1,
        num_generations_eval=2,
        max_steps=3,
        **FOUR,
    )
    difference = compare(trainer, fresh_model())
    assert max(difference.gradient, difference.loss) < TOLERANCE


def test_an_untied_head(tmp_path: Path) -> None:
    start = tiny.model(tie_word_embeddings=False)
    difference = compare(tiny.trainer(tmp_path, start=start), tiny.model(tie_word_embeddings=False))
    assert difference.gradient < TOLERANCE


@pytest.mark.parametrize("backend", ["torch", "logits"])
@pytest.mark.parametrize("teacher", ["ema", "trust_region"])
def test_a_vocabulary_with_impossible_tokens(tmp_path: Path, teacher: Any, backend: str) -> None:
    def masked() -> nn.Module:
        model = tiny.model(tie_word_embeddings=False)
        bias = torch.zeros(len(tiny.VOCABULARY))
        bias[[7, 8, 50]] = float("-inf")
        model.lm_head.bias = nn.Parameter(bias, requires_grad=False)
        return model

    config = tiny.config(teacher_mode=teacher, loss_backend=backend)
    trainer = tiny.trainer(tmp_path, start=masked(), sdpo_config=config, **FOUR)
    difference = compare(trainer, masked(), Method(teacher=teacher))
    assert max(difference.gradient, difference.loss) < TOLERANCE
    assert trainer._forward_mode.fused == (backend == "torch")


# --- planted errors ---------------------------------------------------------------------------------------
# Each is an error that some implementation had; the comparison above must detect it.

Plant = Callable[[pytest.MonkeyPatch], None]


def each_micro_batch_by_its_own_count(patch: pytest.MonkeyPatch) -> None:
    def denominator(self: Any, *, step: int, length: int, **_: Any) -> Tensor:
        return self._counts[step % len(self._counts)].clamp(min=1.0) * length

    patch.setattr(StepWindow, "denominator", denominator)


def not_divided_by_accumulation(patch: pytest.MonkeyPatch) -> None:
    true = StepWindow.denominator
    patch.setattr(
        StepWindow,
        "denominator",
        lambda self, **kwargs: true(self, **kwargs) / kwargs["length"],
    )


def template_applied_twice(patch: pytest.MonkeyPatch) -> None:
    true = reprompts.with_question
    patch.setattr(reprompts, "with_question", lambda prompt, text: true(prompt, f"<user>{text}<bot>"))


def system_prompt_lost(patch: pytest.MonkeyPatch) -> None:
    true = reprompts.with_question
    patch.setattr(reprompts, "with_question", lambda prompt, text: true(prompt, text)[-1:])


def teacher_without_temperature(patch: pytest.MonkeyPatch) -> None:
    for name in ("from_logits", "fused"):
        true = getattr(step_loss, name)

        def without_temperature(
            config: Any, p: Any, q: Any, *args: Any, true: Any = true, **kwargs: Any
        ) -> Any:
            temperature = kwargs["temperature"]
            q = [
                x._replace(hidden=x.hidden * temperature) if hasattr(x, "hidden") else x * temperature
                for x in q
            ]
            return true(config, p, q, *args, **kwargs)

        patch.setattr(step_loss, name, without_temperature)


def padding_is_attended(patch: pytest.MonkeyPatch) -> None:
    true = step_batch.left_pad

    def left_pad(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        ids, mask = true(*args, **kwargs)
        return ids, torch.ones_like(mask)

    patch.setattr(step_batch, "left_pad", left_pad)


def teacher_prompt_of_the_next_row(patch: pytest.MonkeyPatch) -> None:
    true = step_batch.left_pad

    def left_pad(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        ids, mask = true(*args, **kwargs)
        return ids.roll(1, 0), mask.roll(1, 0)

    patch.setattr(step_batch, "left_pad", left_pad)


def teacher_is_never_updated(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(trainer_module.TeacherStore, "tick", lambda self, model: None)


def teacher_is_updated_by_every_micro_batch(patch: pytest.MonkeyPatch) -> None:
    true = trainer_module.SDPOTrainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss = true(self, *args, **kwargs)
        self._teacher.tick(self._unwrapped)
        return loss

    patch.setattr(trainer_module.SDPOTrainer, "training_step", training_step)


def teacher_is_the_student(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(trainer_module.TeacherStore, "forwards", lambda *_, **__: [None])


def importance_weights_forgotten(patch: pytest.MonkeyPatch) -> None:
    for name in ("from_logits", "fused"):
        true = getattr(step_loss, name)

        def unweighted(config: Any, p: Any, q: Any, targets: Any, true: Any = true, **kwargs: Any) -> Any:
            return true(config, p, q, targets._replace(old_log_probs=None), **kwargs)

        patch.setattr(step_loss, name, unweighted)


def one_position_late(patch: pytest.MonkeyPatch) -> None:
    true = step_forward.completion_head

    def late(*args: Any, **kwargs: Any) -> Any:
        head = true(*args, **kwargs)
        return head._replace(hidden=head.hidden.roll(-1, 1))

    patch.setattr(step_forward, "completion_head", late)


def first_estimate_is_kept(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(StepWindow, "correction", lambda self: None)


ERRORS: list[tuple[Plant, dict[str, Any], Method]] = [
    (each_micro_batch_by_its_own_count, FOUR, Method()),
    (not_divided_by_accumulation, FOUR, Method()),
    (template_applied_twice, {}, Method()),
    (system_prompt_lost, {"train_dataset": multi_turn()}, Method()),
    (teacher_without_temperature, {"temperature": 0.6}, Method(temperature=0.6)),
    (padding_is_attended, {}, Method()),
    (teacher_prompt_of_the_next_row, {}, Method()),
    (teacher_is_never_updated, {}, Method()),
    (teacher_is_updated_by_every_micro_batch, FOUR, Method()),
    (teacher_is_the_student, {}, Method()),
    (importance_weights_forgotten, {"num_iterations": 2}, Method()),
    (one_position_late, {}, Method()),
    (first_estimate_is_kept, ACCUMULATION["two generation batches in one step"], Method()),
    (first_estimate_is_kept, ACCUMULATION["a stream whose pass ends within a step"], Method()),
]


@pytest.mark.parametrize(("plant", "changes", "method"), ERRORS, ids=[plant.__name__ for plant, *_ in ERRORS])
def test_the_comparison_detects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Plant, changes: dict[str, Any], method: Method
) -> None:
    plant(monkeypatch)
    trainer = tiny.trainer(tmp_path, **{"max_steps": 4, **changes})
    assert compare(trainer, fresh_model(), method).gradient > 1000 * TOLERANCE
