"""What one generation batch shows, on this process: its rows, both models at its tokens, retries, right answers."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ...step.batch import select_rows
from ..generation_batch import GenerationBatch, scored_batch
from . import retry
from .answers import Answer, AnswerSums, Pair, compare, pairs_with_peers
from .cost import peak, reset_peak
from .forwards import BothModels, chunk_tokens, wait
from .tokens import Sums, add, evenly, token_sums

# Tokens of a generation batch whose logits are compared on each process.
_TOKENS = 4096


class Row(NamedTuple):
    """One completion."""

    succeeded: bool | None  # `None`: not judged
    without_signal: str | None  # why
    retry_succeeded: bool | None  # `None`: no retry
    length: int
    at_limit: bool
    teacher_prompt: int | None  # tokens
    teacher_prompt_limit: int
    truncated: bool


class Measured(NamedTuple):
    """One generation batch on this process."""

    rows: list[Row]
    group_size: int
    tokens: Sums
    answers: AnswerSums  # of `answer_column`, or successes of the groups
    retries: AnswerSums  # successful retries
    no_retry: str  # why; empty: there were retries
    answer_in_feedback: float | None  # over all processes
    generation_seconds: float
    student_seconds: float
    teacher_seconds: float
    generation_peak: int | None
    forward_peak: int | None


def measure(trainer: Any, inputs: list[dict[str, Any]], *, answer_column: str | None) -> Measured:
    """Generate a batch for these rows of the dataset, and what the probe needs of it.

    Args:
        trainer: an `SDPOTrainer`, its model in training mode.
        inputs: this process's rows of one generation batch.
        answer_column: the column with a right completion; `None` without.
    """
    device = trainer.accelerator.device
    reset_peak(device)
    start = time.perf_counter()
    batch = scored_batch(trainer, copy.deepcopy(inputs))
    wait(device)
    seconds, generation_peak = time.perf_counter() - start, peak(device)
    models = _both_models(trainer, batch.inputs)
    reset_peak(device)
    tokens = _tokens(models, trainer, batch.inputs)
    forward_peak, clocks = peak(device), dict(models.seconds)
    second, no_retry = _retry(trainer, inputs, batch)
    return Measured(
        rows=_rows(trainer, batch, second),
        group_size=batch.group_size,
        tokens=tokens,
        answers=_compare(models, trainer, _right_answers(trainer, inputs, batch, answer_column)),
        retries=_compare(models, trainer, _successful_retries(batch, second)),
        no_retry=no_retry,
        answer_in_feedback=batch.metrics.get("self_distillation/answer_in_feedback_fraction"),
        generation_seconds=seconds,
        student_seconds=clocks["student"],
        teacher_seconds=clocks["teacher"],
        generation_peak=generation_peak,
        forward_peak=forward_peak,
    )


def _both_models(trainer: Any, inputs: Mapping[str, Any]) -> BothModels:
    """Forwards by the layout of the run; on several processes without exchange, whatever rows each of them has."""
    micro_batch = select_rows(inputs, at_least_one=True)
    assert micro_batch is not None
    context, fused = trainer._check_model(trainer._step_context(trainer.model), micro_batch.student)
    if trainer.accelerator.num_processes > 1:
        context = replace(context, model=context.unwrapped, layout="padded")
    return BothModels(context, fused)


def _tokens(models: BothModels, trainer: Any, inputs: Mapping[str, Any]) -> Sums:
    """Sums over tokens with a loss, at most 4096 of the batch, evenly chosen in each micro-batch."""
    size, count = trainer.args.per_device_train_batch_size, len(inputs["completion_ids"])
    starts = range(0, count, size)
    parts = []
    for start in starts:
        part = {name: _slice(value, start, size, count) for name, value in inputs.items()}
        batch = select_rows(part, at_least_one=False)
        if batch is None or batch.teacher is None:
            continue
        student, teacher = models.outputs("student", batch.student), models.outputs("teacher", batch.teacher)
        index = batch.completions["loss_mask"].flatten().nonzero().squeeze(-1)
        chosen = evenly(len(index), max(1, _TOKENS // len(starts)))
        index = index[torch.tensor(chosen, device=index.device)]
        sampled = batch.completions["completion_ids"].flatten()
        for some in index.split(chunk_tokens(models.context.unwrapped)):
            logits = models.logits(student, some), models.logits(teacher, some)
            config, temperature = trainer.sdpo_config, models.context.temperature
            parts.append(token_sums(*logits, sampled[some], config, temperature=temperature))
    return add(parts)


def _slice(value: Any, start: int, size: int, count: int) -> Any:
    if isinstance(value, Tensor) and value.dim() and len(value) == count:
        return value[start : start + size]
    return value


def _retry(
    trainer: Any, inputs: list[dict[str, Any]], batch: GenerationBatch
) -> tuple[GenerationBatch | None, str]:
    """A completion for each row from its teacher's prompt, or why there is none."""
    if batch.metrics["self_distillation/reprompt_sample_fraction"] == 0.0:
        return None, "no row has a signal"
    if "self_distillation/best_score" not in batch.metrics:
        return None, "no reward function judged a completion"
    prompts = [row.teacher_prompt_ids or row.prompt_ids for row in batch.rows]
    if reason := retry.why_not(trainer, prompts):
        return None, reason
    with retry.prompts_replaced(trainer, prompts) as used:
        second = scored_batch(trainer, copy.deepcopy(inputs))
    return (second, "") if used else (None, "this GRPOTrainer writes its prompts in another way")


