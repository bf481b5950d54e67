"""The loss of one micro-batch: the teacher's forward, the student's, and the divergence between them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

import sdpo

from ..config import SDPOConfig
from ..teacher import shards
from ..teacher.store import TeacherStore
from . import entropy, model_check
from . import forward as step_forward
from . import head as step_head
from . import loss as step_loss
from .batch import MicroBatch, TokenBatch, last_tokens, token_batch
from .metrics import Metrics
from .packing import Layout
from .policy import PolicyTerm
from .runner import Runner, make_runner, make_runners, padded_arguments

logger = logging.getLogger("sdpo_rl")

# Gives a model, wrapped and not, and tensors by parameter name or None.
Reference = Callable[[], AbstractContextManager[tuple[Any, Any, Mapping[str, Tensor] | None]]]


@dataclass(frozen=True)
class StepContext:
    """What the loss of a micro-batch depends on besides its inputs.

    Attributes:
        config: the run's configuration.
        accelerator: for its autocast and the number of processes.
        model: what runs, wrapped for several processes or not.
        unwrapped: the model inside `model`.
        teacher: gives the weights of the teacher forwards.
        temperature: of the rollout; divides the logits of both models.
        transform: what the model does to its logits after the head.
        router_loss_coef: weight of the load-balancing loss; `None` computes none.
        policy_term: GRPO's part of the loss; `None` without.
        distillation_weight: factor of the divergence.
        reference: makes the reference model current and gives it, wrapped and not, with the weights that replace
            its own, if there are any; `None`: none is needed.
        head_in_float32: GRPO's `cast_lm_head_to_fp32`: the products of the LM head are not autocast.
        embedding_noise: GRPO's `neftune_noise_alpha` adds noise to the embeddings, which depends on a call's width.
        reads_padding: rows of different lengths run apart (see `model_check`).
        layout: of the rows in a forward (see `choose_layout`).
        by_row: packed rows get `row_attention`, and read a prompt in common once.
        sequence_limit: tokens of a packed sequence that the model runs right (see `model_check`).
        observers: called with what the loss was computed from, without gradient, in the head's autocast.
    """

    config: SDPOConfig
    accelerator: Any
    model: nn.Module
    unwrapped: Any
    teacher: TeacherStore
    temperature: float
    transform: step_head.HeadTransform
    router_loss_coef: float | None
    policy_term: PolicyTerm | None
    distillation_weight: float
    reference: Reference | None
    head_in_float32: bool = False
    embedding_noise: bool = False
    reads_padding: bool = False
    layout: Layout = "padded"
    by_row: bool = False
    sequence_limit: float = math.inf
    observers: Sequence[Callable[[Observation], None]] = ()

    def head_autocast(self) -> AbstractContextManager[Any]:
        """Of the products of hidden states and LM head."""
        if self.head_in_float32:
            return torch.autocast(self.accelerator.device.type, enabled=False)
        autocast: AbstractContextManager[Any] = self.accelerator.autocast()
        return autocast

    @property
    def in_lockstep(self) -> bool:
        """Whether other processes need the forwards of this one, so that all must call the model equally often."""
        return self.accelerator.num_processes > 1 or shards.is_sharded(self.unwrapped)


class Observation(NamedTuple):
    """What the loss of a micro-batch was computed from."""

    batch: MicroBatch
    student: sdpo.LMHead | Tensor  # or logits [B, T, V]
    teachers: Sequence[sdpo.LMHead | Tensor]  # two of a trust region: its reference and the live model
    tokens: step_loss.TokenValues


class MicroBatchOutput(NamedTuple):
    """Sums, not means: add totals and counts over micro-batches and processes, then divide."""

    total: Tensor  # [] sum over the tokens with a loss, carries the gradient
    count: Tensor  # type: ignore[assignment]  # [] see `loss_count`; shadows tuple.count on purpose
    metrics: Metrics
    policy_total: Tensor | None = None  # [] GRPO's part of the total, detached


def micro_batch_loss(
    context: StepContext, batch: MicroBatch, count: Tensor, *, router_weight: Tensor, fused: bool
) -> MicroBatchOutput:
    """The divergence between student and teacher and GRPO's part, summed over the tokens that have a loss.

    Args:
        context: of the step.
        batch: the rows that run.
        count: what the loss is a mean of, [] (see `loss_count`), of all rows of the micro-batch.
        router_weight: [] factor of the load-balancing loss of a Mixture-of-Experts model, besides its coefficient.
        fused: compute the loss from hidden states and head (see `can_fuse`) instead of whole logits.

    Returns:
        total, count and metrics. The load-balancing loss is added to the total: times the count, and divided by the
        counts of a step, it is the mean over micro-batches, weighted by their counts.
    """
    config = context.config
    forward: Any = step_forward.completion_head if fused else step_forward.completion_logits
    forward = partial(forward, context.model, context.unwrapped)
    router_losses: list[Tensor] | None = None if context.router_loss_coef is None else []
    targets = step_loss.loss_targets(
        config, batch.completions, distillation_weight=context.distillation_weight
    )
    training = context.unwrapped.training
    run_student, run_teacher = make_runners(context, batch)
    # The teacher first: its weights replace the student's in the same model, which must not happen between the
    # student's forward and backward. In evaluation mode, because dropout would add noise to the target.
    teachers: list[Any] = []
    with torch.no_grad(), context.accelerator.autocast(), step_forward.evaluating(context.unwrapped):
        if run_teacher is not None:
            teachers = [
                run_teacher(partial(forward, params=params))
                for params in context.teacher.forwards(context.unwrapped, training=training)
            ]
            if batch.teacher_rows is not None:
                shape = (len(batch.student.sizes), batch.student.completion_length)
                teachers = [step_forward.among_rows(each, batch.teacher_rows, shape) for each in teachers]
    compute: Any = partial(step_loss.fused, transform=context.transform) if fused else step_loss.from_logits
    if context.reference is not None:
        compute = partial(
            compute, reference_logits=_reference_logits(context, context.reference, run_student)
        )
    if context.policy_term is not None and context.policy_term.entropy_fraction < 1.0:
        mask = partial(
            entropy.highest, fraction=context.policy_term.entropy_fraction, accelerator=context.accelerator
        )
        compute = partial(compute, entropy_mask=mask)
    with context.accelerator.autocast():
        student = run_student(partial(forward, router_losses=router_losses))
        if not teachers:  # no token has a divergence
            teachers = [student._replace(hidden=student.hidden.detach()) if fused else student.detach()]
    outputs: list[step_loss.StepLoss] = []

    def total_loss(student: Any) -> Tensor:
        output = compute(
            config, student, teachers, targets, temperature=context.temperature, term=context.policy_term
        )
        with torch.no_grad():
            for observe in context.observers:
                observe(Observation(batch, student, teachers, output.tokens))
        outputs.append(output)
        return output.total

    with context.head_autocast():
        total = _with_head(context, total_loss, student) if fused else total_loss(student)
    output = outputs[0]
    metrics = step_loss.step_metrics(config, output, targets)
    metrics |= _forward_metrics(total, run_student, run_teacher)
    if router_losses and context.router_loss_coef is not None:
        # A row that runs only for other processes adds no router loss: a single process would not run it.
        router_weight = router_weight * batch.has_loss
        router_total = run_student.mean(router_losses).to(total.device) * router_weight
        total = total + context.router_loss_coef * router_total
        metrics["aux_loss"] = router_total, router_weight
    return MicroBatchOutput(total, count, metrics, output.policy_total)


def _with_head(
    context: StepContext, compute: Callable[[sdpo.LMHead], Tensor], student: sdpo.LMHead
) -> Tensor:
    """`compute(student)` where the tensors of the model's head are: under ZeRO-3 within a call of the head."""
    head = context.unwrapped.get_output_embeddings()
    if not shards.is_partitioned(head):
        return compute(student)
    return step_head.call_with(head, lambda hidden: compute(student._replace(hidden=hidden)), student.hidden)


