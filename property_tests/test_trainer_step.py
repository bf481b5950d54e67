"""An optimizer step of the trainer against the same step written by hand.

The hand-written side knows the paper and nothing of this library: it takes the sampled completions, tokenizes
characters itself, runs every row alone and without padding, takes the divergence from its definition in
float64 and lets autograd do the rest. Sums, batches, padding, accumulation and the teacher's clock are the
trainer's; the numbers must be equal.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from sdpo_rl import alignment, distillation, hidden_states, normalization, prompts, trl_trainer
from torch import Tensor, nn
from transformers import TrainerCallback

TOLERANCE = 3e-6
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])

Weights = dict[str, Tensor]


# --- what is recorded from the trainer --------------------------------------------------------------------


@dataclass
class Row:
    prompt: Any
    completion: list[int]
    prompt_ids: list[int]
    peers: list[Row] = field(repr=False)
    sampled_with: Weights = field(repr=False)

    @property
    def text(self) -> str:
        return "".join(tiny.VOCABULARY[i] for i in self.completion if i > 5)


@dataclass
class Step:
    rows: list[Row]
    before: Weights
    gradients: Weights
    micro_batches: int
    after: Weights = field(default_factory=dict)


def trainable(model: nn.Module) -> Weights:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


class Recorder(TrainerCallback):
    """Rows as they were sampled, and for each optimizer step its rows, its gradients and the weights around it."""

    def __init__(self, trainer: Any) -> None:
        self.rows: list[Row] = []
        self.steps: list[Step] = []
        self._pending: list[list[int]] = []
        self._generate = trainer._generate_and_score_completions
        self._loss = trainer.compute_loss
        self._model = trainer.model
        trainer._generate_and_score_completions = self.generate
        trainer.compute_loss = self.loss
        trainer.add_callback(self)

    def generate(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = self._generate(inputs)
        if self._model.training:
            output["row_id"] = torch.arange(len(inputs)) + len(self.rows)
            now = trainable(self._model)
            batch: list[Row] = []
            for i, row in enumerate(inputs):
                completion = output["completion_ids"][i][output["completion_mask"][i].bool()].tolist()
                prompt_ids = output["prompt_ids"][i][output["prompt_mask"][i].bool()].tolist()
                batch.append(Row(row["prompt"], completion, prompt_ids, [], now))
            for i, row in enumerate(batch):
                group = i // tiny.GROUP * tiny.GROUP
                row.peers = [peer for peer in batch[group : group + tiny.GROUP] if peer is not row]
            self.rows += batch
        return output

    def loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        if "row_id" in inputs:
            self._pending.append(inputs["row_id"].tolist())
        return self._loss(model, inputs, *args, **kwargs)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for name, p in self._model.named_parameters()
            if p.requires_grad
        }
        rows = [self.rows[i] for micro_batch in self._pending for i in micro_batch]
        self.steps.append(Step(rows, trainable(self._model), gradients, len(self._pending)))
        self._pending = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps[-1].after = trainable(self._model)


# --- the step by hand -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """The objective, in the paper's words."""

    alpha: float = 0.5
    k: int | None = 20  # None: the whole vocabulary
    top_of: str = "student"
    tail: bool = True
    sampled: bool = False
    temperature: float = 1.0
    clip: float | None = 2.0
    sequence_mean: bool = False
    teacher: str = "ema"
    rate: float = 0.3
    tick_every_step: bool = False
    shown: int = 1
    feedback_too: bool = False
    system: str = ""  # what the chat template puts first
    tag: str = ""  # what it puts last


def characters(text: str) -> list[int]:
    ids = []
    while text:
        token = next((t for t in tiny.VOCABULARY[:6] if text.startswith(t)), text[0])
        ids.append(tiny.VOCABULARY.index(token))
        text = text[len(token) :]
    return ids


def render(prompt: Any, question: str, method: Method) -> list[int]:
    if isinstance(prompt, str):
        return characters(question)
    marks = {"system": "<system>", "user": "<user>", "assistant": "<bot>"}
    earlier = "".join(marks[turn["role"]] + turn["content"] for turn in prompt[:-1])
    return characters(f"{method.system}{earlier}<user>{question}<bot>{method.tag}")


