"""Reprompts: which successful completion the teacher is shown, and the text around it.

Texts and indices only, no tokenizer and no model. A row is one completion; rows of one group id have the
same prompt. Source: SDPO, arXiv 2601.20802, section 3 (demonstrations) and section 4 (feedback).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from numbers import Real
from string import Formatter
from types import NoneType
from typing import Literal, NamedTuple, TypeGuard, TypeVar, get_args

from torch import Tensor

from sdpo._validate import check_choice, check_flag, check_int, check_real, type_name

Item = TypeVar("Item")
Policy = Literal["first", "random", "shortest", "longest", "best"]

_TEMPLATE_FIELDS = {
    "reprompt": ("prompt", "solution", "feedback"),
    "solution": ("successful_previous_attempt",),
    "feedback": ("feedback_raw",),
    "success_feedback": ("feedback_raw",),
}


class Reprompts(NamedTuple):
    """The teacher's prompts, one entry per row (B rows).

    Args:
        texts: the reprompt, or the prompt itself where the row has no teacher signal.
        row_mask: True if the row has a teacher signal, so that its text differs from its prompt.
        has_demonstration: True if the row has a non-blank demonstration.
        uses_feedback: True if the row has non-blank feedback that no demonstration suppresses.

    Source: SDPO, arXiv 2601.20802, sections 3 and 4.
    """

    texts: list[str]
    row_mask: list[bool]
    has_demonstration: list[bool]
    uses_feedback: list[bool]


@dataclass(frozen=True)
class Templates:
    """The frame of a reprompt: ``str.format`` templates, checked when they are made.

    A reprompt is ``reprompt`` filled with the prompt, one ``solution`` section per demonstration, and a
    feedback section or nothing: ``success_feedback`` for a row that succeeded, ``feedback`` for any other.
    Each template holds each of its own fields exactly once and nothing else in braces; a literal brace is
    doubled. The defaults are the strings of the published runs, but for ``success_feedback``: there the
    words for a failed attempt introduce all feedback.

    Args:
        reprompt: holds ``{prompt}``, ``{solution}`` and ``{feedback}``.
        solution: holds ``{successful_previous_attempt}``.
        feedback: holds ``{feedback_raw}``.
        success_feedback: holds ``{feedback_raw}``.

    Raises:
        TypeError: a template is not a string.
        ValueError: an unknown, missing, repeated or positional field, a conversion, a format spec, or an
            unpaired brace.

    Source: SDPO, arXiv 2601.20802, appendix, and its reference implementation.

    Examples:
        >>> Templates(solution="\\nA peer wrote:\\n{successful_previous_attempt}").feedback[:14]
        '\\nThe following'
        >>> Templates(feedback="{remark}")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: feedback: expected a template with {feedback_raw} exactly once each, got '{remark}': missing ...
    """

    reprompt: str = "{prompt}{solution}{feedback}\n\nCorrectly solve the original question."
    solution: str = "\nCorrect solution:\n\n{successful_previous_attempt}"
    feedback: str = "\nThe following is feedback from your unsuccessful earlier attempt:\n\n{feedback_raw}"
    success_feedback: str = (
        "\nThe following is feedback from your successful earlier attempt:\n\n{feedback_raw}"
    )

    def __post_init__(self) -> None:
        for name, fields in _TEMPLATE_FIELDS.items():
            _check_template(name, getattr(self, name), fields)


def select_demonstrations(
    rewards: Tensor | Sequence[float],
    group_ids: Tensor | Sequence[Hashable],
    *,
    success_threshold: float,
    exclude_self: bool,
    policy: Policy,
    seed: int,
    count: int = 1,
    eligible: Tensor | Sequence[bool] | None = None,
    lengths: Tensor | Sequence[float] | None = None,
) -> list[tuple[int, ...]]:
    """For every row, the indices of the successful peers that its teacher is shown.

    Candidates of row i: ``{j : group[j] = group[i], reward[j] >= success_threshold, eligible[j]}``, without i
    itself if exclude_self. Row i gets the first ``count`` of them (or all there are) in the order of policy:
    "first" by index; "shortest" and "longest" by lengths, then index; "best" by falling reward, then index;
    "random" by a hash of (seed, which rows of the group succeeded, i's position in the group, j's position),
    so that over seeds every ordered choice is equally likely. Pass a new seed per batch.

    Invariant exactly, for every policy: renaming the groups; adding, removing, moving or interleaving other
    groups (the indices follow their rows). Reordering rows *within* a group permutes the result exactly under
    "best", "shortest" and "longest" without ties, leaves its distribution over seeds unchanged under "random",
    and changes it under "first". No global random state is touched; processes that see the same batch decide alike.

    Args:
        rewards: [B] tensor, array or sequence of numbers; NaN could not be scored and is never a success.
        group_ids: [B] tensor, array or sequence: equal for completions of one prompt.
        success_threshold: a reward that reaches it is a success.
        exclude_self: hide a row's own success from it.
        policy: ``"first"``, ``"random"``, ``"shortest"``, ``"longest"`` or ``"best"``.
        seed: of ``"random"``; a new number per batch.
        count: largest number of demonstrations per row.
        eligible: [B] bools; a row with False is no demonstration although successful (its text may be empty
            without its thinking). None: all may be.
        lengths: [B] numbers, for ``"shortest"`` and ``"longest"``.

    Returns:
        B tuples of indices into the batch, each of at most ``count``.

    Raises:
        TypeError: an entry or option of another kind.
        ValueError: unequal numbers of rows, an unknown policy, count < 1, or no lengths where policy needs
            them.

    Source: SDPO, arXiv 2601.20802, section 3.

    Examples:
        >>> select_demonstrations([1.0, 0.0, 1.0, 0.0], ["a", "a", "a", "b"], success_threshold=1.0,
        ...                       exclude_self=True, policy="first", seed=0)
        [(2,), (0,), (0,), ()]
    """
    groups = _column("group_ids", group_ids, Hashable)
    rows = len(groups)
    scores = _column("rewards", rewards, Real, rows)
    usable = _column("eligible", [True] * rows if eligible is None else eligible, bool, rows)
    sizes = _column("lengths", [0] * rows if lengths is None else lengths, Real, rows)
    success_threshold = check_real(
        "success_threshold", success_threshold, low=-math.inf, high=math.inf, meaning="a reward"
    )
    check_flag("exclude_self", exclude_self, meaning="True to hide a row's own success from it")
    check_choice("policy", policy, get_args(Policy))
    check_int("seed", seed, low=0, high=2**64 - 1, meaning="a new number per batch")
    check_int("count", count, low=1, high=2**31 - 1, meaning="how many demonstrations a row may have")
    if policy in ("shortest", "longest") and (lengths is None or any(math.isnan(size) for size in sizes)):
        raise ValueError(
            f"lengths: expected a number for each row with policy={policy!r}, got {lengths}; count its tokens"
        )
    # 0.7 in float32 lies below the double 0.7; an array's comparison rounds the threshold to its dtype.
    successes = (
        (rewards >= success_threshold).tolist()
        if _is_array(rewards)
        else [bool(score >= success_threshold) for score in scores]
    )
    members: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)

    order: dict[str, Callable[[int], tuple[float, int]]] = {
        "first": lambda row: (0, row),
        "shortest": lambda row: (sizes[row], row),
        "longest": lambda row: (-sizes[row], row),
        "best": lambda row: (-scores[row], row),
    }
    chosen: list[tuple[int, ...]] = [()] * rows
    for group_rows in members.values():
        position = {row: index for index, row in enumerate(group_rows)}
        candidates = [row for row in group_rows if successes[row] and usable[row]]
        content = f"{seed}|{len(group_rows)}|{[position[row] for row in candidates]}"
        if policy != "random":
            candidates.sort(key=order[policy])
        for row in group_rows:
            pool = [peer for peer in candidates if not (exclude_self and peer == row)]
            if policy == "random":
                draws = {peer: _draw(f"{content}|{position[row]}|{position[peer]}") for peer in pool}
                pool.sort(key=draws.__getitem__)
            chosen[row] = tuple(pool[:count])
    return chosen


def distillation_mask(
    demonstrations: Sequence[Sequence[str]],
    feedback: Sequence[str | None],
    *,
    feedback_only_without_solution: bool,
) -> list[bool]:
    """Which rows carry teacher signal: a non-blank demonstration, or feedback that is used.

    Suppressing feedback beside a demonstration never empties a row, so the mask is the same for both values
    of ``feedback_only_without_solution``. Equals ``build_reprompts(...).row_mask``, without building a text.

    Args:
        demonstrations: B sequences of texts.
        feedback: B texts or None.
        feedback_only_without_solution: drop the feedback of rows that have a demonstration.

    Returns:
        B bools.

    Raises:
        TypeError, ValueError: as ``build_reprompts``.

    Source: SDPO, arXiv 2601.20802, sections 3 and 4.

    Examples:
        >>> distillation_mask([["two"], [], []], [None, "got 3", "  "], feedback_only_without_solution=True)
        [True, True, False]
    """
    signals = _signals(demonstrations, feedback, feedback_only_without_solution)
    return [bool(shown or used) for shown, used in signals]


def build_reprompts(
    prompts: Sequence[str],
    demonstrations: Sequence[Sequence[str]],
    feedback: Sequence[str | None],
    *,
    templates: Templates,
    feedback_only_without_solution: bool,
    succeeded: Sequence[bool] | None = None,
) -> Reprompts:
    """The teacher's prompts, and which rows have a teacher signal.

    Formula: ``text = reprompt(prompt, solution(d1) + solution(d2) + ..., feedback(f) if used)``, or the
    unchanged prompt where there is neither; ``success_feedback(f)`` for rows that succeeded. Blank
    demonstrations and blank feedback count as none. Feedback is used unless
    ``feedback_only_without_solution`` and the row has a demonstration. Inserted texts are never formatted
    again: braces in them survive. A text such as ``<|im_end|>`` in them survives too, and most tokenizers
    read it as a control token. row_mask is True exactly where the text is not the prompt.

    Args:
        prompts: B texts.
        demonstrations: B sequences of texts; as many sections as there are non-blank ones.
        feedback: B texts or None.
        templates: the frame of a reprompt.
        feedback_only_without_solution: drop the feedback of rows that have a demonstration.
        succeeded: B bools; the feedback of a row with True has the words for a success. None: no row has.

    Returns:
        Reprompts of B entries per field.

    Raises:
        TypeError: an entry of another kind.
        ValueError: unequal numbers of rows.

    Source: SDPO, arXiv 2601.20802, sections 3 and 4.

    Examples:
        >>> built = build_reprompts(["1 + 1?", "2 * 3?"], [["two"], []], ["got 3", None],
        ...                         templates=Templates(), feedback_only_without_solution=True)
        >>> built.texts
        ['1 + 1?\\nCorrect solution:\\n\\ntwo\\n\\nCorrectly solve the original question.', '2 * 3?']
        >>> built.row_mask, built.uses_feedback
        ([True, False], [False, False])
    """
    if not isinstance(templates, Templates):
        raise TypeError(f"templates: expected sdpo.Templates, got {type_name(templates)}; build one")
    signals = _signals(demonstrations, feedback, feedback_only_without_solution)
    row_mask = [bool(shown or used) for shown, used in signals]
    texts = _column("prompts", prompts, str, len(signals))
    successes = [False] * len(signals)
    if succeeded is not None:
        successes = _column("succeeded", succeeded, bool, len(signals))
    for row, (shown, used) in enumerate(signals):
        if row_mask[row]:
            solutions = (templates.solution.format(successful_previous_attempt=text) for text in shown)
            template = templates.success_feedback if successes[row] else templates.feedback
            texts[row] = templates.reprompt.format(
                prompt=texts[row],
                solution="".join(solutions),
                feedback=template.format(feedback_raw=used) if used else "",
            )
    return Reprompts(
        texts=texts,
        row_mask=row_mask,
        has_demonstration=[bool(shown) for shown, _ in signals],
        uses_feedback=[bool(used) for _, used in signals],
    )


def strip_thinking(text: str, *, opening: str = "<think>", closing: str = "</think>") -> str:
    """The text without its thinking: what lies inside ``<think>...</think>``, however the block is broken.

    Marks pair up like brackets, so nested blocks go as one, and of several blocks each goes. A block that is
    never closed goes to the end of the text; a stray closing mark (the completion began inside a block) takes
    everything before it. A text that had a mark loses its outer whitespace, one without comes back unchanged.
    Idempotent; no mark survives.

    Args:
        text: a completion.
        opening: the mark before a thought.
        closing: the mark after it.

    Returns:
        The text without thinking.

    Raises:
        TypeError: a text or mark that is not a string.
        ValueError: an empty mark, or two equal ones.

    Source: the reference implementation's ``remove_thinking_from_demonstration``, here for any text.

    Examples:
        >>> strip_thinking("<think>2, no, 3</think>\\n\\nThe answer is 3."), strip_thinking("hm</think> 3")
        ('The answer is 3.', '3')
        >>> strip_thinking("so <think>it never ends")
        'so'
        >>> strip_thinking("[THINK]2, no, 3[/THINK]3", opening="[THINK]", closing="[/THINK]")
        '3'
    """
    for name, value in (("text", text), ("opening", opening), ("closing", closing)):
        if not isinstance(value, str):
            raise TypeError(f"{name}: expected a string, got {type_name(value)}; pass text")
    if not opening or not closing or opening == closing:
        raise ValueError(
            f"opening, closing: expected two different marks, got {opening!r} and {closing!r}; pass those that "
            "the model writes around a thought"
        )
    # The longer first: one may begin with the other.
    marks = re.compile("|".join(sorted(map(re.escape, (opening, closing)), key=len, reverse=True)))
    # Cutting a block can join the pieces of another mark, hence until none is left.
    while marks.search(text):
        text = _strip_once(text, marks, opening)
    return text


def cut_middle(items: Sequence[Item], limit: int, *, marker: Sequence[Item]) -> list[Item]:
    """At most ``limit`` items: head + marker + tail, the middle cut out.

    ``len(result) = min(len(items), limit)``. Head and tail share what the marker leaves, the head takes an
    odd one; a marker that would leave room for nothing is left out. Items that fit come back unmarked.

    Args:
        items: a sequence, of token ids or characters, say.
        limit: largest number of items to return, at least 0.
        marker: items that stand for what was cut out.

    Returns:
        A list of min(len(items), limit) items.

    Raises:
        TypeError: limit is not an int.
        ValueError: limit is negative.

    Source: a choice of this library: the ends of a solution or an error message say most.

    Examples:
        >>> cut_middle([1, 2, 3, 4, 5, 6], 4, marker=[0])
        [1, 2, 0, 6]
        >>> "".join(cut_middle("long demonstration", 9, marker="..."))
        'lon...ion'
    """
    check_int("limit", limit, low=0, high=2**63 - 1, meaning="the number of items to keep")
    if len(items) <= limit:
        return list(items)
    gap = list(marker) if limit > len(marker) else []
    kept = limit - len(gap)
    tail = kept // 2
    return [*items[: kept - tail], *gap, *items[len(items) - tail :]]


def _draw(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=8).digest()


def _strip_once(text: str, marks: re.Pattern[str], opening: str) -> str:
    kept: list[str] = []
    depth = position = 0
    for mark in marks.finditer(text):
        if depth == 0:
            kept.append(text[position : mark.start()])
        position = mark.end()
        if mark.group() == opening:
            depth += 1
        elif depth:
            depth -= 1
        else:
            kept.clear()
    if depth == 0:
        kept.append(text[position:])
    return "".join(kept).strip()


def _signals(
    demonstrations: Sequence[Sequence[str]],
    feedback: Sequence[str | None],
    feedback_only_without_solution: bool,
) -> list[tuple[list[str], str]]:
    """Per row its non-blank demonstrations, and the feedback that is used ("" for none)."""
    check_flag(
        "feedback_only_without_solution",
        feedback_only_without_solution,
        meaning="True to drop the feedback of rows that have a demonstration",
    )
    remarks = _column("feedback", feedback, (str, NoneType))
    signals = []
    for row, texts in enumerate(_column("demonstrations", demonstrations, Sequence, len(remarks))):
        shown = [text for text in _column(f"demonstrations[{row}]", texts, str) if text.strip()]
        remark = remarks[row] or ""
        suppressed = not remark.strip() or (feedback_only_without_solution and shown)
        signals.append((shown, "" if suppressed else remark))
    return signals


def _is_array(values: object) -> TypeGuard[Tensor]:
    """Whether ``values`` is a tensor, or an array of numpy's kind, which the core must not import."""
    return hasattr(values, "ndim") and hasattr(values, "tolist")


