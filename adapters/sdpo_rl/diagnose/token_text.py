"""Tokens as text for a person: what is a control token, what was cut, and no character that moves a cursor."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ..rollout.control import inner_tokenizer
from ..rollout.cuts import CUT_MARKER

# Of a printed text; the rest is in the attributes.
_HEAD, _TAIL = 4000, 2000

Span = tuple[int, int]  # first character and the one after the last


@dataclass(frozen=True)
class TokenText:
    """Decoded tokens, special ones included.

    Attributes:
        text: what the tokens decode to, unchanged.
        plain: where the text looks like a control token, but its tokens are those of plain text.
        cuts: where `" ... "` stands for what was cut out of a demonstration or of the feedback.

    Examples:
        >>> print(TokenText("<bot>say <bot> ... done", plain=[(9, 14)], cuts=[(14, 19)]))
        <bot>say \\<bot>« ... »done
    """

    text: str
    plain: Sequence[Span] = ()
    cuts: Sequence[Span] = ()

    def __str__(self) -> str:
        marks = [*((start, "\\") for start, _ in self.plain), *((start, "«") for start, _ in self.cuts)]
        marks += [(end, "»") for _, end in self.cuts]
        pieces, position = [], 0
        for place, mark in sorted(marks):
            pieces += [self.text[position:place], mark]
            position = place
        return printable("".join([*pieces, self.text[position:]]))


def printable(text: str) -> str:
    """A text with escapes in place of all that is not printed, line feeds and tabs aside.

    Args:
        text: any text, also with lone surrogates.

    Examples:
        >>> print(printable("red: \\x1b[31m, back: \\r, hidden: \\u202e"))
        red: \\x1b[31m, back: \\r, hidden: \\u202e
    """
    return "".join(
        character if character.isprintable() or character in "\n\t" else _escape(character)
        for character in text
    )


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def block(text: str) -> Iterator[str]:
    """The lines of a printable text behind a bar, so that no text looks like a heading; of a long one the ends."""
    left_out = len(text) - _HEAD - _TAIL
    if left_out <= 0:
        yield from _lines(text)
        return
    yield from _lines(text[:_HEAD])
    yield f"  ~ {left_out} characters are not printed here"
    yield from _lines(text[-_TAIL:])


def _lines(text: str) -> Iterator[str]:
    return (f"  | {line}" for line in text.split("\n"))


def token_text(
    processing_class: Any,
    ids: Sequence[int],
    control: Sequence[str] | set[str],
    *,
    whole_texts: Sequence[str] = (),
    cut_texts: Sequence[str] = (),
) -> TokenText:
    """Decode tokens, and find what is a control string without being a control token.

    Args:
        processing_class: a tokenizer, or a processor with one.
        ids: tokens.
        control: the texts of the control tokens.
        whole_texts: demonstrations and feedback before they were cut.
        cut_texts: the same as they stand in the tokens.
    """
    tokenizer = inner_tokenizer(processing_class)

    def decode(part: Sequence[int]) -> str:
        return str(
            tokenizer.decode(list(part), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    text = decode(ids)
    plain = list(_plain(text, ids, control, tokenizer, decode)) if control else []
    return TokenText(text, plain, list(_cuts(text, whole_texts, cut_texts)))


def _plain(text: str, ids: Sequence[int], control: Any, tokenizer: Any, decode: Any) -> Iterator[Span]:
    tokens = tokenizer.added_tokens_decoder
    special = {i for i, token in tokens.items() if token.content in control}
    pattern = re.compile("|".join(sorted(map(re.escape, control), key=len, reverse=True)))
    position = 0
    for is_control, part in groupby(ids, key=special.__contains__):
        piece = decode(list(part))
        start = text.find(piece, position)
        if start < 0:  # a tokenizer whose parts decode to other texts than the whole
            return
        position = start + len(piece)
        if not is_control:
            yield from ((start + match.start(), start + match.end()) for match in pattern.finditer(piece))


def _cuts(text: str, whole_texts: Sequence[str], cut_texts: Sequence[str]) -> Iterator[Span]:
    position = 0
    for whole, cut in zip(whole_texts, cut_texts, strict=False):
        start = text.find(cut, position) if cut and cut != whole else -1
        if start < 0:
            continue
        position = start + len(cut)
        offset = _marker(whole, cut)
        if offset is not None:
            yield start + offset, start + offset + len(CUT_MARKER)


def _marker(whole: str, cut: str) -> int | None:
    """Where the marker stands in a text that was cut, and not the same characters of the text itself."""
    place = cut.find(CUT_MARKER)
    while place >= 0:
        if whole.startswith(cut[:place]) and whole.endswith(cut[place + len(CUT_MARKER) :]):
            return place
        place = cut.find(CUT_MARKER, place + 1)
    return None
