"""The numbers of a probe, and how they print."""

from __future__ import annotations

import dataclasses
import textwrap
from dataclasses import dataclass
from typing import Any

from .answers import Source
from .cost import Cost

_WIDTH = 96


@dataclass(frozen=True)
class Success:
    """Rates of success, over the rows of all processes.

    Attributes:
        bare: share of the completions that succeed; `None`: no reward function judged one.
        same_prompts: the same for the prompts of the rows with a signal: the mean over these rows of the rate of
            their group.
        retry: share of the rows with a signal whose second completion, sampled from the teacher's prompt, succeeds;
            `None`: not measured, or no row has a signal.
        error: standard error of `retry − same_prompts`; `None` without `retry`.
        retried: rows of `retry`.
        not_measured: why there is no `retry`; empty where there is.
    """

    bare: float | None
    same_prompts: float | None
    retry: float | None
    error: float | None
    retried: int
    not_measured: str


@dataclass(frozen=True)
class Signal:
    """Rows with a teacher signal.

    Attributes:
        share: of all rows.
        without: share of all rows by the reason why they have none.
        answer_in_feedback: share of the failed rows with feedback whose feedback has a right completion of their
            prompt in it; `None` where it is unknown: no such row, or no right completion.
    """

    share: float
    without: dict[str, float]
    answer_in_feedback: float | None


@dataclass(frozen=True)
class RightAnswers:
    """Log-probability of right answers, in nats, under the teacher's prompt and under the bare one.

    Attributes:
        source: where the answers come from.
        count: answers that were compared.
        gain_per_token: mean over the tokens of log p(token | teacher's prompt) − log p(token | prompt).
        gain_per_sequence: mean over the answers of the same, summed over their tokens.
        bare_per_sequence: mean over the answers of log p(answer | prompt).
        shown: share of the answers that the teacher's prompt contains.
    """

    source: Source
    count: int
    gain_per_token: float
    gain_per_sequence: float
    bare_per_sequence: float
    shown: float


@dataclass(frozen=True)
class Effect:
    """What the gradient of the divergence with one α does, per token with a loss.

    Attributes:
        alpha: 0 is KL(teacher‖student), 1 KL(student‖teacher), the generalized JSD between them.
        gradient_norm: mean norm of ∂loss/∂logits.
        push: where the models disagree, mean of what is moved towards the teacher's most likely token; with α=0 it
            is q − p.
        hardly_moved: share of Σ (q − p) at tokens where this α has less than 0.003 of the gradient c·(q − p)
            that it has near agreement.
    """

    alpha: float
    gradient_norm: float
    push: float | None
    hardly_moved: float | None


@dataclass(frozen=True)
class Agreement:
    """Teacher and student on the tokens with a loss.

    Attributes:
        tokens: that were measured, evenly chosen where a batch has more than 4096.
        divergence: of the run's α and support, nats per token.
        argmax: share of the tokens where both have the same most likely token.
        student_entropy: nats per token.
        teacher_entropy: nats per token.
        student_topk_mass: probability of the support under the student; 1 for the full vocabulary.
        teacher_topk_mass: probability of the support under the teacher.
        student_favourite: where they disagree, the student's probability of the teacher's most likely token,
            geometric mean.
        teacher_favourite: the teacher's probability of it, geometric mean.
        effects: the gradients, one for each α.
    """

    tokens: int
    divergence: float
    argmax: float
    student_entropy: float
    teacher_entropy: float
    student_topk_mass: float
    teacher_topk_mass: float
    student_favourite: float | None
    teacher_favourite: float | None
    effects: list[Effect]


@dataclass(frozen=True)
class Lengths:
    """Tokens against limits.

    Attributes:
        completion: mean tokens of a completion.
        completion_limit: `max_completion_length`.
        at_limit: share of the completions that it cuts.
        teacher_prompt: mean tokens of the teacher's prompts; `None` without any.
        teacher_prompt_limit: `max_reprompt_length`, or what the model's context leaves beside the longest
            completion, if that is less.
        truncated: share of the rows whose demonstration or feedback is cut.
    """

    completion: float
    completion_limit: int
    at_limit: float
    teacher_prompt: float | None
    teacher_prompt_limit: int
    truncated: float