def question_of(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def reprompt(row: Row, method: Method) -> str | None:
    """What the teacher reads instead of the question; `None` without a teacher signal."""
    shown = [peer.text for peer in row.peers if tiny.score(peer.text) >= 1.0 and peer.text.strip()]
    shown = shown[: method.shown]
    feedback = tiny.remark(row.text)
    if shown and not method.feedback_too:
        feedback = ""
    if not shown and not feedback:
        return None
    text = question_of(row.prompt)
    for demonstration in shown:
        text += "\nCorrect solution:\n\n" + demonstration
    if feedback:
        text += "\nThe following is feedback from your unsuccessful earlier attempt:\n\n" + feedback
    return text + "\n\nCorrectly solve the original question."


def completion_logits(model: nn.Module, prompt: list[int], row: Row, method: Method) -> Tensor:
    ids = torch.tensor([prompt + row.completion])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    return logits.double() / method.temperature


def divergence(p: Tensor, q: Tensor, alpha: float) -> Tensor:
    """Of probabilities [T, C]."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a.log() - b.log())).sum(-1)

    if alpha == 0.0:
        return kl(q, p)
    if alpha == 1.0:
        return kl(p, q)
    middle = (1 - alpha) * p + alpha * q
    return (1 - alpha) * kl(p, middle) + alpha * kl(q, middle)


def per_token_loss(p: Tensor, q: Tensor, tokens: Tensor, method: Method) -> Tensor:
    """Of probabilities [T, V]."""
    if method.sampled:
        log_p, log_q = (x.gather(-1, tokens[:, None]).squeeze(-1).log() for x in (p, q))
        return (log_p - log_q).detach() * log_p
    if method.k is not None:
        support = (p if method.top_of == "student" else q).topk(method.k).indices
        inside_p, inside_q = p.gather(-1, support), q.gather(-1, support)
        if method.tail:
            p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (inside_p, inside_q))
        else:
            p, q = (x / x.sum(-1, keepdim=True) for x in (inside_p, inside_q))
    return divergence(p, q, method.alpha)


def sampled_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.detach().log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)


class ByHand:
    """The same training step, one row at a time."""

    def __init__(self, blank: nn.Module, method: Method) -> None:
        self.student, self.teacher, self.sampler = blank, copy.deepcopy(blank), copy.deepcopy(blank)
        self.first = copy.deepcopy(blank)
        self.method = method

    def teacher_logits(self, context: list[int], row: Row) -> Tensor:
        with torch.no_grad():
            if self.method.teacher == "live":
                return completion_logits(self.student, context, row, self.method)
            if self.method.teacher == "trust_region":
                first, live = (
                    completion_logits(model, context, row, self.method)
                    for model in (self.first, self.student)
                )
                return (first + live) / 2
            return completion_logits(self.teacher, context, row, self.method)

    def step(self, rows: list[Row], *, stale: bool) -> tuple[float, Weights]:
        """Loss and gradient; `stale`: the rows were sampled with weights that the student has left."""
        method, losses = self.method, []
        for row in rows:
            text = reprompt(row, method)
            if text is None:
                continue
            tokens = torch.tensor(row.completion)
            context = render(row.prompt, text, method)
            logits = completion_logits(self.student, render(row.prompt, question_of(row.prompt), method), row, method)
            loss = per_token_loss(
                logits.softmax(-1), self.teacher_logits(context, row).softmax(-1), tokens, method
            )
            if stale and method.clip is not None:
                self.sampler.load_state_dict(row.sampled_with, strict=False)
                with torch.no_grad():
                    old = completion_logits(
                        self.sampler, render(row.prompt, question_of(row.prompt), method), row, method
                    )
                gap = sampled_log_probs(logits, tokens) - sampled_log_probs(old, tokens)
                loss = loss * gap.exp().clamp(max=method.clip)
            losses.append(loss.mean()[None] if method.sequence_mean else loss)
        loss = torch.cat(losses).mean()
        named = {name: p for name, p in self.student.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(loss, list(named.values()))
        return loss.item(), dict(zip(named, gradients, strict=True))


@dataclass(frozen=True)
class Difference:
    """Relative to the hand-written step, the largest over all steps."""

    gradient: float
    loss: float


def compare(trainer: Any, blank: nn.Module, method: Method = Method()) -> Difference:
    """Train, then do every step again by hand."""
    recorder = Recorder(trainer)
    trainer.train()
    hand = ByHand(blank, method)
    generate_every = trainer.args.steps_per_generation * trainer.num_iterations
    stale = trainer.args.gradient_accumulation_steps % generate_every != 0
    teacher = recorder.steps[0].before
    hand.first.load_state_dict(teacher, strict=False)
    micro_batches = ticks = 0
    logged = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    gradient_error = loss_error = 0.0
    for number, step in enumerate(recorder.steps, start=1):
        assert all(row.prompt_ids == render(row.prompt, question_of(row.prompt), method) for row in step.rows)
        hand.student.load_state_dict(step.before, strict=False)
        hand.teacher.load_state_dict(teacher, strict=False)
        loss, gradients = hand.step(step.rows, stale=stale)
        assert gradients.keys() == step.gradients.keys()
        # One length for all: a parameter whose own gradient vanishes has no relative error.
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        gap = torch.stack([(g - step.gradients[name]).norm() for name, g in gradients.items()]).norm()
        gradient_error = max(gradient_error, (gap / norm).item())
        loss_error = max(loss_error, abs(logged[number] - loss) / loss if not method.sampled else 0.0)
        micro_batches += step.micro_batches
        due = number if method.tick_every_step else micro_batches // generate_every
        for _ in range(due - ticks):
            if method.teacher == "ema":
                teacher = {
                    name: (1 - method.rate) * old + method.rate * step.after[name]
                    for name, old in teacher.items()
                }
        ticks = due
    return Difference(gradient_error, loss_error)


# --- equality ---------------------------------------------------------------------------------------------


def blank(lora: bool = False) -> nn.Module:
    return get_peft_model(tiny.model(), copy.deepcopy(LORA)) if lora else tiny.model()


def talk() -> Dataset:
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


def weather(city: str) -> str:
    """Tell the weather.

    Args:
        city: where.
    """
    return city


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
    "one token": ({"distillation_topk": 1}, Method(k=1)),
    "renormalized": ({"distillation_add_tail": False}, Method(tail=False)),
    "top of the teacher": ({"distillation_support": "teacher_topk"}, Method(top_of="teacher")),
    "whole vocabulary": ({"distillation_support": "full"}, Method(k=None)),
    "whole vocabulary, reverse": ({"distillation_support": "full", "alpha": 1.0}, Method(k=None, alpha=1.0)),
    "sampled token": ({"distillation_support": "sampled_token", "alpha": 1.0}, Method(sampled=True)),
    "sequence mean": ({"loss_aggregation": "sequence-mean"}, Method(sequence_mean=True)),
    "frozen teacher": ({"teacher_mode": "frozen"}, Method(teacher="frozen")),
    "live teacher": ({"teacher_mode": "live"}, Method(teacher="live")),
    "trust region": ({"teacher_mode": "trust_region"}, Method(teacher="trust_region")),
    "teacher that is the student after every tick": ({"teacher_update_rate": 1.0}, Method(rate=1.0)),
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
    difference = compare(trainer, blank())
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
    difference = compare(trainer, blank(), method)
    assert difference.gradient < TOLERANCE
    assert difference.loss < TOLERANCE


@pytest.mark.parametrize("backend", ["torch", "logits"])
def test_the_temperature_divides_both_sides(tmp_path: Path, backend: str) -> None:
    trainer = tiny.trainer(
        tmp_path, sdpo_config=tiny.config(loss_backend=backend), temperature=0.6, num_iterations=2, max_steps=3
    )
    assert compare(trainer, blank(), Method(temperature=0.6)).gradient < TOLERANCE


@pytest.mark.parametrize(
    "changes", [{"is_clip": None}, {"is_clip": 1.01}], ids=["weights off", "weights cut early"]
)
def test_the_importance_weights(tmp_path: Path, changes: dict[str, Any]) -> None:
    trainer = tiny.trainer(
        tmp_path, sdpo_config=tiny.config(**changes), num_iterations=3, max_steps=5, learning_rate=0.05
    )
    assert compare(trainer, blank(), Method(clip=changes["is_clip"])).gradient < TOLERANCE


def test_the_teacher_may_tick_with_the_optimizer(tmp_path: Path) -> None:
    trainer = tiny.trainer(
        tmp_path, sdpo_config=tiny.config(teacher_tick="optimizer_step"), num_iterations=2, max_steps=4
    )
    assert compare(trainer, blank(), Method(tick_every_step=True)).gradient < TOLERANCE


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
    assert compare(trainer, blank(lora)).gradient < TOLERANCE


def test_plain_prompts_stay_plain(tmp_path: Path) -> None:
    assert compare(tiny.trainer(tmp_path, train_dataset=tiny.plain()), blank()).gradient < TOLERANCE


def test_system_prompt_and_earlier_turns_stay(tmp_path: Path) -> None:
    assert compare(tiny.trainer(tmp_path, train_dataset=talk()), blank()).gradient < TOLERANCE


def test_chat_template_arguments_reach_the_teacher(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, chat_template_kwargs={"tag": "ok:"})
    assert compare(trainer, blank(), Method(tag="ok:")).gradient < TOLERANCE


def test_an_untied_head(tmp_path: Path) -> None:
    start = tiny.model(tie_word_embeddings=False)
    difference = compare(tiny.trainer(tmp_path, start=start), tiny.model(tie_word_embeddings=False))
    assert difference.gradient < TOLERANCE


# --- planted errors ---------------------------------------------------------------------------------------
# Each is a fault that some implementation had; the comparison that passes above must notice it.

Plant = Callable[[pytest.MonkeyPatch], None]
FOUR: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}


def each_micro_batch_by_its_own_count(patch: pytest.MonkeyPatch) -> None:
    def denominator(
        self: Any, *, step: int, index: int, length: int, generate_every: int
    ) -> Tensor:
        return self._counts[step % len(self._counts)].clamp(min=1.0) * length

    patch.setattr(normalization.StepWindow, "denominator", denominator)


def not_divided_by_accumulation(patch: pytest.MonkeyPatch) -> None:
    true = normalization.StepWindow.denominator
    patch.setattr(
        normalization.StepWindow, "denominator", lambda self, **kwargs: true(self, **kwargs) / kwargs["length"]
    )


def template_applied_twice(patch: pytest.MonkeyPatch) -> None:
    true = prompts.with_question
    patch.setattr(prompts, "with_question", lambda prompt, text: true(prompt, f"<user>{text}<bot>"))


def system_prompt_lost(patch: pytest.MonkeyPatch) -> None:
    true = prompts.with_question
    patch.setattr(prompts, "with_question", lambda prompt, text: true(prompt, text)[-1:])


def teacher_without_temperature(patch: pytest.MonkeyPatch) -> None:
    for name in ("from_logits", "fused"):
        true = getattr(distillation, name)

        def forgetful(config: Any, p: Any, q: Any, *args: Any, true: Any = true, **kwargs: Any) -> Any:
            warm = kwargs["temperature"]
            q = [x._replace(hidden=x.hidden * warm) if hasattr(x, "hidden") else x * warm for x in q]
            return true(config, p, q, *args, **kwargs)

        patch.setattr(distillation, name, forgetful)


def padding_is_attended(patch: pytest.MonkeyPatch) -> None:
    def left_pad(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        ids, mask = alignment.left_pad(*args, **kwargs)
        return ids, torch.ones_like(mask)

    patch.setattr(trl_trainer, "left_pad", left_pad)


def teacher_reads_the_neighbour(patch: pytest.MonkeyPatch) -> None:
    def left_pad(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        ids, mask = alignment.left_pad(*args, **kwargs)
        return ids.roll(1, 0), mask.roll(1, 0)

    patch.setattr(trl_trainer, "left_pad", left_pad)


def teacher_never_moves(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(trl_trainer.TeacherStore, "tick", lambda self, model: None)


def teacher_moves_with_every_micro_batch(patch: pytest.MonkeyPatch) -> None:
    true = trl_trainer.SDPOTrainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss = true(self, *args, **kwargs)
        self._teacher.tick(self._unwrapped)
        return loss

    patch.setattr(trl_trainer.SDPOTrainer, "training_step", training_step)


def teacher_is_the_student(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(trl_trainer.TeacherStore, "forwards", lambda self, model: [None])


def importance_weights_forgotten(patch: pytest.MonkeyPatch) -> None:
    for name in ("from_logits", "fused"):
        true = getattr(distillation, name)

        def unweighted(config: Any, p: Any, q: Any, targets: Any, true: Any = true, **kwargs: Any) -> Any:
            return true(config, p, q, targets._replace(old_log_probs=None), **kwargs)

        patch.setattr(distillation, name, unweighted)


def one_position_late(patch: pytest.MonkeyPatch) -> None:
    true = hidden_states.completion_states

    def late(*args: Any, **kwargs: Any) -> Any:
        states = true(*args, **kwargs)
        return states._replace(hidden=states.hidden.roll(-1, 1))

    patch.setattr(hidden_states, "completion_states", late)


def first_estimate_is_kept(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(normalization.StepWindow, "correction", lambda self: None)


ERRORS: list[tuple[Plant, dict[str, Any], Method]] = [
    (each_micro_batch_by_its_own_count, FOUR, Method()),
    (not_divided_by_accumulation, FOUR, Method()),
    (template_applied_twice, {}, Method()),
    (system_prompt_lost, {"train_dataset": talk()}, Method()),
    (teacher_without_temperature, {"temperature": 0.6}, Method(temperature=0.6)),
    (padding_is_attended, {}, Method()),
    (teacher_reads_the_neighbour, {}, Method()),
    (teacher_never_moves, {}, Method()),
    (teacher_moves_with_every_micro_batch, FOUR, Method()),
    (teacher_is_the_student, {}, Method()),
    (importance_weights_forgotten, {"num_iterations": 2}, Method()),
    (one_position_late, {}, Method()),
    (first_estimate_is_kept, ACCUMULATION["two generation batches in one step"], Method()),
]


@pytest.mark.parametrize(("plant", "changes", "method"), ERRORS, ids=[plant.__name__ for plant, *_ in ERRORS])
def test_the_comparison_notices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Plant, changes: dict[str, Any], method: Method
) -> None:
    plant(monkeypatch)
    trainer = tiny.trainer(tmp_path, **{"max_steps": 4, **changes})
    assert compare(trainer, blank(), method).gradient > 1000 * TOLERANCE
