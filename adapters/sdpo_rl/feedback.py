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
    if len(items) != rows:
        raise ValueError(
            f"reward function {name!r} returned {len(items)} items for {rows} completions; expected exactly one "
            "item per completion, in their order"
        )
    pairs = [_split_item(name, row, item) for row, item in enumerate(items)]
    return [score for score, _ in pairs], [text for _, text in pairs]


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

    `last_feedback` is looked for on the function and on the object whose method it is. What several methods of
    one object would say with the same list is said once.
    """

    def __init__(self) -> None:
        self._texts: dict[int, list[str | None]] = {}
        self._said: list[Any] = []
        self._wrapped = 0

    def wrap(self, reward_func: Any) -> Any:
        """`reward_func` with its texts split off; anything that is not a plain callable comes back as it is."""
        if not callable(reward_func) or hasattr(reward_func, "parameters"):
            return reward_func
        slot, self._wrapped = self._wrapped, self._wrapped + 1
        inner = _unwrap_partial(reward_func)
        name = getattr(inner, "__name__", type(inner).__name__)

        def split(outputs: Any, completions: Sequence[Any]) -> list[Score]:
            scores, texts = split_rewards(name, outputs, len(completions))
            last = _last_feedback(inner)
            if last is not None and not any(texts) and not any(last is said for said in self._said):
                self._said.append(last)
                texts = split_rewards(
                    f"{name}.last_feedback", [(None, text) for text in last], len(completions)
                )[1]
            self._texts[slot] = texts
            return scores

        if inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(type(inner).__call__):

            async def wrapped_async(*args: Any, completions: Sequence[Any], **kwargs: Any) -> list[Score]:
                return split(await reward_func(*args, completions=completions, **kwargs), completions)

            return _named(wrapped_async, name, reward_func)

        def wrapped(*args: Any, completions: Sequence[Any], **kwargs: Any) -> list[Score]:
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


def _last_feedback(function: Any) -> Any:
    owner = getattr(function, "__self__", None)
    return getattr(function, "last_feedback", getattr(owner, "last_feedback", None))


def _named(wrapper: Any, name: str, original: Any) -> Any:
    wrapper.__name__ = name
    wrapper.__qualname__ = name
    wrapper.__wrapped__ = original
    return wrapper
