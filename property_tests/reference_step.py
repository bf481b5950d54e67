"""A reference for an optimizer step of the trainer, in plain PyTorch.

It uses nothing of the library: it takes the sampled completions, tokenizes characters itself, runs every row alone
and without padding, computes the divergence from its definition in float64 and differentiates it with autograd.
`compare` trains and returns the largest difference between the trainer's steps and the reference.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from statistics import mean, stdev
from typing import Any

import tiny
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

Weights = dict[str, Tensor]
Alteration = Callable[[dict[str, Any], "list[Row]"], None]


# --- what is recorded from the trainer --------------------------------------------------------------------


@dataclass
class Row:
    prompt: Any
    prompt_ids: list[int]
    completion: list[int]
    counts: list[bool]  # by token: has a loss
    sampled_with: Weights = field(repr=False)
    masked: bool = False  # by `mask_truncated_completions`: no demonstration
    peers: list[Row] = field(default_factory=list, repr=False)
    batch: list[Row] = field(default_factory=list, repr=False)  # its generation batch
    engine_gap: list[float] | None = None  # by token: trainer's minus inference engine's log-probability

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
    """Copies on the CPU, where the reference computes."""
    return {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters() if p.requires_grad}


class Recorder(TrainerCallback):
    """Records the sampled rows, and for each optimizer step its rows, gradients, and weights before and after.

    `alter` may change a generation batch before the trainer uses it, and must record the change in the rows.
    """

    def __init__(self, trainer: Any, alter: Alteration | None = None) -> None:
        self.rows: list[Row] = []
        self.evaluated: list[Row] = []
        self.steps: list[Step] = []
        self._alter = alter
        self._trainer = trainer
        self._pending: list[list[int]] = []
        self._generate = trainer._generate_and_score_completions
        self._loss = trainer.compute_loss
        self._model = trainer.model
        trainer._generate_and_score_completions = self.generate
        trainer.compute_loss = self.loss
        trainer.add_callback(self)

    def generate(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = self._generate(inputs)
        now = trainable(self._model)
        batch = []
        for i, row in enumerate(inputs):
            counts = output["completion_mask"][i].bool()
            ids = output["completion_ids"][i]
            length = int((counts if counts.any() else ids != 0).nonzero()[-1]) + 1
            prompt_ids = output["prompt_ids"][i][output["prompt_mask"][i].bool()].tolist()
            batch.append(
                Row(
                    row["prompt"],
                    prompt_ids,
                    ids[:length].tolist(),
                    counts[:length].tolist(),
                    now,
                    masked=not counts.any(),
                )
            )
        training = self._model.training
        size = self._trainer.num_generations if training else self._trainer.num_generations_eval
        for i, row in enumerate(batch):
            group = i // size * size
            row.peers = [peer for peer in batch[group : group + size] if peer is not row]
            row.batch = batch
        if training:
            output["row_id"] = torch.arange(len(inputs)) + len(self.rows)
            if self._alter is not None:
                self._alter(output, batch)
        (self.rows if training else self.evaluated).extend(batch)
        return output

    def loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        if "row_id" in inputs:
            self._pending.append(inputs["row_id"].tolist())
        return self._loss(model, inputs, *args, **kwargs)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients = {
            name: (torch.zeros_like(p) if p.grad is None else p.grad).to("cpu", copy=True)
            for name, p in self._model.named_parameters()
            if p.requires_grad
        }
        rows = [self.rows[i] for micro_batch in self._pending for i in micro_batch]
        self.steps.append(Step(rows, trainable(self._model), gradients, len(self._pending)))
        self._pending = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps[-1].after = trainable(self._model)


# --- the reference step -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """The objective."""

    alpha: float = 0.5
    k: int | None = 20  # None: the whole vocabulary
    top_of: str = "student"
    tail: bool = True
    sampled: bool = False
    temperature: float = 1.0
    clip: float | None = 2.0
    engine_clip: float = 2.0
    sequence_mean: bool = False
    batch_token_mean: bool = False
    pass_rate: bool = False  # weights of rows
    confidence: float | None = None  # β of the weights of tokens
    gate: float | None = None  # β of the other weights of tokens
    grpo: float = 0.0  # λ
    grpo_final: float | None = None  # λ of the last step
    routed: bool = False
    epsilon: float = 0.2
    evidence: tuple[float, float] | None = None  # mix and clip
    sequence_credit: bool = False
    entry_clip: float | None = None
    fraction: float = 1.0  # of the tokens of a row
    anchor: float = 0.0
    teacher: str = "ema"
    rate: float = 0.3
    rate_samples: int | None = None  # completions that the rate is given for; None: those of one update
    tick_every_step: bool = False
    shown: int = 1
    feedback: bool = True
    feedback_too: bool = False
    system: str = ""  # what the chat template puts first
    tag: str = ""  # what it puts last


DEFAULT = Method()


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
    """The teacher's question; `None` without a teacher signal."""
    peers = [peer.text for peer in row.peers if not peer.masked]
    shown = [text for text in peers if tiny.score(text) >= 1.0 and text.strip()]
    shown.sort(key=lambda text: text == row.text)
    shown = shown[: method.shown]
    feedback = tiny.remark(row.text) if method.feedback else ""
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
        ratio = (log_p - log_q).detach()
        return (ratio.mean() if method.sequence_credit else ratio) * log_p
    if method.entry_clip is not None:
        return clipped_entries(p, q, method.alpha).clamp(max=method.entry_clip).sum(-1)
    if method.k is not None:
        support = (p if method.top_of == "student" else q).topk(method.k).indices
        inside_p, inside_q = p.gather(-1, support), q.gather(-1, support)
        if method.tail:
            p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (inside_p, inside_q))
        else:
            p, q = (x / x.sum(-1, keepdim=True) for x in (inside_p, inside_q))
    return divergence(p, q, method.alpha)