@dataclass(frozen=True)
class TeacherRate:
    """How fast the teacher follows the student.

    Attributes:
        per_256_samples: the weight of the student after 256 completions; `None` for a teacher without a rate.
        published: the paper's.
        warning: what to change; empty where there is nothing.
    """

    per_256_samples: float | None
    published: float
    warning: str


@dataclass(frozen=True)
class Remark:
    """One finding of the verdict.

    Attributes:
        rule: the name of the rule.
        weight: "stops" learning, "slows" it, "delays" its start, or "risk" of a later failure.
        text: what was found, and the settings to change.
    """

    rule: str
    weight: str
    text: str


@dataclass(frozen=True)
class Verdict:
    """What the numbers say about training.

    Attributes:
        outlook: "learns", "learns slowly", "does not learn" or "not known".
        summary: the outlook as a sentence.
        remarks: the findings, the most severe first.
    """

    outlook: str
    summary: str
    remarks: list[Remark]


@dataclass(frozen=True)
class ProbeResult:
    """What `probe` found; `print` shows it as text, `to_dict` is for JSON.

    Attributes:
        rows: completions of all processes and generation batches.
        batches: generation batches.
        alpha: of the run.
        k: of the run's top-K support; `None` for another support.
        success: rates of success without and with the feedback.
        signal: rows with a signal.
        right_answers: gain in log-probability; `None`: no right answer is known.
        agreement: of teacher and student; `None`: no row has a signal.
        lengths: against limits.
        teacher_rate: against the paper's.
        cost: of a step.
        verdict: in words.
    """

    rows: int
    batches: int
    alpha: float
    k: int | None
    success: Success
    signal: Signal
    right_answers: RightAnswers | None
    agreement: Agreement | None
    lengths: Lengths
    teacher_rate: TeacherRate
    cost: Cost
    verdict: Verdict

    def to_dict(self) -> dict[str, Any]:
        """The numbers and the verdict in JSON's types."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return "\n".join([*_verdict(self.verdict), "", *_numbers(self)])


def _verdict(verdict: Verdict) -> list[str]:
    lines = [f"VERDICT: {verdict.summary}"]
    for remark in verdict.remarks:
        lines += textwrap.wrap(
            f"{remark.weight}: {remark.text}", _WIDTH, initial_indent="  - ", subsequent_indent="    "
        )
    return lines


def _numbers(result: ProbeResult) -> list[str]:
    success, signal, lengths = result.success, result.signal, result.lengths
    lines = [
        _line("completions", f"{result.rows}, in {_count(result.batches, 'generation batch', 'es')}"),
        _line("success, bare", _percent(success.bare)),
        _line("success, retry", _retry(success)),
        _line("rows with a signal", _percent(signal.share)),
        *(_line("", f"{_percent(share)}: {reason}") for reason, share in signal.without.items()),
        _line("answer in feedback", _percent(signal.answer_in_feedback)),
        _line("right answers", _right_answers(result.right_answers)),
        *_agreement(result),
        _line(
            "completion tokens",
            f"{lengths.completion:.1f} of {lengths.completion_limit}; {_percent(lengths.at_limit)} are cut",
        ),
        _line("teacher's prompts", _teacher_prompts(lengths)),
        _line("teacher's rate", _teacher_rate(result.teacher_rate)),
        *_cost(result.cost),
    ]
    return lines


def _line(name: str, text: str) -> str:
    return f"{name:22}{text}"


def _retry(success: Success) -> str:
    if success.retry is None or success.same_prompts is None or success.error is None:
        return f"not measured: {success.not_measured}"
    return (
        f"{_percent(success.retry)} of {success.retried} rows with a signal, {_percent(success.same_prompts)} bare "
        f"(standard error of the difference {_percent(success.error)})"
    )


def _right_answers(answers: RightAnswers | None) -> str:
    if answers is None:
        return "none is known; name a column of right completions as answer_column"
    return (
        f"{answers.gain_per_token:+.2f} nats per token, {answers.gain_per_sequence:+.2f} per answer (from "
        f"{answers.bare_per_sequence:.2f}), {answers.count} {answers.source}, {_percent(answers.shown)} shown"
    )


def _agreement(result: ProbeResult) -> list[str]:
    found = result.agreement
    if found is None:
        return []
    support = "" if result.k is None else f", top {result.k}"
    lines = [
        _line(
            "teacher and student",
            f"divergence {found.divergence:.3g} nats per token, same most likely token at {_percent(found.argmax)}",
        ),
        _line("entropy", f"student {found.student_entropy:.2f}, teacher {found.teacher_entropy:.2f} nats"),
        _line(
            f"mass{support}",
            f"student {_percent(found.student_topk_mass)}, teacher {_percent(found.teacher_topk_mass)}",
        ),
    ]
    if found.student_favourite is not None and found.teacher_favourite is not None:
        lines.append(
            _line(
                "where they disagree",
                f"the teacher's most likely token has p={found.student_favourite:.2g}, "
                f"q={found.teacher_favourite:.2g}",
            )
        )
    for effect in found.effects:
        here = " (this run)" if effect.alpha == result.alpha else ""
        text = f"gradient {effect.gradient_norm:.3g} per token"
        if effect.push is not None and effect.hardly_moved is not None:
            text += f", moves that token by {effect.push:+.3g}"
            text += f", hardly moves {_percent(effect.hardly_moved)} of q − p"
        lines.append(_line(f"α={effect.alpha:g}", text + here))
    return lines


def _teacher_prompts(lengths: Lengths) -> str:
    if lengths.teacher_prompt is None:
        return "none"
    return (
        f"{lengths.teacher_prompt:.1f} of {lengths.teacher_prompt_limit} tokens; "
        f"of {_percent(lengths.truncated)} of the rows the demonstration or feedback is cut"
    )


def _teacher_rate(rate: TeacherRate) -> str:
    if rate.per_256_samples is None:
        return "the teacher is no moving average"
    return f"{rate.per_256_samples:.2g} per 256 completions; the paper's is {rate.published:g}"


def stored(weights: int, gradients: int, optimizer: int | None, teacher: int) -> str:
    """The sizes of what training stores besides activations, from bytes."""
    state = "not known" if optimizer is None else _gib(optimizer)
    return f"weights {_gib(weights)}, gradients {_gib(gradients)}, optimizer {state}, teacher {_gib(teacher)}"


def _cost(cost: Cost) -> list[str]:
    lines = [
        _line(
            "seconds",
            f"generation {cost.generation_seconds:.2f}, forwards of student {cost.student_seconds:.2f} and teacher "
            f"{cost.teacher_seconds:.2f}; about {cost.step_seconds:.2f} per generation batch",
        ),
        _line(
            "memory",
            stored(cost.weight_bytes, cost.gradient_bytes, cost.optimizer_bytes, cost.teacher_bytes),
        ),
    ]
    if cost.generation_peak_bytes is None or cost.forward_peak_bytes is None:
        return [*lines, _line("", "activations: not known on a CPU")]
    peaks = f"generation {_gib(cost.generation_peak_bytes)}, forwards {_gib(cost.forward_peak_bytes)}"
    return [*lines, _line("", f"GPU at most: {peaks}; activations for the backward not included")]


def _percent(share: float | None) -> str:
    return "not known" if share is None else f"{100 * share:.3g} %"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"


def _count(number: int, name: str, plural: str) -> str:
    return f"{number} {name}{plural if number != 1 else ''}"
