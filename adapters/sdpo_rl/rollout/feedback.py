"""Feedback: texts of reward functions, environments and dataset columns, one per row."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

Score = float | None
# Rewards are float32 in TRL.
_LARGEST_SCORE = torch.finfo(torch.float32).max
# Names of a dataset's column of feedback: this library's, and that of TRL's SDPO.
FEEDBACK_COLUMNS = ("feedback", "privileged_context")
_EXPECTED = 'a number, None, a (score, feedback) pair, or {"score": ..., "feedback": ...}'


def split_rewards(name: str, outputs: Any, rows: int) -> tuple[list[Score], list[str | None]]:
    """Scores and feedback texts of one reward function's output, one of each per row.

    An item is a number, `None` (not applicable), a `(score, feedback)` pair or a mapping with `score` and,
    optionally, `feedback`; items may be mixed.

    Raises:
        TypeError: an output or item of another kind, naming the function and the row.
        ValueError: a number of items other than `rows`, a mapping with other keys, a score that is infinite in
            float32, or a feedback that cannot be encoded.

    Examples:
        >>> split_rewards("judge", [1.0, (0.0, "off by one"), {"score": None}], 3)
        ([1.0, 0.0, None], [None, 'off by one', None])
    """
    try:
        # A set has lost the order of the rows.
        items = None if isinstance(outputs, str | bytes | Mapping | set | frozenset) else list(outputs)
    except TypeError:
        items = None
    if items is None:
        raise TypeError(
            f"reward function {name!r}: expected one item per row, got {type(outputs).__name__}; return a list"
        )
    if _are_columns(items, rows):
        raise ValueError(
            f"reward function {name!r}: expected one (score, feedback) pair per row, got a pair of lists of "
            f"{rows}; return list(zip(scores, texts))"
        )
    if len(items) != rows:
        raise ValueError(
            f"reward function {name!r}: expected {rows} items, one per completion, got {len(items)} items; return "
            "None for a completion that it does not judge"
        )
    pairs = [_split_item(name, row, item) for row, item in enumerate(items)]
    return [score for score, _ in pairs], [text for _, text in pairs]


def _are_columns(items: list[Any], rows: int) -> bool:
    """Whether this is a list of scores and a list of texts, and not two rows."""
    lists = [item for item in items if isinstance(item, (list, tuple)) or getattr(item, "ndim", 0) == 1]
    if [len(column) for column in lists] != [rows, rows] or len(items) != 2:
        return False
    return rows != 2 or not (items[0][1] is None or isinstance(items[0][1], str))


def _split_item(name: str, row: int, item: Any) -> tuple[Score, str | None]:
    if isinstance(item, Mapping):
        if "score" not in item or set(item) - {"score", "feedback"}:
            raise ValueError(
                f"reward function {name!r}, row {row}: expected the keys 'score' and, optionally, 'feedback', "
                f"got {sorted(map(str, item))}; rename or remove the others"
            )
        score, text = item["score"], item.get("feedback")
    elif isinstance(item, (tuple, list)) and len(item) == 2:
        score, text = item
    else:
        score, text = item, None
    if text is not None and not isinstance(text, str):
        raise TypeError(
            f"reward function {name!r}, row {row}: expected feedback that is a string or None, got "
            f"{type(text).__name__}; return (score, text)"
        )
    check_encodable(text, f"reward function {name!r}, row {row}")
    if score is None:
        return None, text
    try:
        if isinstance(score, str | bytes):
            raise TypeError("a text is no number, also one of digits")
        score = float(score)
    except OverflowError:  # an integer beyond the largest float
        score = float("inf") if score > 0 else -float("inf")
    except (TypeError, ValueError, RuntimeError) as error:  # the last of torch, for a tensor without data
        raise TypeError(
            f"reward function {name!r}, row {row}: expected {_EXPECTED}, got {item!r}; return one of these"
        ) from error
    if abs(score) > _LARGEST_SCORE:
        raise ValueError(
            f"reward function {name!r}, row {row}: expected a finite score, got {score}; clip it, or return None "
            "for a completion that it does not judge"
        )
    return score, text


def check_encodable(text: str | None, where: str) -> None:
    """A text can be tokenized: it has no lone surrogate, which `errors="surrogateescape"` makes of bytes.

    Args:
        text: feedback; `None`: none.
        where: it comes from, for the message.

    Raises:
        ValueError: the text has one.

    Examples:
        >>> check_encodable("caf\\udce9", "row 0")
        Traceback (most recent call last):
            ...
        ValueError: row 0: expected text that UTF-8 can encode, got '\\udce9' at character 3; decode bytes with ...
    """
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: expected text that UTF-8 can encode, got {error.object[error.start]!r} at character "
            f"{error.start}; decode bytes with errors='replace'"
        ) from error


def join_feedback(texts: Sequence[str | None]) -> str | None:
    """The non-blank texts of one row, a blank line between them; `None` when there are none."""
    shown = [text for text in texts if text and text.strip()]
    return "\n\n".join(shown) if shown else None


def check_column(column: Iterable[Any], name: str = "feedback") -> None:
    """Every entry of a dataset's column of feedback is a text or `None`.

    Raises:
        TypeError: an entry of another kind, naming its row.
        ValueError: a text that cannot be encoded, naming its row.
    """
    for row, text in enumerate(column):
        if text is not None and not isinstance(text, str):
            raise TypeError(
                f"the column {name!r}: expected strings or None, got {type(text).__name__} in row {row}; join "
                "several texts into one string, or rename the column"
            )
        check_encodable(text, f"the column {name!r}, row {row}")


def column_name(columns: Iterable[str]) -> str | None:
    """Which of a dataset's columns holds feedback; `None`: none of them.

    Raises:
        ValueError: there are two.
    """
    columns = set(columns)
    names = [name for name in FEEDBACK_COLUMNS if name in columns]
    if len(names) > 1:
        raise ValueError(
            f"feedback: expected one column of feedback, got {' and '.join(names)}; drop one of them"
        )
    return names[0] if names else None


def column_texts(rows: Sequence[Mapping[str, Any]]) -> list[str | None]:
    """Each row's feedback from the dataset, or from a `rollout_func`, which precedes.

    Raises:
        TypeError: an entry that is not a text, naming its row.
        ValueError: a text that cannot be encoded, naming its row.
    """
    # A rollout_func may add `feedback` to rows of a dataset with the other name.
    name = next((name for name in FEEDBACK_COLUMNS if any(name in row for row in rows)), "feedback")
    texts = [row.get(name) for row in rows]
    check_column(texts, name)
    return texts


def environment_feedback(environments: Sequence[Any]) -> list[str | None]:
    """The `feedback` of each row's environment, an attribute or property: a text about its episode.

    Raises:
        TypeError: a `feedback` that is not a text; a method would be offered to the model as a tool.
        ValueError: a text that cannot be encoded.
    """
    texts = [getattr(environment, "feedback", None) for environment in environments]
    for environment, text in zip(environments, texts, strict=True):
        if text is not None and not isinstance(text, str):
            raise TypeError(
                f"{type(environment).__name__}.feedback: expected a string or None, got {type(text).__name__}; "
                "make it an attribute or a property"
            )
        check_encodable(text, f"{type(environment).__name__}.feedback")
    return texts


class FeedbackCollector:
    """Wraps reward functions so that TRL gets scores alone, and collects the texts by row.

    `wrap` keeps a function's name (it becomes the metric's name) and whether it is async; reward models are
    returned unchanged. `take` returns the texts of the last round, those of several functions joined in their
    order, and clears them.

    `last_feedback` is an attribute of the function or of the object whose method it is. It counts in the round in
    which it is assigned or its list is changed. A list that several methods of one object return counts once.
    """

    def __init__(self) -> None:
        self._texts: dict[int, list[str | None]] = {}  # of this round, by function
        self._counted: list[Any] = []  # the values of `last_feedback` in `_texts`
        self._watched: dict[int, _LastFeedback] = {}  # by the owner's id
        self._wrapped = 0

    def wrap_all(self, reward_funcs: Any) -> list[Any]:
        """`wrap` of each, of one or a list."""
        listed = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        return [self.wrap(reward_func) for reward_func in listed]

    def wrap(self, reward_func: Any) -> Any:
        """`reward_func` with its texts split off; a reward model, or a name of one, is returned unchanged."""
        if not callable(reward_func) or hasattr(reward_func, "parameters"):
            return reward_func
        index, self._wrapped = self._wrapped, self._wrapped + 1
        inner = _unwrap_partial(reward_func)
        name = getattr(inner, "__name__", type(inner).__name__)
        instance = getattr(inner, "__self__", None)
        owners = [getattr(inner, "__func__", inner), *([] if instance is None else [instance])]

        def begin() -> None:
            for owner in owners:
                # Once a round: another method of the object may have assigned it already.
                if id(owner) not in self._watched:
                    self._watched[id(owner)] = _LastFeedback(owner)

        def split(outputs: Any, rows: int) -> list[Score]:
            scores, texts = split_rewards(name, outputs, rows)
            new = (self._watched[id(owner)].new() for owner in owners)
            last = next((value for value in new if value is not None), None)
            if last is not None and not any(texts) and not any(last is value for value in self._counted):
                self._counted.append(last)
                texts = split_rewards(f"{name}.last_feedback", [(None, text) for text in last], rows)[1]
            self._texts[index] = texts
            return scores

        if inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(type(inner).__call__):

            async def wrapped_async(*args: Any, completions: Sequence[Any], **kwargs: Any) -> list[Score]:
                begin()
                rows = len(completions)  # the function may change the list
                return split(await reward_func(*args, completions=completions, **kwargs), rows)

            return _with_name(wrapped_async, name, reward_func)

        def wrapped(*args: Any, completions: Sequence[Any], **kwargs: Any) -> list[Score]:
            begin()
            rows = len(completions)
            return split(reward_func(*args, completions=completions, **kwargs), rows)

        return _with_name(wrapped, name, reward_func)

    def forget(self) -> None:
        """End the round, also one that an exception ended."""
        self._texts.clear()
        self._counted.clear()
        for last_feedback in self._watched.values():
            last_feedback.restore()
        self._watched.clear()

    def take(
        self,
        rows: int,
        column: Sequence[str | None] | None = None,
        environments: Sequence[str | None] = (),
    ) -> list[str | None]:
        """One text per row: those of the reward functions, then that of the row's environment; `None`: no text.

        A row without any has the text of the dataset's `column`. A blank text is none.
        """
        sources = [
            *(self._texts[index] for index in sorted(self._texts)),
            *([environments] if environments else []),
        ]
        live = [join_feedback([texts[row] for texts in sources]) for row in range(rows)]
        self.forget()
        if column is None:
            return live
        return [
            text if text is not None else join_feedback([static])
            for text, static in zip(live, column, strict=True)
        ]


def _unwrap_partial(function: Callable) -> Callable:
    while isinstance(function, functools.partial):
        function = function.func
    return function


class _LastFeedback:
    """The attribute `last_feedback` of one object during a round, so that old texts do not count again.

    For the round it is replaced by a list of the same length without texts, for functions that write into theirs. A
    value that the object does not hold itself (its class does, or a property computes it) stays, and counts once it
    is another list or holds other texts.
    """

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self._old = self._start = _last_feedback(owner)
        self._old_texts = list(self._old) if isinstance(self._old, list) else None
        if self._old is not None and "last_feedback" in getattr(owner, "__dict__", ()):
            self._start = None if self._old_texts is None else [None] * len(self._old_texts)
            owner.last_feedback = self._start

    def new(self) -> Any:
        """The value that was assigned, or the list that was changed, in this round; `None`: neither."""
        now = _last_feedback(self._owner)
        if now is not self._start or (now is not self._old and _has_text(now)):
            return now
        return self._old if self._old_texts is not None and self._old != self._old_texts else None

    def restore(self) -> None:
        """Give the object its own list back, unless another was assigned."""
        if self._start is not self._old and (self.new() is None or self.new() is self._old):
            self._owner.last_feedback = self._old


def _last_feedback(owner: Any) -> Any:
    return getattr(owner, "last_feedback", None)


def _has_text(texts: list[Any] | None) -> bool:
    return texts is not None and any(text is not None for text in texts)


def _with_name(wrapper: Any, name: str, original: Any) -> Any:
    wrapper.__name__ = name
    wrapper.__qualname__ = name
    wrapper.__wrapped__ = original
    return wrapper