def _rows(trainer: Any, batch: GenerationBatch, second: GenerationBatch | None) -> list[Row]:
    limit, ends = trainer.args.max_completion_length, {*trainer.eos_token_ids, trainer._pad_id}
    again = [None] * len(batch.rows) if second is None else [row.succeeded for row in second.rows]
    return [
        Row(
            succeeded=None if math.isnan(row.score) else row.succeeded,
            without_signal=row.reason_without_signal,
            retry_succeeded=retried if row.reason_without_signal is None else None,
            length=len(row.completion_ids),
            at_limit=len(row.completion_ids) >= limit and row.completion_ids[-1] not in ends,
            teacher_prompt=len(row.teacher_prompt_ids) or None,
            teacher_prompt_limit=row.teacher_prompt_limit,
            truncated=row.is_cut,
        )
        for row, retried in zip(batch.rows, again, strict=True)
    ]


def _right_answers(
    trainer: Any, inputs: list[dict[str, Any]], batch: GenerationBatch, answer_column: str | None
) -> list[Pair]:
    """For each row with a signal a right answer that is not its own: of the column, or another success's."""
    if answer_column is None:
        gather = gather_object if trainer.accelerator.num_processes > 1 else list
        successes = [
            answer if row.succeeded else None
            for row, answer in zip(batch.rows, _completions(batch), strict=True)
        ]
        return pairs_with_peers(batch.rows, gather(successes), group_size=batch.group_size)
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    pairs = []
    for row, columns in zip(batch.rows, inputs, strict=True):
        if row.reason_without_signal is None:
            ids = tokenizer(columns[answer_column], add_special_tokens=False)["input_ids"]
            answer = Answer([*ids, tokenizer.eos_token_id], [1] * (len(ids) + 1))
            pairs.append(Pair(row.prompt_ids, row.teacher_prompt_ids, answer))
    return pairs


def _successful_retries(batch: GenerationBatch, second: GenerationBatch | None) -> list[Pair]:
    if second is None:
        return []
    return [
        Pair(row.prompt_ids, row.teacher_prompt_ids, answer)
        for row, retried, answer in zip(batch.rows, second.rows, _completions(second), strict=True)
        if retried.succeeded and row.reason_without_signal is None
    ]


def _completions(batch: GenerationBatch) -> list[Answer]:
    tools = batch.inputs.get("tool_mask")
    found = []
    for place, row in enumerate(batch.rows):
        length = len(row.completion_ids)
        sampled = [1] * length if tools is None else tools[place, :length].tolist()
        found.append(Answer(row.completion_ids, sampled))
    return found


def _compare(models: BothModels, trainer: Any, pairs: Sequence[Pair]) -> AnswerSums:
    rows = trainer.args.per_device_train_batch_size
    return compare(models, pairs, rows=rows, pad_id=trainer._pad_id)
