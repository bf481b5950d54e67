"""The rules that turn the numbers of a probe into a verdict: one function each, with a threshold and a reason."""

from __future__ import annotations

from ...rollout.reasons import OF_FUNCTION
from ..monitors import agreement as agreement_monitor
from ..monitors import answer_in_feedback as answer_in_feedback_monitor
from ..warnings import low_mass, truncated_reprompts
from .result import Agreement, Lengths, Remark, RightAnswers, Signal, Success, TeacherRate, Verdict

STOPS, SLOWS, DELAYS, RISK = "stops", "slows", "delays", "risk"
LEARNS, LEARNS_SLOWLY = "learns", "learns slowly"
DOES_NOT_LEARN, NOT_KNOWN = "does not learn", "not known"

# A rate of success from which on there is nothing to learn.
SOLVED = 0.95
# Standard errors by which the retry must exceed the bare rate: less is chance in one probe of forty.
CERTAIN = 2.0
# Share of rows with a signal below which most of what is generated teaches nothing.
FEW_ROWS = 0.5
# Part of the gap between teacher and student that the run's α hardly moves.
MOSTLY_UNMOVED = 0.5
# Share of completions at the length limit from which on most of them cannot succeed.
MANY_CUT = 0.5

SUMMARIES = {
    LEARNS: "learns likely: the model succeeds more often with the feedback than without.",
    LEARNS_SLOWLY: "learns slowly: there is something to learn, but see what holds it back.",
    DOES_NOT_LEARN: "do not train yet: with these settings the model does not learn from itself.",
    NOT_KNOWN: "not known: the probe could not compare the model with and without the feedback.",
}
# Added to the summary of a run that learns.
AT_RISK = " Mind the risk below."


def verdict(
    *,
    alpha: float,
    k: int | None,
    success: Success,
    signal: Signal,
    right_answers: RightAnswers | None,
    agreement: Agreement | None,
    lengths: Lengths,
    teacher_rate: TeacherRate,
) -> Verdict:
    """All rules, and the outlook by the most severe remark.

    Args:
        alpha: of the run.
        k: of the run's top-K support; `None` for another support.
        success: rates of success.
        signal: rows with a signal.
        right_answers: gain in log-probability, or `None`.
        agreement: of teacher and student, or `None`.
        lengths: against limits.
        teacher_rate: against the paper's.
    """
    remarks = [
        *_some(no_signal(signal, success), few_rows(signal, success)),
        *_some(solved(success), no_better(success, right_answers)),
        *_some(answer_in_feedback(signal), cut_completions(lengths), cut_prompts(lengths)),
        *_some(fast_teacher(teacher_rate)),
    ]
    if agreement is not None:
        remarks += _some(no_divergence(agreement), unmoved(agreement, alpha), outside(agreement, k))
    if any(remark.weight == STOPS for remark in remarks):  # then there is no start to delay
        remarks = [remark for remark in remarks if remark.weight != DELAYS]
    order = [STOPS, SLOWS, DELAYS, RISK]
    remarks.sort(key=lambda remark: order.index(remark.weight))
    weights = {remark.weight for remark in remarks}
    if STOPS in weights:
        outlook = DOES_NOT_LEARN
    elif success.retry is None:
        outlook = NOT_KNOWN
    else:
        outlook = LEARNS_SLOWLY if SLOWS in weights else LEARNS
    at_risk = RISK in weights and outlook in (LEARNS, LEARNS_SLOWLY)
    return Verdict(outlook, SUMMARIES[outlook] + (AT_RISK if at_risk else ""), remarks)


def _some(*remarks: Remark | None) -> list[Remark]:
    return [remark for remark in remarks if remark is not None]


def no_signal(signal: Signal, success: Success) -> Remark | None:
    """Without a demonstration or feedback in any row there is no teacher, so no loss."""
    if signal.share > 0.0:
        return None
    causes = "; ".join(f"{share:.0%}: {reason}" for reason, share in signal.without.items())
    fix = (
        "Return feedback from a reward function, or make successes possible: a lower success_reward_threshold, "
        "more num_generations, easier prompts."
    )
    return Remark("no_signal", STOPS, f"No row has a signal ({causes}). {_fix(fix, signal, success)}")


def few_rows(signal: Signal, success: Success) -> Remark | None:
    """Rows without a signal are generated for nothing, and the loss is a mean over the few others."""
    if signal.share == 0.0 or signal.share >= FEW_ROWS:
        return None
    reason = max(signal.without, key=lambda name: signal.without[name])
    fix = _fix("Return feedback from a reward function, or raise num_generations.", signal, success)
    text = f"Only {signal.share:.0%} of the rows have a signal. Why most others have none: {reason}. {fix}"
    return Remark("few_rows", SLOWS, text)