def _forward_metrics(total: Tensor, student: Runner, teacher: Runner | None) -> Metrics:
    """Calls of the model, and the share of padding in what they compute."""
    metrics = {}
    for name, run in (("student", student), ("teacher", teacher)):
        calls, *counts = (0, 0, 0) if run is None else (len(run.weights), run.padding, run.positions)
        # Filled on the device: a copy to it could wait for the forwards.
        padding, positions = (total.new_full((), count) for count in counts)
        metrics[f"self_distillation/{name}_padding_fraction"] = padding, positions
        metrics[f"self_distillation/{name}_forwards"] = total.new_full((), calls), total.new_ones(())
    return metrics


def _reference_logits(
    context: StepContext,
    reference: Reference,
    run_student: Runner,
) -> Tensor:
    """Logits [B, T, V] of the reference model on the student's tokens."""
    with (
        torch.no_grad(),
        context.accelerator.autocast(),
        reference() as (model, unwrapped, params),
        step_forward.evaluating(unwrapped),
    ):
        logits: Tensor = run_student(partial(step_forward.completion_logits, model, unwrapped, params=params))
    return logits


@torch.no_grad()
def sampled_log_probs(context: StepContext, tokens: TokenBatch, *, fused: bool) -> Tensor:
    """The student's log-probabilities [B, T] float32 of completion tokens, as the loss computes them.

    Args:
        context: of the step.
        tokens: the rows; T is their completion length.
        fused: compute them from hidden states and head (see `can_fuse`) instead of whole logits.
    """
    length = tokens.completion_length
    forward: Any = step_forward.completion_head if fused else step_forward.completion_logits
    with context.accelerator.autocast():
        student = make_runner(context, tokens)(partial(forward, context.model, context.unwrapped))
    sampled = tokens.ids[:, -length:]
    if not fused:
        every = (student.float() / context.temperature).log_softmax(dim=-1)
        return every.gather(-1, sampled[..., None]).squeeze(-1)
    log_probs = partial(
        sdpo.fused_log_probs,
        tokens=sampled,
        loss_mask=tokens.mask[:, -length:].bool(),
        temperature=context.temperature,
        softcap=context.transform.softcap,
        logit_scale=context.transform.logit_scale,
        chunk_size=context.config.loss_chunk_size,
    )
    with context.head_autocast():
        return _with_head(context, log_probs, student)


