"""Log-probability of right answers with and without the feedback in the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from ..generation_batch import GenerationRow
from .forwards import BothModels, rows_of
from .tokens import evenly

Source = Literal["answer_column", "successes of the group", "successful retries"]
# Right answers that are compared on each process.
_PAIRS = 64
Ids = list[int]


class Answer(NamedTuple):
    """A right completion: its tokens, and 0 for those from a tool."""

    ids: Ids
    sampled: Ids


class Pair(NamedTuple):
    """A right answer beside the prompts of a row with a signal, all as tokens."""

    prompt: Ids
    teacher_prompt: Ids
    answer: Answer

    @property
    def is_shown(self) -> bool:
        """Whether the teacher's prompt has the answer in it, as the same tokens but for the last, which ends it."""
        answer, prompt = self.answer.ids[:-1], self.teacher_prompt
        return bool(answer) and any(
            prompt[start : start + len(answer)] == answer for start in range(len(prompt) - len(answer) + 1)
        )


class AnswerSums(NamedTuple):
    """Sums over pairs of one process."""

    pairs: int
    tokens: int
    gain: float  # log p(answer | teacher's prompt) − log p(answer | prompt), nats
    student: float  # log p(answer | prompt), nats
    shown: int


def pairs_with_peers(
    rows: Sequence[GenerationRow], successes: Sequence[Answer | None], *, group_size: int
) -> list[Pair]:
    """For each row with a signal another row's success of its group, where there is one.

    A success that the teacher's prompt does not show comes before one that it shows.

    Args:
        rows: of this process.
        successes: of the rows of all processes, the completion if it is a success; otherwise `None`.
        group_size: completions of one prompt.
    """
    found = []
    for row in rows:
        if row.reason_without_signal is not None:
            continue
        start = row.row // group_size * group_size
        pairs = [
            Pair(row.prompt_ids, row.teacher_prompt_ids, answer)
            for place in range(start, start + group_size)
            if place != row.row and (answer := successes[place])
        ]
        if pairs:
            found.append(min(pairs, key=lambda pair: pair.is_shown))
    return found


def compare(models: BothModels, pairs: Sequence[Pair], *, rows: int, pad_id: int) -> AnswerSums:
    """Both log-probabilities of at most 64 pairs, evenly chosen.

    Args:
        models: runs the forwards.
        pairs: on this process.
        rows: of a forward.
        pad_id: token id of the padding.
    """
    pairs = [pairs[i] for i in evenly(len(pairs), _PAIRS)]
    tokens, gain, student = 0, 0.0, 0.0
    for start in range(0, len(pairs), rows):
        part = pairs[start : start + rows]
        ids, device = [pair.answer.ids for pair in part], models.context.accelerator.device
        bare = rows_of([pair.prompt for pair in part], ids, pad_id=pad_id, device=device)
        shown = rows_of([pair.teacher_prompt for pair in part], ids, pad_id=pad_id, device=device)
        before = models.log_probs("student", bare).double().cpu()
        after = models.log_probs("teacher", shown).double().cpu()
        for row, pair in enumerate(part):
            counts = torch.tensor(pair.answer.sampled, dtype=torch.bool)
            width = len(counts)
            student += float(before[row, :width][counts].sum())
            gain += float((after - before)[row, :width][counts].sum())
            tokens += int(counts.sum())
    return AnswerSums(len(pairs), tokens, gain, student, sum(pair.is_shown for pair in pairs))
