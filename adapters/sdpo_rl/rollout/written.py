"""The teacher's prompts as a function of the user writes them, one row at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from .control import ControlStrings, enclose
from .feedback import check_encodable
from .prompts import Completion, Prompt, check_turns, texts_of, with_texts
from .rendered import RenderedPrompts
from .reprompts import Reprompter, TeacherPrompts

if TYPE_CHECKING:
    from .demonstrations import Rollout

# The name of a dataset's column that holds prompts of the teacher.
TEACHER_PROMPT_COLUMN = "teacher_prompt"


@dataclass(frozen=True)
class Attempt:
    """One completion of a generation batch, from which `teacher_prompt_func` writes the teacher's prompt.

    In `completion`, `demonstrations` and `feedback` a control string such as `<|im_end|>` has an invisible
    character after its first one. It keeps the string text in the teacher's prompt, and is itself in no token. With
    `SDPOConfig(allow_control_tokens=True)` these texts are as they came. All values are copies, which the function
    may change.

    Args:
        prompt: the student's, a string or messages.
        completion: a string or messages, as reward functions get it.
        demonstrations: the texts of successful peers that the row was given, at most `num_demonstrations`.
        feedback: the row's feedback, the texts of several sources joined; `None` without, and with
            `include_environment_feedback=False`.
        succeeded: the score reaches `success_reward_threshold`.
        columns: the row of the dataset without `prompt`, with what a `rollout_func` adds to it.

    Source: a choice of this library.

    Examples:
        >>> def with_hint(attempt):
        ...     return None if attempt.succeeded else f"{attempt.columns['hint']} {attempt.prompt}"
        >>> with_hint(Attempt("3 - 1 =", " 4", [], None, succeeded=False, columns={"hint": "Subtract."}))
        'Subtract. 3 - 1 ='
    """

    prompt: Prompt
    completion: Completion
    demonstrations: list[str]
    feedback: str | None
    succeeded: bool
    columns: dict[str, Any]


TeacherPromptFunc = Callable[[Attempt], Prompt | None]


def written_prompts(
    function: TeacherPromptFunc,
    reprompter: Reprompter,
    rollout: Rollout,
    *,
    demonstrations: Sequence[Sequence[str]],
    feedback: Sequence[str | None],
    limits: Sequence[int],
    succeeded: Sequence[bool],
    has_loss: Sequence[bool],
) -> TeacherPrompts:
    """The teacher's prompts of a generation batch by a function, as a `Reprompter` returns them.

    A prompt that is too long is dropped. A demonstration or the feedback counts as shown where its whole text is in
    the prompt, and more often than in the student's.

    Args:
        function: returns a prompt, or `None` for a row without a teacher signal.
        reprompter: of the batch; it tokenizes the prompts, and raises where one is too long if its truncation is
            "error".
        rollout: the batch, with the columns of its rows.
        demonstrations: texts for each row.
        feedback: a text for each row, or `None`.
        limits: the largest number of tokens of each prompt.
        succeeded: whether the row is a success.
        has_loss: False for a completion that can have no loss, for which the function is not called.
    """
    result = TeacherPrompts.without_signal(limits, written=True)
    inserted = partial(_inserted, reprompter.renderer.control)
    written: dict[int, Prompt] = {}
    for row, prompt in enumerate(rollout.prompts):
        if not has_loss[row]:
            continue
        attempt = Attempt(
            copy.deepcopy(prompt),
            inserted(rollout.completions[row]),
            inserted(list(demonstrations[row])),
            inserted(feedback[row]),
            succeeded[row],
            dict(rollout.columns[row]),
        )
        answer = function(attempt)
        if answer is not None:
            check_written(answer, prompt, reprompter.rendered, f"teacher_prompt_func, row {row}")
            written[row] = answer
    tokens = reprompter.renderer([*written.values()], [*written])
    for (row, answer), ids in zip(written.items(), tokens, strict=True):
        result.whole_lengths[row] = len(ids)
        if len(ids) > limits[row]:
            if reprompter.truncation == "error":
                raise ValueError(
                    f"teacher_prompt_func, row {row}: expected a prompt of at most {limits[row]} tokens, got "
                    f"{len(ids)}; return a shorter one, raise max_reprompt_length, or choose "
                    "reprompt_truncation='middle', with which the row has no loss"
                )
            result.dropped[row] = True
            continue
        result.row_mask[row], result.ids[row] = True, ids
        prompt, remark = rollout.prompts[row], feedback[row]
        result.has_demonstration[row] = _shows(answer, prompt, map(inserted, demonstrations[row]))
        result.uses_feedback[row] = remark is not None and _shows(answer, prompt, [inserted(remark)])
    return result


def _inserted(control: ControlStrings | None, value: Any) -> Any:
    """A copy of a text, a completion or a list of texts, in which each control string is broken."""
    if control is None:
        return copy.deepcopy(value)
    return with_texts(value, lambda text: control.break_inserted(enclose(text)))


def _shows(written: Prompt, prompt: Prompt, texts: Iterable[str]) -> bool:
    """Whether one of the texts is in the teacher's prompt, and more often than in the student's."""

    def count(value: Prompt, text: str) -> int:
        return sum(each.count(text) for each in texts_of(value))

    return any(count(written, text.strip()) > count(prompt, text.strip()) for text in texts)


def other_columns(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A copy of each row without its prompt; rows of a group share nothing."""
    return [{name: copy.deepcopy(value) for name, value in row.items() if name != "prompt"} for row in rows]


def check_written(written: Any, prompt: Prompt, rendered: RenderedPrompts | None, where: str) -> None:
    """What a function returned is a prompt of the kind of the student's, with a place for the completion after it.

    Args:
        written: what the function returned.
        prompt: the student's.
        rendered: how prompts end that were rendered to strings before; `None`: every string is plain text.
        where: the function and the row, for the message.

    Raises:
        TypeError: another kind of value.
        ValueError: an empty prompt, a last turn of another role or without text, media, text that cannot be
            encoded, or a rendered prompt without the beginning of the assistant's turn.
    """
    if isinstance(prompt, str):
        _check_string(written, prompt, rendered, where)
    else:
        _check_messages(written, where)
    for text in texts_of(written):
        check_encodable(text, where)


def _check_string(written: Any, prompt: str, rendered: RenderedPrompts | None, where: str) -> None:
    if not isinstance(written, str):
        raise TypeError(
            f"{where}: expected a string, as the student's prompt is, or None, got {type(written).__name__} "
            f"({written!r:.200}); return a string"
        )
    if not written:
        raise ValueError(
            f"{where}: expected a prompt that is not empty, got ''; return None for a row without a teacher signal"
        )
    if rendered is not None and rendered.split(prompt)[1] and not written.endswith(rendered.endings):
        raise ValueError(
            f"{where}: expected a prompt that ends with {' or '.join(map(repr, rendered.endings))} of the chat "
            f"template, as the student's does, got a text that ends with {written[-60:]!r}; put that at the end"
        )


def _check_messages(written: Any, where: str) -> None:
    if not isinstance(written, list) or not all(
        isinstance(turn, Mapping) and isinstance(turn.get("role"), str) for turn in written
    ):
        raise TypeError(
            f"{where}: expected a list of messages with a role, as the student's prompt is, or None, got "
            f"{type(written).__name__} ({written!r:.200}); for a text return "
            "[*attempt.prompt[:-1], {'role': 'user', 'content': text}]"
        )
    if not written:
        raise ValueError(
            f"{where}: expected at least one message, got []; return None for a row without a teacher signal"
        )
    try:
        check_turns(written)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