def clipped_entries(p: Tensor, q: Tensor, alpha: float) -> Tensor:
    def terms(a: Tensor, b: Tensor) -> Tensor:
        return a * (a.log() - b.log()) - a + b

    if alpha in (0.0, 1.0):
        return terms(p, q) if alpha else terms(q, p)
    middle = (1 - alpha) * p + alpha * q
    return (1 - alpha) * terms(p, middle) + alpha * terms(q, middle)


def kept(entropy: list[float], divergences: list[float], fraction: float) -> list[bool]:
    """The share of tokens with a high entropy or divergence, each scaled to [0, 1]."""

    def scaled(values: list[float]) -> list[float]:
        width = max(values) - min(values)
        return [(value - min(values)) / width if width else 0.0 for value in values]

    pairs = zip(scaled(entropy), scaled(divergences), strict=True)
    scores = [1.0 - (1.0 - h) * (1.0 - d) for h, d in pairs]
    best = sorted(range(len(scores)), key=lambda i: -scores[i])[: math.ceil(fraction * len(scores))]
    return [i in best for i in range(len(scores))]


def sampled_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.detach().log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)


def advantage(row: Row) -> float:
    """The score relative to the group, in its standard deviations."""
    scores = [tiny.score(one.text) for one in [row, *row.peers]]
    return (scores[0] - mean(scores)) / (stdev(scores) + 1e-4)


def policy_loss(log_ratio: Tensor, advantages: Tensor, epsilon: float) -> Tensor:
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)


def undecided(row: Row) -> float:
    """√(p(1−p)) of the pass rate p of a row's group."""
    rate = mean(float(tiny.score(one.text) >= 1.0) for one in [row, *row.peers])
    return math.sqrt(rate * (1.0 - rate))


