"""What the teacher reads in a run, before it trains: a few rows of its first generation batch, as tokens decode."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate.utils import gather_object

from .generation_batch import GenerationRow, check_trainer, generation_batch
from .token_text import TokenText, block, printable, token_text
from .warnings import different_endings


@dataclass(frozen=True)
class PreviewRow(GenerationRow):
    """One completion of a generation batch, and its tokens decoded with special tokens.

    Attributes:
        student_prompt: what the student reads.
        sampled: what it wrote, tool results included.
        teacher_prompt: what the teacher reads before the same completion; empty without a signal.
    """

    student_prompt: TokenText
    sampled: TokenText
    teacher_prompt: TokenText


@dataclass(frozen=True, repr=False)
class Preview:
    """Rows of a generation batch that show what the teacher reads; printed, a text that any terminal can show.

    Attributes:
        rows: the chosen rows, in their order in the batch.
        batch_size: rows of the generation batch, over all processes.
        group_size: completions of one prompt.
        with_signal: how many rows of the batch have a distillation loss.
        max_completion_length: largest number of tokens of a completion.
        different_endings: what to change where the teacher's prompts end otherwise than the student's; `None`: they
            end alike.
    """

    rows: list[PreviewRow]
    batch_size: int
    group_size: int
    with_signal: int
    max_completion_length: int
    different_endings: str | None

    def __str__(self) -> str:
        return "\n".join(self._lines())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def _lines(self) -> Iterator[str]:
        prompts = self.batch_size // self.group_size
        yield (
            f"{len(self.rows)} of {self.batch_size} rows of a generation batch ({prompts} prompts, "
            f"{self.group_size} completions of each); {self.with_signal} of {self.batch_size} have a signal from "
            "the teacher. Nothing was trained."
        )
        if self.different_endings is not None:
            yield self.different_endings
        texts = [text for row in self.rows for text in (row.student_prompt, row.sampled, row.teacher_prompt)]
        if any(text.plain for text in texts):
            yield "\\ before a control string: it is plain text there, not a control token."
        if any(text.cuts for text in texts):
            yield "« ... »: here a demonstration or the feedback was cut to fit."
        for row in self.rows:
            yield ""
            yield from _row_lines(row, self.group_size, self.max_completion_length)


def preview(trainer: Any, n: int) -> Preview:
    """See `SDPOTrainer.preview`."""
    check_rows(trainer, n)
    batch = generation_batch(trainer)
    rows = gather_object(batch.rows) if trainer.accelerator.num_processes > 1 else batch.rows
    return Preview(
        [_decoded(trainer, row) for row in chosen_rows(rows, n)],
        batch_size=len(rows),
        group_size=batch.group_size,
        with_signal=sum(row.reason_without_signal is None for row in rows),
        max_completion_length=trainer.max_completion_length,
        different_endings=different_endings(
            [row.prompt for row in rows], trainer._renderer, trainer.sdpo_config
        ),
    )


def check_rows(trainer: Any, n: int) -> None:
    """The trainer can make a generation batch, and it has at least `n` rows.

    Args:
        trainer: an `SDPOTrainer`.
        n: wanted rows.

    Raises:
        TypeError: `n` is no integer.
        ValueError: `n` is not in [1, rows of a generation batch], or the trainer cannot make one.
    """
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"n: expected an integer, got {n!r}; pass the number of rows to show")
    check_trainer(trainer)
    size = trainer.args.generation_batch_size
    if not 1 <= n <= size:
        raise ValueError(
            f"n: expected 1 to {size} rows, of which a generation batch has {size}, got {n}; pass another number, "
            "or enlarge the generation batch"
        )


def chosen_rows(rows: Sequence[GenerationRow], n: int) -> list[GenerationRow]:
    """`n` rows of as many kinds as possible, first one with a signal and one without; in their order.

    A kind is what the teacher's prompt has, or why there is none.

    Args:
        rows: of a generation batch.
        n: at most their number.
    """
    kinds: dict[Any, list[GenerationRow]] = {}
    for row in rows:
        kind = (row.has_demonstration, row.uses_feedback, row.is_cut, row.reason_without_signal)
        kinds.setdefault(kind, []).append(row)
    signals = [each for kind, each in kinds.items() if kind[-1] is None]
    others = [each for kind, each in kinds.items() if kind[-1] is not None]
    # The second or later row of a kind comes after the first of every kind.
    order = [*signals[:1], *others[:1], *signals[1:], *others[1:]]
    ranked = sorted(((turn, place) for place, each in enumerate(order) for turn in range(len(each))))
    return sorted((order[place][turn] for turn, place in ranked[:n]), key=lambda row: row.row)


def _decoded(trainer: Any, row: GenerationRow) -> PreviewRow:
    values = {item.name: getattr(row, item.name) for item in dataclasses.fields(GenerationRow)}
    control = trainer._control.strings

    def decode(ids: Sequence[int], **cut: Any) -> TokenText:
        return token_text(trainer.processing_class, ids, control, **cut)

    whole_texts = [*row.demonstrations, *([] if row.feedback is None else [row.feedback])]
    return PreviewRow(
        **values,
        student_prompt=decode(row.prompt_ids),
        sampled=decode(row.completion_ids),
        teacher_prompt=decode(row.teacher_prompt_ids, whole_texts=whole_texts, cut_texts=row.cut_texts),
    )


def _row_lines(row: PreviewRow, group_size: int, max_completion_length: int) -> Iterator[str]:
    yield f"--- row {row.row}, prompt {row.row // group_size}: {_judgement(row)}, {_signal(row)}"
    yield f"student's prompt: {_tokens(row.prompt_ids)}"
    yield from block(str(row.student_prompt))
    at_limit = ", the limit" if len(row.completion_ids) >= max_completion_length else ""
    yield f"completion: {_tokens(row.completion_ids)} of at most {max_completion_length}{at_limit}"
    yield from block(str(row.sampled))
    rewards = [f"{printable(name)} {value:g}" for name, value in row.rewards.items()]
    yield f"rewards: {', '.join(rewards) or 'none'}"
    if row.feedback is None:
        yield "feedback: none"
    else:
        yield f"feedback{_unused(row.uses_feedback)}"
        yield from block(printable(row.feedback))
    if not row.demonstrations:
        yield "demonstration: none"
    for place, text in zip(row.demonstration_rows, row.demonstrations, strict=True):
        yield f"demonstration, the completion of row {place}{_unused(row.has_demonstration)}"
        yield from block(printable(text))
    if row.reason_without_signal is not None:
        yield f"no signal: {row.reason_without_signal}"
    if row.teacher_prompt_ids:
        cut = f", cut from {row.whole_length}" if row.is_cut else ""
        yield (
            f"teacher's prompt: {_tokens(row.teacher_prompt_ids)} of at most {row.teacher_prompt_limit}{cut}; the "
            "same completion follows"
        )
        yield from block(str(row.teacher_prompt))


def _judgement(row: GenerationRow) -> str:
    if math.isnan(row.score):
        return "not judged"
    return f"score {row.score:g} ({'a success' if row.succeeded else 'no success'})"


def _signal(row: GenerationRow) -> str:
    if row.reason_without_signal is not None:
        return "no signal"
    parts = [f"row {place}" for place in row.demonstration_rows if row.has_demonstration]
    parts += ["the feedback"] if row.uses_feedback else []
    return f"the teacher reads {' and '.join(parts) or 'a prompt of its own'}"


def _unused(used: bool) -> str:
    return "" if used else " (not in the teacher's prompt)"


def _tokens(ids: Sequence[int]) -> str:
    return f"{len(ids)} token{'' if len(ids) == 1 else 's'}"
