"""Control strings: the texts of control tokens, which stay text where they stand in an inserted text."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

from tokenizers import AddedToken

# Unicode noncharacters: no text that is meant for exchange holds them.
_BREAK, _OPEN, _CLOSE = "\ufdd0", "\ufdd1", "\ufdd2"
_REMOVED = {ord(mark): None for mark in (_BREAK, _OPEN, _CLOSE)}
# An enclosed text holds no mark, so a stray mark in a question hides none of them.
_ENCLOSED = re.compile(f"{_OPEN}([^{_OPEN}{_CLOSE}]*){_CLOSE}")


def enclose(text: str) -> str:
    """An inserted text in marks that show `ControlStrings.break_inserted` where it begins and ends."""
    return f"{_OPEN}{text.translate(_REMOVED)}{_CLOSE}"


class ControlStrings:
    """The control strings of a tokenizer, and how inserted texts are tokenized without control tokens.

    A control string is the text of a special token, or of another added token that the chat template writes. In
    an inserted text each of them gets a break after its first character. The break is a token of a copy of the
    tokenizer, so that no other token extends over it, and its id is removed afterwards. What the tokens decode
    to is the text as it was, and a text without control strings is tokenized as ever. A token of one character
    has no other spelling and stays.

    Args:
        processing_class: a tokenizer, or a processor with one; it is not changed.
        chat_template: the trainer's chat template; `None`: that of `processing_class`.

    Examples:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> vocabulary = {token: i for i, token in enumerate(["<eos>", "<", "e", "o", "s", ">"])}
        >>> inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
        >>> inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
        >>> control = ControlStrings(tokenizer)
        >>> text = control.break_inserted("so<eos>" + enclose("e<eos>"))
        >>> control.without_breaks(control.processing_class(text)["input_ids"])
        [4, 3, 0, 2, 1, 2, 3, 4, 5]
        >>> control.joined(text)
        'so<eos>e<eos>'
    """

    def __init__(self, processing_class: Any, chat_template: str | None = None) -> None:
        self._original = processing_class
        template = str(chat_template or getattr(processing_class, "chat_template", None) or "")
        self.strings = _strings(inner_tokenizer(processing_class), template)
        self._by_start: dict[str, tuple[str, ...]] = {}
        for string in sorted(self.strings):
            self._by_start[string[:2]] = (*self._by_start.get(string[:2], ()), string)

    @cached_property
    def processing_class(self) -> Any:
        """A copy whose tokenizer has the break as a token."""
        tokenizer = copy.deepcopy(inner_tokenizer(self._original))
        tokenizer.add_tokens([AddedToken(_BREAK, special=True, normalized=False)])
        if self._original is inner_tokenizer(self._original):
            return tokenizer
        processor = copy.copy(self._original)
        processor.tokenizer = tokenizer
        return processor

    @cached_property
    def break_id(self) -> int:
        """The id of the break, which the model does not have."""
        return int(inner_tokenizer(self.processing_class).convert_tokens_to_ids(_BREAK))

    def has_break(self, text: str) -> bool:
        """Whether a text has to be tokenized by the copy."""
        return _BREAK in text

    def without_breaks(self, ids: Sequence[int]) -> list[int]:
        """The ids without those of breaks."""
        return [i for i in ids if i != self.break_id]

    def joined(self, text: str) -> str:
        """A text without its breaks."""
        return text.replace(_BREAK, "")

    def break_inserted(self, text: str) -> str:
        """The text without the marks of `enclose`, each control string that lies or begins or ends in them broken.

        A control string outside, in the question or in a template's own words, keeps its meaning.
        """
        pieces, spans, end = _ENCLOSED.split(text), [], 0
        for index, piece in enumerate(pieces):
            if index % 2:
                spans.append((end, end + len(piece)))
            end += len(piece)
        whole = "".join(pieces)
        places = {
            start + 1
            for start, stop in self._occurrences(whole)
            if any(start < last and first < stop for first, last in spans)
        }
        edges = [0, *sorted(places), len(whole)]
        return _BREAK.join(whole[start:stop] for start, stop in pairwise(edges))

    def _occurrences(self, text: str) -> Iterator[tuple[int, int]]:
        """Where control strings start and stop, also within one another."""
        # A tokenizer may have thousands, most of which begin alike.
        for begin, strings in self._by_start.items():
            for string in strings if begin in text else ():
                place = text.find(string)
                while place >= 0:
                    yield place, place + len(string)
                    place = text.find(string, place + 1)


def inner_tokenizer(processing_class: Any) -> Any:
    """The tokenizer of a processor, or the tokenizer itself."""
    return getattr(processing_class, "tokenizer", processing_class)


def _strings(tokenizer: Any, chat_template: str) -> set[str]:
    try:
        tokens = tokenizer.added_tokens_decoder.values()
    except NotImplementedError:  # mistral-common, which reads no text as a control token
        return set()
    return {
        token.content
        for token in tokens
        if len(token.content) > 1
        and (token.special or (token.content in chat_template and _has_mark(token.content)))
    }


def _has_mark(text: str) -> bool:
    """Whether a text is more than letters, digits and white space, which a template writes without a meaning."""
    return any(not (character.isalnum() or character.isspace()) for character in text)
