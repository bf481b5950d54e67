"""When the teacher of a real model starts, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig
from teacher_cases import (
    MODELS,
    RATE,
    Students,
    Weights,
    average,
    logits,
    lora,
    started,
    trained,
    warm_started,
)
from torch import nn
from transformers import TrainerCallback

from sdpo_rl import SDPOConfig
from sdpo_rl.teacher.store import TeacherStore


def edit(model: nn.Module) -> None:
    """Add the same noise to every trainable parameter each time."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


def evaluated(
    folder: Path, mode: str, *, before: bool = False, after: bool = False, stale: bool = False
) -> float:
    """The loss of `evaluate()` without training, of weights edited before or after construction."""
    model = warm_started()
    if before:
        edit(model)
    trainer = tiny.trainer(folder, start=model, sdpo_config=tiny.config(teacher_mode=mode), **EVALUATION)
    if stale:
        trainer._teacher.on_train_begin(trainer._unwrapped)
    if after:
        edit(model)
    loss: float = trainer.evaluate()["eval_loss"]
    return loss


EVALUATION = {
    "eval_dataset": tiny.conversations(4),
    "num_generations_eval": 4,
    "per_device_eval_batch_size": 4,
}


@pytest.mark.parametrize("mode", ["ema", "frozen", "trust_region", "live"])
def test_an_evaluation_before_training_has_the_present_weights_as_the_teacher(
    tmp_path: Path, mode: str
) -> None:
    expected = evaluated(tmp_path, mode, before=True)
    assert evaluated(tmp_path, mode, after=True) == pytest.approx(expected, rel=1e-6)
    if mode != "live":
        stale = evaluated(tmp_path, mode, after=True, stale=True)
        assert stale != pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("first", ["evaluate", "train"])
def test_training_starts_from_the_weights_when_it_begins(tmp_path: Path, first: str) -> None:
    config = tiny.config(teacher_mode="frozen")
    trainer = tiny.trainer(tmp_path, start=warm_started(), sdpo_config=config, **EVALUATION)
    if first == "evaluate":
        trainer.evaluate()
    edit(trainer._unwrapped)
    begin = trained(trainer._unwrapped)
    trainer.train()
    assert begin.keys() == trainer._teacher.state.params.keys()
    assert all(torch.equal(tensor, begin[name]) for name, tensor in trainer._teacher.state.params.items())
    assert not all(torch.equal(tensor, begin[name]) for name, tensor in trained(trainer._unwrapped).items())


def test_a_training_loss_outside_of_train_starts_the_teacher(tmp_path: Path) -> None:
    """In a custom training loop the teacher does not follow later edits of the student."""
    trainer = tiny.trainer(tmp_path, start=warm_started(), sdpo_config=tiny.config(teacher_mode="frozen"))
    edit(trainer._unwrapped)
    begin = trained(trainer._unwrapped)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = trainer._prepare_inputs([*tiny.conversations()])
    trainer.compute_loss(trainer.model, inputs)
    edit(trainer._unwrapped)
    (params,) = trainer._teacher.forwards(trainer._unwrapped, training=True)
    assert all(torch.equal(tensor, begin[name]) for name, tensor in params.items())


def test_a_second_training_continues_with_the_same_teacher_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer = tiny.trainer(
        tmp_path, start=lora(), sdpo_config=tiny.config(teacher_update_rate=RATE), **settings
    )
    students = Students(trainer._unwrapped)
    trainer.add_callback(students)

    def logged() -> list[str]:
        lines = [record.getMessage() for record in caplog.records if "called again" in record.getMessage()]
        caplog.clear()
        return lines

    trainer.train()
    assert logged() == []
    trainer.train()
    (line,) = logged()
    assert "after 2 updates" in line
    assert trainer._teacher.state.ticks == 4
    for name, weight in average(students.seen).items():
        torch.testing.assert_close(trainer._teacher.state.params[name].double(), weight, rtol=1e-6, atol=1e-6)
    # Resuming asks for it, so it logs nothing.
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert logged() == []
    assert trainer._teacher.state.ticks == 4


