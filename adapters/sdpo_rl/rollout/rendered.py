"""Prompts that were rendered to strings before: where the question ends and the assistant's turn begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .control import ControlStrings, inner_tokenizer
from .prompts import Renderer

_PROBE = "PROBE"


@dataclass(frozen=True)
class RenderedPrompts:
    """How a chat template ends a prompt: the end of the user turn, then the header of the assistant's.

    Args:
        endings: what may follow the question, the longest first.
        control: control strings by which a rendered prompt is known, whatever its end.
    """

    endings: tuple[str, ...]
    control: frozenset[str]

    def split(self, prompt: str) -> tuple[str, str]:
        """The prompt up to the end of the question, and its ending; the ending of plain text is empty.

        Args:
            prompt: plain text, or a conversation that a chat template wrote.

        Returns:
            Two texts whose sum is the prompt.

        Raises:
            ValueError: a conversation with another ending.

        Examples:
            >>> rendered = RenderedPrompts(("<end><bot>",), frozenset({"<user>", "<end>", "<bot>"}))
            >>> rendered.split("<user>1 + 1?<end><bot>"), rendered.split("1 + 1 =")
            (('<user>1 + 1?', '<end><bot>'), ('1 + 1 =', ''))
        """
        for ending in self.endings:
            if prompt.endswith(ending):
                return prompt.removesuffix(ending), ending
        if found := sorted(string for string in self.control if string in prompt):
            raise ValueError(
                f"expected a plain text, or one that ends with {' or '.join(map(repr, self.endings))} of the chat "
                f"template, got {found} in a text that ends with {prompt[-60:]!r}, where a reprompt has no place "
                "before the assistant's turn; pass a list of messages instead of a rendered string"
            )
        return prompt, ""


def rendered_prompts(renderer: Renderer, control: ControlStrings) -> RenderedPrompts | None:
    """How the chat template of `renderer` ends prompts; `None` where there is no template.

    Args:
        renderer: with the arguments of the template that the student's prompts have.
        control: the tokenizer's control strings.
    """
    template = str(renderer.chat_template or getattr(renderer.tokenizer, "chat_template", None) or "")
    if not template:
        return None
    conversation: list[dict[str, Any]] = [{"role": "user", "content": _PROBE}]
    if _PROBE not in renderer.text(
        conversation
    ):  # the template of a multimodal model, for lists of parts alone
        conversation = [{"role": "user", "content": [{"type": "text", "text": _PROBE}]}]
    # Whoever rendered the prompts may have switched the thinking on or off.
    thinking = (
        [{"enable_thinking": value} for value in (True, False)] if "enable_thinking" in template else []
    )
    texts = [renderer.text(conversation, **arguments) for arguments in ({}, *thinking)]
    endings = {text.rpartition(_PROBE)[2] for text in texts if _PROBE in text}
    written = "".join(texts)
    # A plain text may hold the begin-of-sequence token.
    start = inner_tokenizer(renderer.tokenizer).bos_token
    return RenderedPrompts(
        # Without a letter there is no header, and plain text may end so.
        tuple(sorted(filter(_has_letter, endings), key=len, reverse=True)),
        frozenset(string for string in control.strings if string in written and string != start),
    )


def _has_letter(text: str) -> bool:
    return any(map(str.isalpha, text))
