"""Completions that repeat the wording of the reprompt templates, which only the teacher reads."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Set

from sdpo import Templates

from .prompts import Prompt, texts_of


def template_phrases(templates: Templates, *, with_feedback: bool) -> frozenset[str]:
    """The phrases of the templates: the word trigrams of each line, and a line of two words as a whole.

    A placeholder counts as a line break. Phrases are in lower case, without punctuation, and begin and end with a
    space, so that they match whole words only.

    Args:
        templates: the templates of the reprompts.
        with_feedback: whether reprompts can have feedback.

    Examples:
        >>> templates = Templates("{prompt}{solution}{feedback}\\n\\nNow solve it again.")
        >>> sorted(template_phrases(templates, with_feedback=False))
        [' correct solution ', ' now solve it ', ' solve it again ']
    """
    used = [templates.reprompt, templates.solution]
    if with_feedback:
        used += [templates.feedback, templates.success_feedback]
    placeholders: defaultdict[str, str] = defaultdict(lambda: "\n")
    lines = [
        _normalized(line).split()
        for template in used
        for line in template.format_map(placeholders).splitlines()
    ]
    return frozenset(
        f" {' '.join(words[start : start + size])} "
        for words in lines
        for size in [min(len(words), 3)]
        if size > 1
        for start in range(len(words) - size + 1)
    )


def has_phrase(completion: str, prompt: Prompt, phrases: Set[str]) -> bool:
    """Whether a completion has a phrase that the student's prompt does not have.

    A phrase counts even if the demonstration or feedback in the reprompt has it: the demonstration is another
    completion, which may repeat the templates too, and feedback may quote the completion. Common words such as
    "correct solution" can be there by chance.

    Args:
        completion: the text of the completion.
        prompt: the student's prompt.
        phrases: what `template_phrases` returned.

    Examples:
        >>> phrases = template_phrases(Templates(), with_feedback=True)
        >>> has_phrase("**Correct solution**: 2", "1 + 1?", phrases), has_phrase("2", "1 + 1?", phrases)
        (True, False)
        >>> has_phrase("The correct solution is 2.", "What is the correct solution of 1 + 1?", phrases)
        False
    """
    text = _normalized(completion)
    found = [phrase for phrase in phrases if phrase in text]
    # Most completions have no phrase, and normalizing a long prompt takes time.
    known = "\n".join(map(_normalized, texts_of(prompt))) if found else ""
    return any(phrase not in known for phrase in found)


def _normalized(text: str) -> str:
    """The words of a text in lower case, without punctuation, with one space before, between and after them."""
    words = " ".join(re.findall(r"\w+", text.lower()))
    return f" {words} "