@pytest.mark.parametrize("mode", ["ema", "frozen", "trust_region"])
@pytest.mark.parametrize("name", ["full, tied embeddings", "LoRA, warm start"])
def test_it_starts_as_the_student_it_was_given(tmp_path: Path, name: str, mode: str) -> None:
    model = MODELS[name]()
    with torch.no_grad():  # weights that cannot be loaded from anywhere
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.01)
    before = logits(model)
    trainer = tiny.trainer(tmp_path, start=model, sdpo_config=tiny.config(teacher_mode=mode))
    params = trainer._teacher.forwards(trainer._unwrapped, training=True)[0]
    assert torch.equal(logits(trainer._unwrapped, params), before)


def test_the_start_rejects_an_adapter_at_zero() -> None:
    model = warm_started()
    zero = {name: torch.zeros_like(w) if "lora_B" in name else w for name, w in trained(model).items()}
    assert not torch.equal(logits(model, zero), logits(model))


def test_an_adapter_made_from_a_config_is_averaged_too(tmp_path: Path) -> None:
    trainer = tiny.trainer(
        tmp_path, sdpo_config=tiny.config(teacher_mode="lora_ema"), peft_config=LoraConfig(r=4)
    )
    assert trainer._teacher.rule == "ema"
    assert all("lora_" in name for name in trainer._teacher.state.params)


def test_lora_ema_insists_on_adapters(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"teacher_mode='lora_ema'.*peft_config.*teacher_mode='ema'"):
        tiny.trainer(tmp_path, sdpo_config=tiny.config(teacher_mode="lora_ema"))


def test_nothing_trainable_is_refused() -> None:
    with pytest.raises(ValueError, match="requires_grad"):
        TeacherStore(tiny.model().requires_grad_(False), SDPOConfig(), seed=0)


@pytest.mark.parametrize("mode", ["ema", "frozen"])
def test_other_trainable_parameters_than_at_the_start_are_refused_by_name(mode: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    store = started(model, teacher_mode=mode)
    model[0].bias.requires_grad_(False)
    for call in (partial(store.forwards, training=True), store.tick, store.distance):
        with pytest.raises(ValueError, match=r"lost '0\.bias'"):
            call(model)


@pytest.mark.parametrize(
    ("change", "gained"),
    [
        (lambda model: model.append(nn.Linear(2, 2, bias=False)), "1.weight"),
        (lambda model: setattr(model[0], "bias", nn.Parameter(torch.zeros(2))), "0.bias"),
        (lambda model: model[0].frozen.requires_grad_(True), "0.frozen"),
    ],
    ids=["a module", "a parameter", "a frozen one"],
)
def test_a_new_trainable_parameter_is_refused_at_the_next_tick(
    change: Callable[[Any], Any], gained: str
) -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    model[0].frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
    store = started(model)
    store.forwards(model, training=True)
    store.tick(model)
    change(model)
    with pytest.raises(ValueError, match=f"gained '{gained}'"):
        store.tick(model)


def test_a_parameter_that_became_tied_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    store = started(model)
    store.forwards(model, training=True)
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"lost '1\.weight'"):
        store.forwards(model, training=True)


def rate_of(students: list[Weights], teacher: Weights) -> float:
    """The rate r of one update from the first to the second student, θ' = θ_0 + r·(θ_1 − θ_0), by least squares."""
    moved = torch.cat([(students[1][name] - students[0][name]).flatten().double() for name in teacher])
    followed = torch.cat([(teacher[name] - students[0][name]).flatten().double() for name in teacher])
    return (moved @ followed / (moved @ moved)).item()


