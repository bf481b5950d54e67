"""The teacher's prompts as tokens, each within a limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sdpo import Reprompts, Templates, build_reprompts

from .prompts import Prompt, Renderer, question, with_question

CUT_MARKER = " ... "
# What a tokenizer's decoder puts for bytes that are no character.
_REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class TeacherPrompts:
    """The teacher's prompts of B rows; a row without teacher signal has no ids and `row_mask` false.

    Args:
        ids: the tokens of each row.
        row_mask: a demonstration or feedback is in the prompt.
        has_demonstration: a demonstration is in the prompt.
        uses_feedback: feedback is in the prompt.
        truncated: a demonstration or the feedback was cut.
        dropped: the row had a demonstration or feedback, of which nothing fits.
    """

    ids: list[list[int]]
    row_mask: list[bool]
    has_demonstration: list[bool]
    uses_feedback: list[bool]
    truncated: list[bool]
    dropped: list[bool]


class _RowPrompt(NamedTuple):
    ids: list[int]
    has_demonstration: bool
    uses_feedback: bool


@dataclass
class Reprompter:
    """Question, demonstrations and feedback → the teacher's prompt, at most `limit` tokens long.

    What does not fit is cut out of the demonstrations and the feedback. The question, the earlier turns, the
    templates' own words and the generation prompt stay whole; a row in which these alone are too long is dropped.

    Args:
        renderer: tokenizes a prompt.
        templates: the words around question, demonstrations and feedback.
        feedback_only_without_solution: leave out the feedback of a row with a demonstration.
        truncation: the part of a text that is cut: "middle", "left" or "right"; "error" raises instead.
    """

    renderer: Renderer
    templates: Templates
    feedback_only_without_solution: bool
    truncation: str

    def __call__(
        self,
        prompts: Sequence[Prompt],
        demonstrations: Sequence[Sequence[str]],
        feedback: Sequence[str | None],
        limits: Sequence[int],
        succeeded: Sequence[bool] | None = None,
    ) -> TeacherPrompts:
        """The prompts of all rows; `limits` holds the largest number of tokens of each."""
        succeeded = [False] * len(prompts) if succeeded is None else succeeded
        built = self._build(prompts, demonstrations, feedback, succeeded)
        active = [row for row, has_signal in enumerate(built.row_mask) if has_signal]
        rendered = self.renderer([with_question(prompts[row], built.texts[row]) for row in active], active)
        no_signal = [False] * len(prompts)
        result = TeacherPrompts([[] for _ in prompts], *(no_signal.copy() for _ in range(5)))
        for row, ids in zip(active, rendered, strict=True):
            fitted: _RowPrompt | None = _RowPrompt(
                ids, built.has_demonstration[row], built.uses_feedback[row]
            )
            if len(ids) > limits[row]:
                used = feedback[row] if built.uses_feedback[row] else None
                fitted = self._fit(
                    row, prompts[row], demonstrations[row], used, succeeded[row], len(ids), limits[row]
                )
                result.truncated[row] = fitted is not None
            if fitted is None:
                result.dropped[row] = True
                continue
            result.row_mask[row] = True
            result.ids[row], result.has_demonstration[row], result.uses_feedback[row] = fitted
        return result

    def _build(
        self,
        prompts: Sequence[Prompt],
        demonstrations: Sequence[Sequence[str]],
        feedback: Sequence[str | None],
        succeeded: Sequence[bool],
    ) -> Reprompts:
        return build_reprompts(
            [question(prompt) for prompt in prompts],
            demonstrations,
            feedback,
            templates=self.templates,
            feedback_only_without_solution=self.feedback_only_without_solution,
            succeeded=succeeded,
        )

    def _fit(
        self,
        row: int,
        prompt: Prompt,
        demonstrations: Sequence[str],
        feedback: str | None,
        succeeded: bool,
        length: int,
        limit: int,
    ) -> _RowPrompt | None:
        """A prompt of at most `limit` tokens, from texts that are cut to equal shares; `None` if nothing fits."""
        if self.truncation == "error":
            raise ValueError(
                f"max_reprompt_length: expected room for a reprompt of {length} tokens, got {limit}; raise "
                "max_reprompt_length, or choose reprompt_truncation='middle'"
            )
        texts = [*demonstrations, *([feedback] if feedback is not None else [])]
        tokens = [self._encode(text) for text in texts]
        total = sum(map(len, tokens))
        budget = total - (length - limit)
        # Cutting and decoding can change the count by a few tokens, hence more than one try.
        while budget > 0:
            cut = [self._cut(text_ids, len(text_ids) * budget // total) for text_ids in tokens]
            cut_feedback = cut[len(demonstrations)] if feedback is not None else None
            built = self._build([prompt], [cut[: len(demonstrations)]], [cut_feedback], [succeeded])
            ids = self.renderer([with_question(prompt, built.texts[0])], [row])[0]
            if len(ids) <= limit:
                if not built.row_mask[0]:
                    return None
                return _RowPrompt(ids, built.has_demonstration[0], built.uses_feedback[0])
            budget -= max(len(ids) - limit, 1)
        return None

    def _encode(self, text: str) -> list[int]:
        return list(self.renderer.tokenizer(text=text, add_special_tokens=False)["input_ids"])

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self.renderer.tokenizer.decode(list(ids))
        return text

    def _cut(self, ids: list[int], limit: int) -> str:
        """The text of at most `limit` of the tokens and a marker; empty if there is room for the marker alone."""
        if len(ids) <= limit:
            return self._decode(ids)
        marker = self._encode(CUT_MARKER)
        remaining = limit - len(marker)
        if remaining <= 0:
            return ""
        tail_length = {"left": remaining, "middle": remaining // 2, "right": 0}[self.truncation]
        head, tail = ids[: remaining - tail_length], ids[len(ids) - tail_length :]
        # A character's bytes may be several tokens. No character has more than four.
        while head and self._decode(head[-4:]).endswith(_REPLACEMENT):
            head = head[:-1]
        while tail and self._decode(tail[:4]).startswith(_REPLACEMENT):
            tail = tail[1:]
        return self._decode([*head, *marker, *tail])