class ReferenceStep:
    """The training step, one row at a time."""

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
        """Loss and gradient; `stale`: the rows were sampled with earlier weights of the student."""
        method, losses, policy = self.method, [], []
        for row in rows:
            text = reprompt(row, method)
            if not any(row.counts):
                continue
            is_routed = method.routed and (text is None or tiny.score(row.text) >= 1.0)
            text = None if is_routed else text
            if text is None and method.grpo == 0.0 and not is_routed:
                continue
            counts, tokens = torch.tensor(row.counts), torch.tensor(row.completion)
            prompt = render(row.prompt, question_of(row.prompt), method)
            logits = completion_logits(self.student, prompt, row, method)
            log_probs = logits.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
            gap = log_probs - log_probs.detach()
            if stale:
                self.sampler.load_state_dict(row.sampled_with, strict=False)
                with torch.no_grad():
                    old = completion_logits(self.sampler, prompt, row, method)
                gap = log_probs - sampled_log_probs(old, tokens)
            advantages = torch.full_like(gap, advantage(row))
            if text is not None:
                q = self.teacher_logits(render(row.prompt, text, method), row).softmax(-1)
                evidence = sampled_log_probs(q.log(), tokens) - log_probs.detach()
                if method.evidence is not None:
                    mix, clip = method.evidence
                    moved = (advantages.sign() * evidence).exp().clamp(1 - clip, 1 + clip)
                    advantages = advantages * (1 - mix + mix * moved)
            if is_routed or method.grpo:
                policy.append(policy_loss(gap, advantages, method.epsilon)[counts])
            if text is None:
                continue
            loss = per_token_loss(logits.softmax(-1), q, tokens, method)
            if stale and method.clip is not None:
                loss = loss * gap.detach().exp().clamp(max=method.clip)
            if method.gate is not None:
                loss = loss * (method.gate * evidence).sigmoid()
            if row.engine_gap is not None:
                loss = loss * torch.tensor(row.engine_gap).double().exp().clamp(max=method.engine_clip)
            if method.pass_rate:
                loss = loss * undecided(row) / mean(map(undecided, row.batch))
            if method.confidence is not None:
                weights = (method.confidence * (q * q.log()).sum(-1)).exp()
                loss = loss * weights / weights[counts].mean()
            if method.fraction < 1.0:
                p = logits.detach().softmax(-1)
                found = -(p * p.log()).sum(-1)[counts], per_token_loss(p, q, tokens, method)[counts]
                keeps = torch.tensor(kept(*(values.tolist() for values in found), method.fraction))
                weights = torch.zeros_like(loss)
                weights[counts] = keeps.double() * len(keeps) / keeps.sum()
                loss = loss * weights
            if method.anchor:
                has_adapter = hasattr(self.student, "disable_adapter")
                with torch.no_grad(), self.student.disable_adapter() if has_adapter else nullcontext():
                    model = self.student if has_adapter else self.first
                    base = completion_logits(model, prompt, row, method).softmax(-1)
                loss = loss + method.anchor * divergence(logits.softmax(-1), base, 1.0)
            loss = loss[counts]
            losses.append(loss.mean()[None] if method.sequence_mean else loss)
        loss, count = torch.cat([torch.zeros(0), *losses]), sum(sum(row.counts) for row in rows)
        loss = loss.sum() / (count if method.batch_token_mean else max(len(loss), 1))
        if policy:
            share, other = (1.0, 1.0) if method.routed else (method.grpo, 1.0 - method.grpo)
            loss = other * loss + share * torch.cat(policy).sum() / count
        named = {name: p for name, p in self.student.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(loss, list(named.values()))
        return loss.item(), dict(zip(named, gradients, strict=True))


@dataclass(frozen=True)
class Difference:
    """Relative to the reference, the largest over all steps."""

    gradient: float
    loss: float


def compare(
    trainer: Any, blank: nn.Module, method: Method = DEFAULT, *, alter: Alteration | None = None
) -> Difference:
    """Train, then compute every step by the reference on `blank`, a model of the same shape."""
    recorder = Recorder(trainer, alter)
    trainer.train()
    reference = ReferenceStep(blank, method)
    generate_every = trainer.args.steps_per_generation * trainer.num_iterations
    stale = trainer.args.gradient_accumulation_steps % generate_every != 0
    teacher = recorder.steps[0].before
    reference.first.load_state_dict(teacher, strict=False)
    micro_batches = ticks = 0
    logged = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    gradient_error = loss_error = 0.0
    for number, step in enumerate(recorder.steps, start=1):
        assert all(row.prompt_ids == render(row.prompt, question_of(row.prompt), method) for row in step.rows)
        reference.student.load_state_dict(step.before, strict=False)
        reference.teacher.load_state_dict(teacher, strict=False)
        if method.grpo_final is not None:
            progress = (number - 1) / (len(recorder.steps) - 1)
            reference.method = replace(
                method, grpo=method.grpo + progress * (method.grpo_final - method.grpo)
            )
        loss, gradients = reference.step(step.rows, stale=stale)
        assert gradients.keys() == step.gradients.keys()
        # Relative to the norm of all: a parameter whose own gradient vanishes has no relative error.
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        gap = torch.stack([(g - step.gradients[name]).norm() for name, g in gradients.items()]).norm()
        gradient_error = max(gradient_error, (gap / norm.clamp(min=1e-30)).item())
        # A policy loss may vanish while its gradient does not.
        scale = max(abs(loss), 0.1) if method.grpo or method.routed else loss
        loss_error = max(loss_error, abs(logged[number] - loss) / scale if not method.sampled else 0.0)
        micro_batches += step.micro_batches
        due = number if method.tick_every_step else micro_batches // generate_every
        for _ in range(due - ticks):
            if method.teacher == "ema":
                past = 1 - method.rate
                if method.rate_samples is not None:
                    every_step = len(step.rows) / trainer.num_iterations
                    completions = every_step if method.tick_every_step else len(step.rows[-1].batch)
                    past **= completions / method.rate_samples
                teacher = {name: past * old + (1 - past) * step.after[name] for name, old in teacher.items()}
        ticks = due
    return Difference(gradient_error, loss_error)
