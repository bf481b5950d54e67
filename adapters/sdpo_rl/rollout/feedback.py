"""Live feedback: the texts that reward functions return beside their scores."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Score = float | None
_EXPECTED = 'a number, None, a (score, feedback) pair, or {"score": ..., "feedback": ...}'


def split_rewards(name: str, outputs: Any, rows: int) -> tuple[list[Score], list[str | None]]:
    """Scores and feedback texts of one reward function's output, one of each per row.

    An item is a number, `None` (not applicable), a `(score, feedback)` pair or a mapping with `score` and,
    optionally, `feedback`; items may be mixed.

    Raises:
        TypeError: an output or item of another kind, naming the function and the row.
        ValueError: a number of items other than `rows`, or a mapping with other keys.

    Example:
        >>> split_rewards("judge", [1.0, (0.0, "off by one"), {"score": None}], 3)
        ([1.0, 0.0, None], [None, 'off by one', None])
    """
    try:
        items = list(outputs)
    except TypeError as error:
        raise TypeError(
            f"reward function {name!r} returned {type(outputs).__name__}; expected one item per row"
        ) from error
    if isinstance(outputs, (str, Mapping)):
        raise TypeError(
            f"reward function {name!r} returned a {type(outputs).__name__}; expected one item per row"
        )
    if _are_columns(items, rows):
        raise ValueError(
            f"reward function {name!r} returned a pair of lists of {rows}; expected one (score, feedback) pair per "
            "row, e.g. list(zip(scores, texts))"
        )
    if len(items) != rows:
        raise ValueError(
            f"reward function {name!r} returned {len(items)} items for {rows} completions; expected exactly one "
            "item per completion, in their order"
        )
    pairs = [_split_item(name, row, item) for row, item in enumerate(items)]
    return [score for score, _ in pairs], [text for _, text in pairs]


def _are_columns(items: list[Any], rows: int) -> bool:
    """Whether these are the scores of all rows and then their texts, and cannot be two rows."""
    lists = [item for item in items if isinstance(item, (list, tuple)) or getattr(item, "ndim", 0) == 1]
    if [len(column) for column in lists] != [rows, rows] or len(items) != 2:
        return False
    return rows != 2 or not (items[0][1] is None or isinstance(items[0][1], str))


def _split_item(name: str, row: int, item: Any) -> tuple[Score, str | None]:
    if isinstance(item, Mapping):
        if "score" not in item or set(item) - {"score", "feedback"}:
            raise ValueError(
                f"reward function {name!r}, row {row}: expected the keys 'score' and, optionally, 'feedback', "
                f"got {sorted(map(str, item))}"
            )
        score, text = item["score"], item.get("feedback")
    elif isinstance(item, (tuple, list)) and len(item) == 2:
        score, text = item
    else:
        score, text = item, None
    if text is not None and not isinstance(text, str):
        raise TypeError(
            f"reward function {name!r}, row {row}: feedback must be a string or None, got {type(text).__name__}"
        )
    if score is None:
        return None, text
    try:
        return float(score), text
    except (TypeError, ValueError) as error:
        raise TypeError(f"reward function {name!r}, row {row}: expected {_EXPECTED}, got {item!r}") from error


def join_feedback(texts: Sequence[str | None]) -> str | None:
    """The non-blank texts of one row, a blank line between them; `None` when there are none."""
    kept = [text for text in texts if text and text.strip()]
    return "\n\n".join(kept) if kept else None


def check_column(column: Iterable[Any]) -> None:
    """Every entry of the dataset's column `feedback` is a text or `None`.

    Raises:
        TypeError: an entry of another kind, naming its row.
    """
    for row, text in enumerate(column):
        if text is not None and not isinstance(text, str):
            raise TypeError(
                f"the column 'feedback' must hold strings or None, got {type(text).__name__} in row {row}; join "
                "several texts into one string, or rename the column"
            )


def environment_feedback(environments: Sequence[Any]) -> list[str | None]:
    """What each row's environment says of its episode: its `feedback`, an attribute or property.

    Raises:
        TypeError: a `feedback` that is no text; a method would be offered to the model as a tool.
    """
    texts = [getattr(environment, "feedback", None) for environment in environments]
    for environment, text in zip(environments, texts, strict=True):
        if text is not None and not isinstance(text, str):
            raise TypeError(
                f"{type(environment).__name__}.feedback must be a string or None, got {type(text).__name__}; make "
                "it an attribute or a property"
            )
    return texts


class FeedbackCollector:
    """Wraps reward functions so that TRL sees scores alone and the texts stay here, by row.

    `wrap` keeps a function's name (it becomes the metric's name) and whether it is async; reward models are
    passed through. `take` hands out the texts of the last round, those of several functions joined in their
    order, and forgets them.

    `last_feedback` is looked for on the function and on the object whose method it is, and counts in the round
    in which it is set or its list written to. What several methods of one object would say with the same list is
    said once.
    """

    def __init__(self) -> None:
        self._texts: dict[int, list[str | None]] = {}
        self._said: list[Any] = []
        self._before: dict[int, _Before] = {}
        self._wrapped = 0

    def wrap(self, reward_func: Any) -> Any:
        """`reward_func` with its texts split off; anything that is not a plain callable comes back as it is."""
        if not callable(reward_func) or hasattr(reward_func, "parameters"):
            return reward_func
        slot, self._wrapped = self._wrapped, self._wrapped + 1
        inner = _unwrap_partial(reward_func)
        name = getattr(inner, "__name__", type(inner).__name__)
        owner = getattr(inner, "__self__", None)
        carriers = [getattr(inner, "__func__", inner), *([] if owner is None else [owner])]

        def begin() -> None:
            for carrier in carriers:
                # Once a round: what another method of the object has said in it is not old.
                if id(carrier) not in self._before:
                    self._before[id(carrier)] = _Before(carrier)

        def split(outputs: Any, completions: Sequence[Any]) -> list[Score]:
            scores, texts = split_rewards(name, outputs, len(completions))
            news = (self._before[id(carrier)].news() for carrier in carriers)
            last = next((said for said in news if said is not None), None)
            if last is not None and not any(texts) and not any(last is said for said in self._said):
                self._said.append(last)
                texts = split_rewards(
                    f"{name}.last_feedback", [(None, text) for text in last], len(completions)
                )[1]
            self._texts[slot] = texts
            return scores

        if inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(type(inner).__call__):

            async def wrapped_async(*args: Any, completions: Sequence[Any], **kwargs: Any) -> list[Score]:
                begin()
                return split(await reward_func(*args, completions=completions, **kwargs), completions)

            return _named(wrapped_async, name, reward_func)

        def wrapped(*args: Any, completions: Sequence[Any], **kwargs: Any) -> list[Score]:
            begin()
            return split(reward_func(*args, completions=completions, **kwargs), completions)

        return _named(wrapped, name, reward_func)

    def take(
        self,
        rows: int,
        column: Sequence[str | None] | None = None,
        environments: Sequence[str | None] = (),
    ) -> list[str | None]:
        """One text or `None` per row: those of the reward functions, then that of the row's environment.

        A row without any falls back to the dataset's `column`.
        """
        sources = [
            *(self._texts[slot] for slot in sorted(self._texts)),
            *([environments] if environments else []),
        ]
        live = [join_feedback([texts[row] for texts in sources]) for row in range(rows)]
        self._texts.clear()
        self._said.clear()
        for before in self._before.values():
            before.end()
        self._before.clear()
        if column is None:
            return live
        check_column(column)
        return [
            text if text is not None else join_feedback([static])
            for text, static in zip(live, column, strict=True)
        ]


def _unwrap_partial(function: Callable) -> Callable:
    while isinstance(function, functools.partial):
        function = function.func
    return function


class _Before:
    """What an object carried as `last_feedback` when a round began, set aside so that only the round's own counts.

    In its place lies a list without texts, of the same length, for those who write into theirs. What the object
    does not hold itself (its class does, or a property makes it) stays, and counts once it is another list or
    holds other texts.
    """

    def __init__(self, carrier: Any) -> None:
        self._carrier = carrier
        self._old = self._blank = _carried(carrier)
        self._texts = list(self._old) if isinstance(self._old, list) else None
        if self._old is not None and "last_feedback" in getattr(carrier, "__dict__", ()):
            self._blank = None if self._texts is None else [None] * len(self._texts)
            carrier.last_feedback = self._blank

    def news(self) -> Any:
        """What was said since; `None` for nothing."""
        now = _carried(self._carrier)
        if now is not self._blank or (now is not self._old and _speaks(now)):
            return now
        return self._old if self._texts is not None and self._old != self._texts else None

    def end(self) -> None:
        """Give the object its own list back, unless it has another by now."""
        if self._blank is not self._old and (self.news() is None or self.news() is self._old):
            self._carrier.last_feedback = self._old


def _carried(carrier: Any) -> Any:
    return getattr(carrier, "last_feedback", None)


def _speaks(texts: list[Any] | None) -> bool:
    return texts is not None and any(text is not None for text in texts)


def _named(wrapper: Any, name: str, original: Any) -> Any:
    wrapper.__name__ = name
    wrapper.__qualname__ = name
    wrapper.__wrapped__ = original
    return wrapper
