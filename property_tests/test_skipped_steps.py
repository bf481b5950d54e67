"""An optimizer step without signal changes neither weights nor moments nor teacher; the schedule goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig
from reference_step import Recorder, trainable
from torch import nn
from transformers import Adafactor, TrainerCallback

import sdpo_rl.trainer as trainer_module
from sdpo_rl.step.denominator import StepWindow, signal_counts
from sdpo_rl.step.optimizer import drop_gradients

FOUR: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
HALVES: dict[str, Any] = {"per_device_train_batch_size": 4, "steps_per_generation": 2}
OVER_TWO: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "steps_per_generation": 2,
    "gradient_accumulation_steps": 4,
}
SKIPPED = "self_distillation/step_without_signal"
RATE, DECAY, BETAS = 1e-2, 0.5, (0.9, 0.999)


def signal_in(*batches: int) -> Any:
    """A reward without successes, with feedback in the generation batches of these numbers."""
    calls: list[int] = []

    def reward(completions: list[Any], **_: Any) -> list[Any]:
        calls.append(len(completions))
        return [(0.0, "do better" if len(calls) - 1 in batches else None) for _ in completions]

    return reward


class Watch(TrainerCallback):
    """Weights, the optimizer's state and the teacher after every step, as lists of tensors."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.seen: list[dict[str, list[torch.Tensor]]] = []
        trainer.add_callback(self)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = self._trainer.optimizer.optimizer
        slots = [slot for slots in optimizer.state.values() for slot in slots.values() if slot is not None]
        teacher = self._trainer._teacher.state
        self.seen.append(
            {
                "weights": list(trainable(self._trainer.model).values()),
                "moments": [
                    torch.tensor(slot) if isinstance(slot, (int, float)) else slot.clone() for slot in slots
                ],
                "teacher": [*(p.clone() for p in teacher.params.values()), torch.tensor(teacher.ticks)],
            }
        )


def changed(before: dict[str, list[torch.Tensor]], after: dict[str, list[torch.Tensor]]) -> set[str]:
    return {
        part
        for part in before
        if len(before[part]) != len(after[part])
        or not all(torch.equal(a, b) for a, b in zip(before[part], after[part], strict=True))
    }


def watched(folder: Path, reward: Any, **changes: Any) -> tuple[Any, Watch]:
    settings = {"learning_rate": RATE, "weight_decay": DECAY, "max_grad_norm": 1.0, "max_steps": 4, **changes}
    trainer = tiny.trainer(folder, reward_funcs=reward, **settings)
    watch = Watch(trainer)
    trainer.train()
    return trainer, watch


def logs(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("split", [{}, FOUR], ids=["one micro-batch", "four"])
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
def test_a_step_without_signal_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optim: str, split: dict[str, Any]
) -> None:
    """Momentum (where there is any) and weight decay wait; the counter-example leaves the gradients of 0."""
    everything = {"weights", "moments", "teacher"} if optim != "sgd" else {"weights", "teacher"}
    settings = {"optim": optim, "lr_scheduler_type": "linear", **split}
    trainer, watch = watched(tmp_path / "ours", signal_in(0, 3), **settings)
    first, second, third, fourth = watch.seen
    assert changed(first, second) == changed(second, third) == set()
    assert changed(third, fourth) == everything
    assert logs(trainer, SKIPPED) == [0.0, 1.0, 1.0, 0.0]
    assert logs(trainer, "learning_rate") == pytest.approx([RATE * left / 4 for left in (4, 3, 2, 1)])
    monkeypatch.setattr(
        trainer_module, "drop_gradients", lambda *_, **__: drop_gradients(*_, unless=lambda: True)
    )
    _, watch = watched(tmp_path / "counter-example", signal_in(0, 3), **settings)
    assert {"weights"} <= changed(watch.seen[0], watch.seen[1])


@pytest.mark.parametrize("split", [{}, FOUR], ids=["one micro-batch", "four"])
def test_the_run_is_adamw_over_the_steps_with_signal(tmp_path: Path, split: dict[str, Any]) -> None:
    """From AdamW's definition: the moments and their bias correction count these steps only."""
    trainer = tiny.trainer(
        tmp_path,
        reward_funcs=signal_in(1, 3),
        weight_decay=DECAY,
        learning_rate=RATE,
        max_steps=5,
        **split,
    )
    recorder = Recorder(trainer)
    trainer.train()
    assert [loss > 0 for loss in logs(trainer, "loss")] == [False, True, False, True, False]
    reference = recorder.steps[0].before
    first, second = ({name: torch.zeros_like(p) for name, p in reference.items()} for _ in BETAS)
    for count, step in enumerate((recorder.steps[1], recorder.steps[3]), start=1):
        for name, parameter in reference.items():
            gradient = step.gradients[name]
            first[name] = BETAS[0] * first[name] + (1 - BETAS[0]) * gradient
            second[name] = BETAS[1] * second[name] + (1 - BETAS[1]) * gradient**2
            shrunk = parameter * (1 - RATE * DECAY * ("bias" not in name and "norm" not in name))
            derivative = first[name] / (1 - BETAS[0] ** count)
            size = (second[name] / (1 - BETAS[1] ** count)).sqrt() + 1e-8
            reference[name] = shrunk - RATE * derivative / size
    gap = max((reference[name] - p).abs().max().item() for name, p in recorder.steps[-1].after.items())
    assert gap < 1e-5