def completion_log_probs(
    check: Callable[[TokenBatch], tuple[StepContext, bool]],
    model: Any,
    unwrapped: Any,
    ids: Tensor,
    mask: Tensor,
    *,
    length: int,
    batch_size: int | None,
) -> Tensor:
    """A model's log-probabilities of completions, computed as in the loss: on-policy ratios are exactly 1.

    log_softmax(logits / temperature) at the sampled token.

    A prompt that does not fit in the model's `max_seq_length` with its completion loses its first tokens. Such a
    row has no loss, or its step refuses it.

    Args:
        check: the context of the student's forwards over a batch, and whether they are fused.
        model: what runs, the student or a reference model.
        unwrapped: the model inside `model`.
        ids: [B, P+T].
        mask: [B, P+T], 0 for padding.
        length: T.
        batch_size: rows of a forward; `None`: all.

    Returns:
        [B, T] nats, float32, without gradient; 0 in columns that are padding in every row of a forward.

    Raises:
        ValueError: padded rows that must run in one forward, on several processes, have more columns together than
            the model can process.
    """
    mask = last_tokens(mask, getattr(unwrapped, "max_seq_length", None))
    log_probs, size = [], batch_size or len(ids)
    for some_ids, some_mask in zip(ids.split(size), mask.split(size), strict=True):
        tokens = token_batch(some_ids, some_mask, length)
        context, fused = check(tokens)
        part = sampled_log_probs(replace(context, model=model, unwrapped=unwrapped), tokens, fused=fused)
        log_probs.append(pad(part, (0, length - part.shape[1])))
    return torch.cat(log_probs)


def can_fuse(context: StepContext, tokens: TokenBatch) -> bool:
    """Whether hidden states and head give the model's own logits, so that the fused loss applies; logs why not.

    Runs the model on the first row of `tokens`; all processes must call it.
    """
    if context.config.loss_backend == "logits":
        return False
    if needs := context.config.whole_logits_option:
        logger.warning(
            "%s is computed from whole logits, which stay in memory, not by the fused loss.", needs
        )
        return False
    head = context.unwrapped.get_output_embeddings()
    if context.config.loss_backend == "auto" and step_head.plain_head(head) is None:
        logger.warning(
            "The LM head is a %s, not a plain linear layer: it has an adapter or is quantized; falling back to "
            "loss_backend='logits', which keeps whole logits in memory.",
            step_head.class_name(head),
        )
        return False
    arguments = padded_arguments(context.unwrapped, tokens)
    with context.accelerator.autocast(), step_forward.evaluating(context.unwrapped):
        matches = step_head.transform_matches(context.unwrapped, arguments, context.transform)
    # Rounding may decide a close case, and under ZeRO-3 the fused loss calls the head once more; one way for all.
    flag = torch.tensor([int(matches)], device=tokens.ids.device)
    matches = bool(context.accelerator.gather(flag).min() > 0)
    if not matches:
        logger.warning(
            "The model changes its logits after the LM head in a way that its configuration does not declare; "
            "falling back to loss_backend='logits', which keeps whole logits in memory."
        )
    return matches


def reads_padding(context: StepContext, tokens: TokenBatch) -> bool:
    """Whether the rows of a batch change each other by their padding; see `model_check.reads_padding`.

    Runs the model on the first tokens of the first row; all processes must call it.
    """
    row = tokens.ids[0][tokens.mask[0].bool()]
    with context.accelerator.autocast(), step_forward.evaluating(context.unwrapped):
        return model_check.reads_padding(context.model, context.unwrapped, row)


def zero_loss(model: nn.Module) -> MicroBatchOutput:
    """The output of a micro-batch without loss tokens, without a forward: total 0, which sends gradients of 0.

    Trainable parameters without a gradient get a zero one, as after a forward with a loss of 0: other micro-batches
    or processes may have a loss, and gradients are reduced over processes parameter by parameter. Existing
    gradients stay.
    """
    total: Tensor = _Zero.apply(*(p for p in model.parameters() if p.requires_grad))
    return MicroBatchOutput(total, total.new_zeros(()), {})


class _Zero(torch.autograd.Function):
    """0, with a zero gradient for parameters that have none yet."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters
        return torch.zeros((), device=parameters[0].device)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return tuple(p.new_zeros(()).expand(p.shape) if p.grad is None else None for p in ctx.parameters)
