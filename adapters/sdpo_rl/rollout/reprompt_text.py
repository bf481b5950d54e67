"""Whether a completion repeats words of the templates, which only its teacher reads."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Set

from sdpo import Templates

from .prompts import Prompt, texts_of


def template_phrases(templates: Templates, *, with_feedback: bool) -> frozenset[str]:
    """The phrases of the templates: each run of three words of a line, and the lines of two words.

    A placeholder ends a line. Words are in lower case, without punctuation, and each has spaces around it.

    Args:
        templates: of the reprompts.
        with_feedback: reprompts have feedback.

    Examples:
        >>> templates = Templates("{prompt}{solution}{feedback}\\n\\nNow solve it again.")
        >>> sorted(template_phrases(templates, with_feedback=False))
        [' correct solution ', ' now solve it ', ' solve it again ']
    """
    used = [templates.reprompt, templates.solution]
    if with_feedback:
        used += [templates.feedback, templates.success_feedback]
    line_breaks: defaultdict[str, str] = defaultdict(lambda: "\n")
    lines = [
        _spaced(line).split() for template in used for line in template.format_map(line_breaks).splitlines()
    ]
    return frozenset(
        f" {' '.join(words[start : start + size])} "
        for words in lines
        for size in [min(len(words), 3)]
        if size > 1
        for start in range(len(words) - size + 1)
    )


def has_phrase(completion: str, prompt: Prompt, phrases: Set[str]) -> bool:
    """Whether a completion has a phrase that its own prompt does not have.

    A phrase counts also where the inserted demonstration or feedback has it: a peer may repeat the templates too,
    and feedback may quote the completion.

    Args:
        completion: its text.
        prompt: the student's.
        phrases: of `template_phrases`.

    Examples:
        >>> phrases = template_phrases(Templates(), with_feedback=True)
        >>> has_phrase("**Correct solution**: 2", "1 + 1?", phrases), has_phrase("2", "1 + 1?", phrases)
        (True, False)
        >>> has_phrase("The correct solution is 2.", "What is the correct solution of 1 + 1?", phrases)
        False
    """
    text = _spaced(completion)
    found = [phrase for phrase in phrases if phrase in text]
    # Most completions have none, and prompts may be long.
    known = "\n".join(map(_spaced, texts_of(prompt))) if found else ""
    return any(phrase not in known for phrase in found)


def _spaced(text: str) -> str:
    """The words of a text in lower case, with one space before, between and after them."""
    words = " ".join(re.findall(r"\w+", text.lower()))
    return f" {words} "
