"""Whether the answer is in the feedback."""

from __future__ import annotations

from collections.abc import Sequence


def answer_in_feedback(feedback: str, completion: str, answers: Sequence[str]) -> bool:
    """Whether a text on a failed completion has one of the answers, as whole words.

    An answer that is in the completion itself does not count: feedback quotes what it is about.

    Args:
        feedback: the text.
        completion: what it is about.
        answers: correct completions of the same prompt.

    Examples:
        >>> answer_in_feedback("expected 42, got 41", "41", ["42"])
        True
        >>> answer_in_feedback("expected 420, got 41", "41", ["42"])
        False
        >>> answer_in_feedback("'6 * 7' is no number", "6 * 7 = 42", ["6 * 7"])
        False
    """
    stripped = (answer.strip() for answer in answers)
    return any(
        _has_words(feedback, answer) and not _has_words(completion, answer) for answer in stripped if answer
    )


def _has_words(text: str, words: str) -> bool:
    """Whether `words` are in the text, neither preceded nor followed by the rest of a word."""
    start = text.find(words)
    while start >= 0:
        end = start + len(words)
        cut_before = words[0].isalnum() and text[:start][-1:].isalnum()
        cut_after = words[-1].isalnum() and text[end : end + 1].isalnum()
        if not cut_before and not cut_after:
            return True
        start = text.find(words, start + 1)
    return False
