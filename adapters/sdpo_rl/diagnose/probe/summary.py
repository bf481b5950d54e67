"""From what each process measured to the numbers of a probe."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from accelerate.utils import gather_object

from ...config import SDPOConfig
from ..settings import PUBLISHED_RATE, fast_teacher, rate_of_published_samples
from .answers import AnswerSums, Source
from .cost import cost
from .measure import Measured, Row
from .result import (
    Agreement,
    Effect,
    Lengths,
    ProbeResult,
    RightAnswers,
    Signal,
    Success,
    TeacherRate,
)
from .tokens import Sums, add, alphas
from .verdict import verdict

# What differs from prompt to prompt in the reason why a row has no signal.
_BEST_SCORE = re.compile(r" \(best score [^)]*\)")


def summarize(trainer: Any, measured: Sequence[Measured], *, answer_column: str | None) -> ProbeResult:
    """The result over all processes; all must call it.

    Args:
        trainer: an `SDPOTrainer`.
        measured: one entry for each generation batch.
        answer_column: the column of right answers, or `None`.
    """
    gather = gather_object if trainer.accelerator.num_processes > 1 else list
    config = trainer.sdpo_config
    batches = [gather(batch.rows) for batch in measured]
    rows = [row for batch in batches for row in batch]
    sums = add(gather([batch.tokens for batch in measured]))
    answers = _total(gather([batch.answers for batch in measured]))
    retries = _total(gather([batch.retries for batch in measured]))
    source: Source = "successes of the group" if answer_column is None else "answer_column"
    fractions = [batch.answer_in_feedback for batch in measured if batch.answer_in_feedback is not None]
    samples_per_tick = trainer._schedule.samples_per_tick(config.teacher_tick)
    found: dict[str, Any] = {
        "alpha": config.alpha,
        "k": config.k if config.uses_topk else None,
        "success": success(batches, measured[0].group_size, measured[0].no_retry),
        "signal": Signal(
            share=_mean([row.without_signal is None for row in rows]),
            without=_without(rows),
            answer_in_feedback=_mean(fractions) if fractions else None,
        ),
        "right_answers": right_answers(answers, source) or right_answers(retries, "successful retries"),
        "agreement": agreement(sums, config),
        "lengths": _lengths(rows, trainer.args.max_completion_length),
        "teacher_rate": TeacherRate(
            rate_of_published_samples(config, samples_per_tick=samples_per_tick),
            PUBLISHED_RATE,
            fast_teacher(config, samples_per_tick=samples_per_tick) or "",
        ),
    }
    return ProbeResult(
        rows=len(rows),
        batches=len(measured),
        **found,
        cost=cost(
            trainer,
            # The least: the first batch also waits for what is loaded and compiled once.
            generation_seconds=min(batch.generation_seconds for batch in measured),
            student_seconds=min(batch.student_seconds for batch in measured),
            teacher_seconds=min(batch.teacher_seconds for batch in measured),
            generation_peak=_largest([batch.generation_peak for batch in measured]),
            forward_peak=_largest([batch.forward_peak for batch in measured]),
        ),
        verdict=verdict(**found),
    )


def success(batches: Sequence[Sequence[Row]], group_size: int, no_retry: str) -> Success:
    """Rates of success; the standard error counts prompts, because the rows of a prompt are alike.

    With d_g the difference of the rates of prompt g and w_g its rows with a signal, d their weighted mean over G
    prompts, its standard error is √(G/(G−1) · Σ (w_g (d_g − d))²) / Σ w_g; with one prompt, that of two
    proportions.

    Args:
        batches: rows of all processes, one list for each generation batch.
        group_size: completions of one prompt.
        no_retry: why there are no retries.
    """
    judgements = [row.succeeded for batch in batches for row in batch]
    bare = None if judgements.count(None) == len(judgements) else _mean(list(map(bool, judgements)))
    groups = [
        batch[start : start + group_size] for batch in batches for start in range(0, len(batch), group_size)
    ]
    rates = [
        (
            _mean([bool(row.succeeded) for row in group]),
            [row.retry_succeeded for row in group if row.retry_succeeded is not None],
        )
        for group in groups
    ]
    rates = [(rate, retries) for rate, retries in rates if retries]
    if not rates:
        return Success(bare, None, None, None, 0, no_retry)
    count = sum(len(retries) for _, retries in rates)
    same = sum(rate * len(retries) for rate, retries in rates) / count
    again = sum(sum(retries) for _, retries in rates) / count
    if len(rates) == 1:
        error = math.sqrt(again * (1 - again) / count + same * (1 - same) / group_size)
    else:
        deviations = [(_mean(retries) - rate - (again - same)) * len(retries) for rate, retries in rates]
        error = math.sqrt(len(rates) / (len(rates) - 1) * sum(d * d for d in deviations)) / count
    return Success(bare, same, again, error, count, "")


def right_answers(sums: AnswerSums, source: Source) -> RightAnswers | None:
    """Means of the sums; `None` without a pair."""
    if not sums.pairs or not sums.tokens:
        return None
    return RightAnswers(
        source=source,
        count=sums.pairs,
        gain_per_token=sums.gain / sums.tokens,
        gain_per_sequence=sums.gain / sums.pairs,
        bare_per_sequence=sums.student / sums.pairs,
        shown=sums.shown / sums.pairs,
    )


def agreement(sums: Sums, config: SDPOConfig) -> Agreement | None:
    """Means of the sums; `None` without a token."""
    count = sums.get("tokens", 0.0)
    if not count:
        return None
    disagree, gap = sums["disagreements"], sums["gap"]
    return Agreement(
        tokens=int(count),
        divergence=sums["divergence"] / count,
        argmax=sums["agreement"] / count,
        student_entropy=sums["student_entropy"] / count,
        teacher_entropy=sums["teacher_entropy"] / count,
        student_topk_mass=sums["student_topk_mass"] / count,
        teacher_topk_mass=sums["teacher_topk_mass"] / count,
        student_favourite=math.exp(sums["student_log_favourite"] / disagree) if disagree else None,
        teacher_favourite=math.exp(sums["teacher_log_favourite"] / disagree) if disagree else None,
        effects=[
            Effect(
                alpha,
                gradient_norm=sums[f"norm {alpha:g}"] / count,
                push=sums[f"push {alpha:g}"] / disagree if disagree else None,
                hardly_moved=sums[f"hardly_moved {alpha:g}"] / gap if gap else None,
            )
            for alpha in alphas(config)
        ],
    )


def _without(rows: Sequence[Row]) -> dict[str, float]:
    reasons = [row.without_signal for row in rows if row.without_signal is not None]
    counts = Counter(_BEST_SCORE.sub("", reason) for reason in reasons)
    return {reason: number / len(rows) for reason, number in counts.most_common()}


def _lengths(rows: Sequence[Row], completion_limit: int) -> Lengths:
    prompts = [row.teacher_prompt for row in rows if row.teacher_prompt is not None]
    return Lengths(
        completion=_mean([row.length for row in rows]),
        completion_limit=completion_limit,
        at_limit=_mean([row.at_limit for row in rows]),
        teacher_prompt=_mean(prompts) if prompts else None,
        teacher_prompt_limit=min(row.teacher_prompt_limit for row in rows),
        truncated=_mean([row.truncated for row in rows]),
    )


def _total(parts: Sequence[AnswerSums]) -> AnswerSums:
    return AnswerSums(*(sum(values) for values in zip(*parts, strict=True)))


def _largest(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return max(known) if known else None


def _mean(values: Sequence[float | bool]) -> float:
    return sum(map(float, values)) / len(values)