def test_adapters_keep_their_weights(tmp_path: Path) -> None:
    adapter = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    trainer = tiny.trainer(tmp_path, reward_funcs=signal_in(), peft_config=adapter, weight_decay=DECAY)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


def test_a_row_weight_of_zero_is_no_signal(tmp_path: Path) -> None:
    """With row_weights='pass_rate' a group that failed as a whole teaches nothing, though it has feedback."""
    reward = signal_in(0, 1)
    trainer, watch = watched(tmp_path, reward, sdpo_config=tiny.config(row_weights="pass_rate"), max_steps=2)
    assert logs(trainer, SKIPPED) == [1.0, 1.0]
    assert changed(*watch.seen) == set()
    assert all(
        torch.equal(p, q)
        for p, q in zip(watch.seen[0]["weights"], trainable(tiny.model()).values(), strict=True)
    )
    mask = torch.tensor([[True, True, False], [True, False, False]])
    weighted = {"loss_mask": mask, "row_weights": torch.tensor([[0.0], [2.0]])}
    assert signal_counts({"loss_mask": mask}, None).tolist() == [0, 3]
    assert signal_counts(weighted, ~mask).tolist() == [3, 1]


def test_a_denominator_over_all_tokens_is_no_signal(tmp_path: Path) -> None:
    """`batch-token-mean` counts tokens without a loss, which do not make a step."""
    config = tiny.config(loss_aggregation="batch-token-mean")
    trainer, watch = watched(tmp_path, signal_in(0), sdpo_config=config, max_steps=2)
    assert logs(trainer, SKIPPED) == [0.0, 1.0]
    assert changed(*watch.seen) == set()


@pytest.mark.parametrize(
    ("options", "skipped"),
    [
        ({"grpo_weight": 0.5}, [0.0, 0.0, 1.0]),
        ({"grpo_weight": 1.0}, [0.0, 1.0, 1.0]),
        ({"grpo_weight": 0.0, "grpo_weight_final": 0.5}, [1.0, 0.0, 1.0]),
        ({"routing": "srpo"}, [0.0, 0.0, 1.0]),
        ({}, [1.0, 0.0, 1.0]),
        ({"grpo_weight": 1.0, "of GRPO": {"top_entropy_quantile": 0.5}}, [0.0, 1.0, 1.0]),
        ({"grpo_weight": 1.0, "of GRPO": {"entropy_coef": 0.1}}, [0.0, 0.0, 0.0]),
    ],
    ids=[
        "both parts",
        "GRPO alone",
        "GRPO from the second step on",
        "routed",
        "no GRPO",
        "tokens of high entropy",
        "an entropy bonus",
    ],
)
def test_an_advantage_is_a_signal_where_it_has_a_weight(
    tmp_path: Path, options: dict[str, Any], skipped: list[float]
) -> None:
    """The first batch has scores that differ but no success, the second feedback alone, the third neither."""
    calls: list[int] = []

    def reward(completions: list[Any], **_: Any) -> list[Any]:
        calls.append(len(completions))
        feedback = "do better" if len(calls) == 2 else None
        return [(0.5 * (row % 2) * (len(calls) == 1), feedback) for row in range(len(completions))]

    arguments = options.get("of GRPO", {})
    config = tiny.config(**{name: value for name, value in options.items() if name != "of GRPO"})
    trainer, watch = watched(tmp_path, reward, sdpo_config=config, max_steps=3, **arguments)
    assert logs(trainer, SKIPPED) == skipped
    for before, after, waits in zip(watch.seen, watch.seen[1:], skipped[1:], strict=False):
        assert changed(before, after) == (set() if waits else {"weights", "moments", "teacher"})


# --- the teacher ------------------------------------------------------------------------------------------


def ticks(watch: Watch) -> list[int]:
    return [int(seen["teacher"][-1]) for seen in watch.seen]


def test_a_generation_batch_with_one_step_of_signal_moves_the_teacher(tmp_path: Path) -> None:
    """Two optimizer steps a batch; the first group of the first batch has the only signal."""
    calls: list[int] = []

    def reward(completions: list[Any], **_: Any) -> list[Any]:
        calls.append(len(completions))
        return [
            (0.0, "do better" if len(calls) == 1 and row == 0 else None) for row in range(len(completions))
        ]

    trainer, watch = watched(tmp_path, reward, **HALVES)
    skipped = logs(trainer, SKIPPED)
    assert sorted(skipped[:2]) == [0.0, 1.0]
    assert skipped[2:] == [1.0, 1.0]
    assert ticks(watch) == [0, 1, 1, 1]