@pytest.mark.parametrize(
    ("samples", "config", "settings"),
    [
        (8, {}, {}),
        (16, {}, {"steps_per_generation": 2, "gradient_accumulation_steps": 2}),
        (8, {}, {"num_iterations": 2, "max_steps": 2}),
        (8, {"teacher_tick": "optimizer_step"}, {"steps_per_generation": 2}),
        (4, {"teacher_tick": "optimizer_step"}, {"num_iterations": 2}),
    ],
    ids=["a batch", "two micro-batches", "two passes", "a step", "a step of two passes"],
)
def test_the_rate_per_samples_is_that_of_the_completions_of_an_update(
    tmp_path: Path, samples: int, config: dict[str, Any], settings: dict[str, Any]
) -> None:
    config = tiny.config(teacher_update_rate=RATE, teacher_rate_samples=64, **config)
    trainer = tiny.trainer(tmp_path, sdpo_config=config, **{"max_steps": 1, **settings})
    students = Students(trainer._unwrapped)
    trainer.add_callback(students)
    trainer.train()
    assert trainer._teacher.state.ticks == 1
    rate = rate_of([students.seen[0], students.seen[-1]], trainer._teacher.state.params)
    assert rate == pytest.approx(1 - (1 - RATE) ** (samples / 64), rel=1e-4)
    assert rate != pytest.approx(1 - (1 - RATE) ** (2 * samples / 64), rel=1e-2)


@pytest.mark.parametrize(
    ("samples", "options", "rate"),
    [
        (64, {}, 1 - 0.95 ** (64 / 256)),
        (256, {}, 0.05),
        (64, {"teacher_rate_samples": None}, 0.05),
    ],
    ids=["the default", "the paper's batch", "of one update"],
)
def test_the_paper_s_rate_is_for_256_completions(
    tmp_path: Path, samples: int, options: dict[str, Any], rate: float
) -> None:
    trainer = tiny.trainer(
        tmp_path,
        sdpo_config=SDPOConfig(k=20, loss_backend="torch", **options),
        per_device_train_batch_size=samples,
        train_dataset=tiny.conversations(samples),
        max_steps=1,
    )
    students = Students(trainer._unwrapped)
    trainer.add_callback(students)
    trainer.train()
    assert trainer._teacher.state.ticks == 1
    moved = rate_of([students.seen[0], students.seen[-1]], trainer._teacher.state.params)
    assert moved == pytest.approx(rate, rel=1e-3)


def test_the_rate_per_samples_needs_the_samples() -> None:
    with pytest.raises(ValueError, match=r"samples_per_tick: expected the completions .*=256, got None"):
        TeacherStore(tiny.model(), SDPOConfig(), seed=0)


def test_a_frozen_teacher_starts_again_after_every_so_many_batches(tmp_path: Path) -> None:
    """Batches of two optimizer steps; the run that resumes within the fourth continues the count."""
    settings = {
        "per_device_train_batch_size": 4,
        "steps_per_generation": 2,
        "max_steps": 9,
        "save_strategy": "steps",
        "save_steps": 7,
    }
    config = tiny.config(teacher_mode="frozen", teacher_restart_every=2)
    seen: list[Weights] = []

    class Teachers(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append({name: p.clone() for name, p in trainer._teacher.state.params.items()})

    trainer = tiny.trainer(tmp_path, sdpo_config=config, **settings)
    students = Students(trainer._unwrapped)
    trainer.add_callback(students)
    trainer.add_callback(Teachers())
    trainer.train()
    starts = [0, 0, 0, 4, 4, 4, 4, 8, 8]  # the student's step that the teacher of each step equals
    for teacher, start in zip(seen, starts, strict=True):
        assert all(torch.equal(tensor, students.seen[start][name]) for name, tensor in teacher.items())
    assert not torch.equal(next(iter(seen[0].values())), next(iter(seen[3].values())))
    whole, seen = seen, []
    trainer = tiny.trainer(tmp_path / "again", sdpo_config=config, **settings)
    trainer.add_callback(Teachers())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    for ours, theirs in zip(seen, whole[7:], strict=True):
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_a_restart_takes_the_present_student(offload: str) -> None:
    model = tiny.model()
    store = started(model, teacher_mode="frozen", teacher_restart_every=2, teacher_offload=offload)
    first = trained(model)
    for begins_again in (False, True, False, True):
        with torch.no_grad():
            model.model.norm.weight.add_(1.0)
        store.tick(model)
        expected = trained(model) if begins_again else first
        assert all(torch.equal(tensor, expected[name]) for name, tensor in store.state.params.items())
        first = expected
