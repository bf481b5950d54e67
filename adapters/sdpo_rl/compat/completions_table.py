"""The columns of TRL's completions table that this library adds: feedback, demonstrations and divergences."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Any

from torch import Tensor

from ..step.micro_batch import Observation

DEMONSTRATIONS, DIVERGENCE = "demonstration_rows", "divergence"

Columns = MutableMapping[str, "deque[Any]"]


def table_column(taken: Iterable[str], column: str = "feedback") -> str:
    """The name of a column of the completions table: `feedback`, say, or `sdpo_feedback` where that is taken.

    Args:
        taken: names of reward functions, and of columns that they write by `log_extra`.
        column: the wanted name.
    """
    names = set(taken)
    while column in names:
        column = f"sdpo_{column}"
    return column


def column_names(taken: Iterable[str]) -> list[str]:
    """`table_column` of the two columns of a `CompletionsTable`."""
    names = list(taken)
    return [table_column(names, name) for name in (DEMONSTRATIONS, DIVERGENCE)]


def add_feedback(
    columns: Columns,
    feedback: list[str | None],
    taken: Iterable[str],
    *,
    rows: int,
    log: Callable[[str, list[str | None]], None],
    gather: Callable[[list[Any]], list[Any]],
) -> None:
    """Log the feedback of a generation batch as a column, from the first batch on that has any.

    Args:
        columns: of the table that reward functions and this library add.
        feedback: of this process's rows.
        taken: as for `table_column`.
        rows: of the table before this batch.
        log: TRL's; adds the values of all processes to a column.
        gather: concatenates a list over processes.
    """
    column = table_column(taken)
    if column != "feedback" and column not in columns:
        if not any(gather(feedback)):
            return
        # The columns of the table must have one length, also after batches without feedback.
        columns[column].extend([None] * rows)
    log(column, feedback)


class CompletionsTable:
    """Writes two columns beside those of TRL: whose completions the teacher read, and the divergence of each row.

    A row's demonstrations are places in its generation batch, of all processes. Its divergence is the mean over its
    tokens with a loss, before any weight, in nats; of several passes that of the last. It is known once the row's
    micro-batch has run; a row without a signal has none.

    Args:
        size: rows of the table.
    """

    def __init__(self, size: int) -> None:
        self._keys: deque[tuple[int, int]] = deque(
            maxlen=size
        )  # generation batch and place, of the table's rows
        self._latest = {"train": 0, "eval": 0}  # generation batch
        self._first_row = {"train": 0, "eval": 0}  # of this process, in that batch
        self._seen: list[tuple[int, Tensor, Tensor]] = []  # generation batch, places [B], divergences [B]

    def add_batch(
        self,
        columns: Columns,
        names: Sequence[str],
        mode: str,
        demonstrations: Sequence[Sequence[int]],
        *,
        first_row: int,
    ) -> None:
        """The rows of a generation batch, after TRL has added them.

        Args:
            columns: of the table that reward functions and this library add.
            names: of the two columns.
            mode: "train" or "eval".
            demonstrations: of each row of all processes the rows that its teacher read.
            first_row: place of this process's first row among those of all processes.
        """
        batch = max(self._latest.values()) + 1
        self._latest[mode], self._first_row[mode] = batch, first_row
        missing = len(self._keys)
        self._keys.extend((batch, place) for place in range(len(demonstrations)))
        cells: list[Any] = [", ".join(map(str, rows)) or None for rows in demonstrations]
        unknown: list[Any] = [None] * len(cells)
        for name, values in zip(names, (cells, unknown), strict=True):
            if name not in columns:  # all columns have one length
                columns[name].extend([None] * missing)
            columns[name].extend(values)

    def observe(self, mode: str, seen: Observation) -> None:
        """Remember the divergences of a micro-batch, on its device.

        Args:
            mode: "train" or "eval".
            seen: what its loss was computed from.
        """
        mask = seen.batch.completions["loss_mask"]
        places = seen.batch.completions["rollout_row"].flatten() + self._first_row[mode]
        sums = seen.tokens.divergence.float().masked_fill(~mask, 0.0).sum(-1)
        self._seen.append((self._latest[mode], places, sums / mask.sum(-1)))

    def fill(self, columns: Columns, name: str, gather: Callable[[list[Any]], list[Any]]) -> None:
        """Write the divergences that were seen since the last time. All processes call it.

        Args:
            columns: as for `add_batch`.
            name: of the column.
            gather: concatenates a list over processes.
        """
        own: dict[tuple[int, int], float] = {}
        for batch, places, values in self._seen:
            keys = [(batch, place) for place in places.tolist()]
            own.update(zip(keys, values.tolist(), strict=True))
        self._seen.clear()
        known = dict(gather([*own.items()]))
        for place, key in enumerate(self._keys):
            value = known.get(key)
            if value is not None and not math.isnan(value):  # no token of the row had a divergence: 0 / 0
                columns[name][place] = value