def _column(name: str, values: object, kind: type | tuple[type, ...], rows: int | None = None) -> list:
    """``values`` as a new list of ``rows`` entries of one kind; an array [B] becomes Python scalars."""
    if isinstance(values, str) or not (_is_array(values) or isinstance(values, Sequence)):
        raise TypeError(f"{name}: expected a sequence, got {type_name(values)}; wrap it in a list")
    if _is_array(values) and values.ndim != 1:
        raise ValueError(f"{name}: expected shape [B], got {tuple(values.shape)}; flatten it")
    column = values.tolist() if _is_array(values) else list(values)
    if rows is not None and len(column) != rows:
        raise ValueError(
            f"{name}: expected {rows} entries, one per row, got {len(column)}; pass all arguments for the same rows"
        )
    for row, value in enumerate(column):
        # A tensor hashes by identity: as a group id it would silently make every row its own group.
        if isinstance(value, Tensor) or not isinstance(value, kind):
            kinds = " or ".join(
                "number" if k is Real else k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,))
            )
            raise TypeError(f"{name}[{row}]: expected {kinds}, got {type_name(value)}; convert the entry")
    return column


def _check_template(name: str, template: str, fields: tuple[str, ...]) -> None:
    expected = ", ".join(f"{{{field}}}" for field in fields)
    if not isinstance(template, str):
        raise TypeError(
            f"{name}: expected a template string with {expected}, got {type_name(template)}; pass text"
        )
    problem = f"{name}: expected a template with {expected} exactly once each, got {template!r}: "
    fix = "write literal braces as {{ and }}"
    try:
        parts = [part for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ValueError(f"{problem}{error}; {fix}") from error
    plain = [field or "" for _, field, spec, conversion in parts if not spec and not conversion]
    if len(plain) != len(parts):
        raise ValueError(
            f"{problem}a field takes no conversion (!) and no format spec (:); remove it, or {fix}"
        )
    if sorted(plain) != sorted(fields):
        missing, unknown = sorted(set(fields) - set(plain)), sorted(set(plain) - set(fields))
        repeated = sorted({field for field in fields if plain.count(field) > 1})
        raise ValueError(f"{problem}missing {missing}, unknown {unknown}, repeated {repeated}; {fix}")