def test_the_teacher_waits_by_the_step_where_it_moves_by_the_step(tmp_path: Path) -> None:
    config = tiny.config(teacher_tick="optimizer_step")
    _, watch = watched(tmp_path, signal_in(1), sdpo_config=config)
    assert ticks(watch) == [0, 1, 1, 1]


def test_a_step_over_two_generation_batches_has_the_signal_of_either(tmp_path: Path) -> None:
    trainer, watch = watched(tmp_path, signal_in(1), **OVER_TWO, max_steps=2)
    assert logs(trainer, SKIPPED) == [0.0, 1.0]
    assert ticks(watch) == [2, 2]
    assert changed(*watch.seen) == set()


@pytest.mark.parametrize("forgets", [False, True], ids=["ours", "counter-example"])
def test_a_run_resumed_within_a_batch_knows_of_its_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgets: bool
) -> None:
    """The first step of the batch has the signal, the run stops after it, the second step ends the batch."""
    calls: list[int] = []

    def reward(completions: list[Any], **_: Any) -> list[Any]:
        calls.append(len(completions))
        return [(0.0, "do better" if len(calls) == 1 else None) for _ in completions]

    settings = {**HALVES, "save_strategy": "steps", "save_steps": 1}
    first = tiny.trainer(tmp_path, reward_funcs=reward, max_steps=1, **settings)
    first.train()
    second = tiny.trainer(tmp_path, reward_funcs=reward, max_steps=2, **settings)
    load = second._load_run_state

    def load_without_rows(state: Any) -> None:
        for batch in state.batches:  # what is left of the batch has no signal
            batch["loss_mask"] = torch.zeros_like(batch["loss_mask"])
        state.student_moved = state.student_moved and not forgets
        load(state)

    monkeypatch.setattr(second, "_load_run_state", load_without_rows)
    second.train(resume_from_checkpoint=True)
    assert logs(second, SKIPPED)[-1] == 1.0
    assert second._teacher.state.ticks == (0 if forgets else 1)


# --- parts ------------------------------------------------------------------------------------------------


def test_the_window_knows_signal_by_step() -> None:
    """Three generation batches of two micro-batches, steps of two; a token of the second batch has a divergence."""
    window = StepWindow()
    seen = []
    for step in range(6):
        if step % 2 == 0:
            window.set_counts(torch.tensor([4, 4]), torch.tensor([[0, 0], [0, int(step == 2)]]))
        window.denominator(step=step, length=2, generate_every=2, part_weights=(0.0, 1.0))
        window.end_micro_batch(torch.zeros(()), ends_step=step % 2 == 1)
        seen.append(window.has_signal)
    assert seen == [False, False, False, True, False, False]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [((0.0, 1.0), [True, False]), ((1.0, 0.0), [False, True]), ((0.5, 0.5), [True, True])],
)
def test_a_part_without_weight_has_no_signal(weights: tuple[float, float], expected: list[bool]) -> None:
    """The first micro-batch has a divergence, the second a policy loss."""
    seen = []
    for step in range(2):
        window = StepWindow()
        window.set_counts(torch.tensor([4, 4]), torch.tensor([[0, 3], [3, 0]]))
        window.denominator(step=step, length=1, generate_every=2, part_weights=weights)
        seen.append(window.has_signal)
    assert seen == expected


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
    "adamw, foreach": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, foreach=True),
    "adamw, fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.5),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, weight_decay=0.5),
    "adafactor": lambda p: Adafactor(p, lr=0.1, weight_decay=0.5, relative_step=False, scale_parameter=False),
}


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled loss"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_skip_parameters_without_gradients(name: str, scaled: bool) -> None:
    """Also under the loss scaling of fp16, which demands that gradients were seen."""
    layer = nn.Linear(3, 2)
    optimizer = OPTIMIZERS[name](layer.parameters())
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    has_signal = True
    handle = drop_gradients(optimizer, unless=lambda: has_signal)

    def step(factor: float) -> list[torch.Tensor]:
        scaler.scale(layer(torch.ones(1, 3)).square().sum() * factor).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        slots = [slot for slots in optimizer.state.values() for slot in slots.values()]
        tensors = [*layer.parameters(), *(slot for slot in slots if isinstance(slot, torch.Tensor))]
        return [tensor.detach().clone() for tensor in tensors]

    first = step(1.0)
    has_signal = False
    second = step(0.0)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    handle.remove()
    third = step(0.0)
    assert not torch.equal(second[0], third[0])


def test_training_leaves_no_hook_behind(tmp_path: Path) -> None:
    """After `train()` the optimizer is the caller's again."""
    model = tiny.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = tiny.trainer(tmp_path, start=model, reward_funcs=signal_in(), max_steps=1)
    trainer.optimizer = optimizer
    trainer.train()
    before = trainable(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in trainable(model).items())
