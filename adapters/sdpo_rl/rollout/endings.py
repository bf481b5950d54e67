"""How prompts end: what the chat template writes after the text of the last turn, which a completion follows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .prompts import Prompt, Renderer

_PROBE = "PROBE"


def prompt_endings(
    prompts: Sequence[Prompt], renderer: Renderer, teacher_arguments: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """The endings of student's and teacher's prompts, once for each role that the last turn of a prompt has.

    A string has none, whether it is plain text or was rendered before: no template is applied to it.

    Args:
        prompts: of a generation batch.
        renderer: of the student's prompts.
        teacher_arguments: further arguments of the chat template for the teacher's prompts.
    """
    by_role = {prompt[-1]["role"]: prompt for prompt in prompts if not isinstance(prompt, str)}
    for *earlier, last in by_role.values():
        is_text = isinstance(last["content"], str)
        probe = {**last, "content": _PROBE if is_text else [{"type": "text", "text": _PROBE}]}
        student, teacher = (
            renderer.text([*earlier, probe], **arguments) for arguments in ({}, teacher_arguments)
        )
        if _PROBE in student and _PROBE in teacher:
            yield student.rpartition(_PROBE)[2], teacher.rpartition(_PROBE)[2]