def _fix(fix: str, signal: Signal, success: Success) -> str:
    """A remedy for rows without a signal: `fix`, unless a function writes the prompts, or nothing was judged."""
    if any(reason.startswith(OF_FUNCTION) for reason in signal.without):
        return "Return a prompt of at most max_reprompt_length tokens for more rows."
    if success.bare is not None:
        return fix
    return "Give each row a text in the dataset's column 'feedback', or pass reward functions."


def solved(success: Success) -> Remark | None:
    """A student that succeeds nearly always has nothing to learn, and its successes pull it to a peer's wording."""
    if success.bare is None or success.bare < SOLVED:
        return None
    text = f"{success.bare:.0%} of the completions succeed already: nothing is left to learn. Take harder prompts."
    return Remark("solved", STOPS, text)


def no_better(success: Success, right_answers: RightAnswers | None) -> Remark | None:
    """What the model cannot do with the feedback in its prompt, it cannot learn from itself to do without it.

    Rates of success decide, not the log-probability of right answers: feedback on another question also makes the
    form of an answer likelier, and teaches nothing.
    """
    if success.retry is None or success.same_prompts is None or success.error is None:
        return None
    if success.retry - success.same_prompts > CERTAIN * success.error:
        return None
    gain = ""
    if right_answers is not None:
        gain = f" Right answers gain {right_answers.gain_per_token:+.2f} nats per token."
    if success.retry == 0.0:
        found = (
            f"With the feedback or demonstration in its prompt the model does not succeed once in "
            f"{success.retried} retries: the teacher does not know better than the student."
        )
    else:
        found = (
            f"The teacher is no better than the student: {success.retry:.0%} of the retries succeed, "
            f"{success.same_prompts:.0%} of the completions without the feedback (standard error "
            f"{success.error:.0%})."
        )
    text = (
        f"{found}{gain} Do not train: make the feedback say what to do about this completion, take a larger model "
        "or easier prompts; or probe more batches."
    )
    return Remark("no_better", STOPS, text)


def no_divergence(agreement: Agreement) -> Remark | None:
    """The loss is the divergence: where there is none, there is no gradient. The monitor of a run has the limit."""
    message = agreement_monitor(agreement.divergence)
    return None if message is None else Remark("no_divergence", STOPS, message)


def unmoved(agreement: Agreement, alpha: float) -> Remark | None:
    """At p=1e-5 and q=0.1 the gradient on the right token is q − p for α=0 and thousandths of that for α=0.5 and 1.

    A run with such an α starts late, because the tokens must become likelier first; then it learns as well, so the
    outlook stays. Where p is larger, α=0.5 may be the better choice.
    """
    by_alpha = {effect.alpha: effect for effect in agreement.effects}
    own, forward = by_alpha[alpha].hardly_moved, by_alpha[0.0].hardly_moved
    if alpha == 0.0 or own is None or forward is None or own < MOSTLY_UNMOVED or forward > own / 2:
        return None
    text = (
        "The tokens that the teacher prefers are so unlikely under the student "
        f"(p={agreement.student_favourite:.1g} where they disagree) that alpha={alpha:g} hardly moves {own:.0%} of "
        f"the difference: the run starts late. Take alpha=0, which leaves {forward:.0%}."
    )
    return Remark("unmoved", DELAYS, text)


def outside(agreement: Agreement, k: int | None) -> Remark | None:
    """What the student's top-K misses, the loss cannot tell apart. The warning of a run has the limit."""
    message = None if k is None else low_mass(agreement.student_topk_mass, k)
    return None if message is None else Remark("outside", SLOWS, message)


def answer_in_feedback(signal: Signal) -> Remark | None:
    """A teacher that reads the answer copies it. The monitor of a run has the limit."""
    fraction = signal.answer_in_feedback
    message = None if fraction is None else answer_in_feedback_monitor(fraction)
    return None if message is None else Remark("answer_in_feedback", RISK, message)


def cut_completions(lengths: Lengths) -> Remark | None:
    """A completion that is cut has no end, so it rarely succeeds and is no demonstration to copy."""
    if lengths.at_limit < MANY_CUT:
        return None
    text = (
        f"{lengths.at_limit:.0%} of the completions are cut at max_completion_length={lengths.completion_limit}: "
        "raise it, or ask for shorter answers in the prompt."
    )
    return Remark("cut_completions", SLOWS, text)


def cut_prompts(lengths: Lengths) -> Remark | None:
    """The teacher reads only what is left of the feedback. The warning of a run has the limit."""
    message = truncated_reprompts(lengths.truncated)
    return None if message is None else Remark("cut_prompts", SLOWS, message)


def fast_teacher(rate: TeacherRate) -> Remark | None:
    """A teacher that follows its student fast amplifies its errors; the run may collapse after a good start."""
    return Remark("fast_teacher", RISK, rate.warning) if rate.warning else None
