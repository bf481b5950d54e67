"""The teacher's prompts as tokens, each within a limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from sdpo import Reprompts, Templates, build_reprompts

from ..config import SDPOConfig
from .control import ControlStrings, enclose
from .cuts import CuttableText
from .prompts import Prompt, Renderer, question, with_question
from .rendered import RenderedPrompts


@dataclass(frozen=True)
class TeacherPrompts:
    """The teacher's prompts of B rows; a row without teacher signal has no ids and `row_mask` false.

    Args:
        ids: the tokens of each row.
        row_mask: the row has a teacher signal.
        has_demonstration: a demonstration is in the prompt.
        uses_feedback: feedback is in the prompt.
        truncated: a demonstration or the feedback was cut.
        dropped: the row had a demonstration or feedback, of which nothing fits, or a prompt that is too long.
        limits: the largest number of tokens of each row.
        whole_lengths: tokens of each row before any cut; 0 without a prompt.
        cut_texts: of a row that was cut, its demonstrations and feedback as they stand in it; otherwise none.
        written: `teacher_prompt_func` wrote the prompts.
    """

    ids: list[list[int]]
    row_mask: list[bool]
    has_demonstration: list[bool]
    uses_feedback: list[bool]
    truncated: list[bool]
    dropped: list[bool]
    limits: list[int]
    whole_lengths: list[int]
    cut_texts: list[list[str]]
    written: bool = False

    @classmethod
    def without_signal(cls, limits: Sequence[int], *, written: bool = False) -> TeacherPrompts:
        """Rows of which none has a signal, to be filled in."""
        rows = len(limits)
        return cls(
            ids=[[] for _ in range(rows)],
            row_mask=[False] * rows,
            has_demonstration=[False] * rows,
            uses_feedback=[False] * rows,
            truncated=[False] * rows,
            dropped=[False] * rows,
            limits=list(limits),
            whole_lengths=[0] * rows,
            cut_texts=[[] for _ in range(rows)],
            written=written,
        )


class _RowPrompt(NamedTuple):
    ids: list[int]
    has_demonstration: bool
    uses_feedback: bool
    cut_texts: list[str]


@dataclass
class Reprompter:
    """Question, demonstrations and feedback → the teacher's prompt, at most `limit` tokens long.

    What does not fit is cut out of the demonstrations and the feedback. The question, the other turns, the
    templates' own words and the generation prompt stay whole; a row in which these alone are too long is dropped.

    Args:
        renderer: tokenizes a prompt.
        templates: the words around question, demonstrations and feedback.
        feedback_only_without_solution: leave out the feedback of a row with a demonstration.
        truncation: the part of a text that is cut: "middle", "left" or "right"; "error" raises instead.
        rendered: how prompts end that were rendered to strings before; `None`: every string is plain text.
    """

    renderer: Renderer
    templates: Templates
    feedback_only_without_solution: bool
    truncation: str
    rendered: RenderedPrompts | None = None

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
        rendered = self.renderer([self._reprompt(prompts[row], built.texts[row]) for row in active], active)
        result = TeacherPrompts.without_signal(limits)
        for row, ids in zip(active, rendered, strict=True):
            fitted: _RowPrompt | None = _RowPrompt(
                ids, built.has_demonstration[row], built.uses_feedback[row], []
            )
            result.whole_lengths[row] = len(ids)
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
            result.ids[row], result.has_demonstration[row] = fitted.ids, fitted.has_demonstration
            result.uses_feedback[row], result.cut_texts[row] = fitted.uses_feedback, fitted.cut_texts
        return result

    def _build(
        self,
        prompts: Sequence[Prompt],
        demonstrations: Sequence[Sequence[str]],
        feedback: Sequence[str | None],
        succeeded: Sequence[bool],
    ) -> Reprompts:
        control = self.renderer.control
        if control is not None:
            demonstrations = [[_enclosed(text) for text in texts] for texts in demonstrations]
            feedback = [text if text is None else _enclosed(text) for text in feedback]
        built = build_reprompts(
            [self._split(prompt)[0] for prompt in prompts],
            demonstrations,
            feedback,
            templates=self.templates,
            feedback_only_without_solution=self.feedback_only_without_solution,
            succeeded=succeeded,
        )
        if control is None:
            return built
        return built._replace(texts=[control.break_inserted(text) for text in built.texts])

    def _split(self, prompt: Prompt) -> tuple[str, str]:
        """The question, and what a chat template wrote after it into a prompt that was rendered before."""
        if self.rendered is not None and isinstance(prompt, str):
            return self.rendered.split(prompt)
        return question(prompt), ""

    def _reprompt(self, prompt: Prompt, text: str) -> Prompt:
        return with_question(prompt, text + self._split(prompt)[1])

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
        texts = [
            CuttableText(text, self.renderer)
            for text in [*demonstrations, *([feedback] if feedback is not None else [])]
        ]
        total = sum(text.count for text in texts)
        budget = total - (length - limit)
        # A cut can change the number of tokens around it, hence more than one try.
        while budget > 0:
            cut = [text.cut(text.count * budget // total, self.truncation) for text in texts]
            cut_feedback = cut[len(demonstrations)] if feedback is not None else None
            built = self._build([prompt], [cut[: len(demonstrations)]], [cut_feedback], [succeeded])
            ids = self.renderer([self._reprompt(prompt, built.texts[0])], [row])[0]
            if len(ids) <= limit:
                if not built.row_mask[0]:
                    return None
                return _RowPrompt(ids, built.has_demonstration[0], built.uses_feedback[0], cut)
            budget -= max(len(ids) - limit, 1)
        return None


def make_reprompter(
    config: SDPOConfig,
    renderer: Renderer,
    control: ControlStrings,
    rendered: RenderedPrompts | None,
    *,
    row_tools: Sequence[Sequence[Any]] | None,
) -> Reprompter:
    """The reprompter of a generation batch.

    Args:
        config: of the run.
        renderer: of the student's prompts.
        control: the tokenizer's control strings.
        rendered: as for `Reprompter`.
        row_tools: as for `Renderer`.
    """
    teacher_renderer = replace(
        renderer,
        row_tools=row_tools,
        template_kwargs={**renderer.template_kwargs, **config.template_kwargs},
        control=None if config.allow_control_tokens else control,
    )
    return Reprompter(
        teacher_renderer,
        config.templates(),
        config.environment_feedback_only_without_solution,
        config.reprompt_truncation,
        rendered,
    )


def _enclosed(text: str) -> str:
    """A blank text stays blank: it is not inserted."""
    return enclose(text) if text.strip() else text
