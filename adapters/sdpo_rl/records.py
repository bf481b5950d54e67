"""What a run records besides TRL: its log, chosen rows, and columns of the completions table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from .compat import trackers
from .compat.completions_table import Columns, CompletionsTable, column_names
from .config import SDPOConfig
from .credit.files import RunLog
from .credit.recorder import make_recorder, table_rows
from .credit.tokens import LogitSettings
from .rollout.demonstrations import Rollout, TeacherContext
from .step.micro_batch import Observation

Gather = Callable[[list[Any]], list[Any]]  # concatenates a list over processes


class Records:
    """The files of a run, and what its completions table shows of the loss.

    Attributes:
        recorder: of chosen rows; `None`: none are kept, or another process writes them.

    Args:
        config: its `credit_rows` is used.
        args: the run's `GRPOConfig`.
        processing_class: the tokenizer, or a processor with one.
        settings: what turns outputs into distributions.
        has_table: the run logs a table of completions.
        writes: whether this process writes the run's files.
        gather: of this run.

    Raises:
        ValueError: as `make_recorder`.
    """

    def __init__(
        self,
        config: SDPOConfig,
        args: Any,
        processing_class: Any,
        settings: LogitSettings,
        *,
        has_table: bool,
        writes: bool,
        gather: Gather,
    ) -> None:
        self.recorder = make_recorder(config, args, processing_class, settings, writes=writes)
        self._log = RunLog(args.output_dir, writes=writes)
        self._table = CompletionsTable(args.generation_batch_size) if has_table else None
        self._report_to = args.report_to
        self._gather = gather

    def begin(self, step: int, *, options: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> None:
        """`RunLog.begin`."""
        self._log.begin(step, options=options, history=history)

    def begin_batch(
        self,
        rollout: Rollout,
        context: TeacherContext,
        columns: Columns,
        taken: Sequence[str],
        *,
        mode: str,
        first_row: int,
    ) -> bool:
        """Remember a generation batch; returns whether its micro-batches are to have the places of their rows.

        Args:
            rollout: the batch.
            context: its reprompts.
            columns: of the completions table that reward functions and this library add.
            taken: names of those that reward functions write.
            mode: "train" or "eval".
            first_row: place of this process's first row among those of all processes.
        """
        records_rows = self.recorder is not None and mode == "train"
        if self.recorder is not None and records_rows:
            self.recorder.begin_batch(rollout, context, first_row=first_row)
        if self._table is not None:
            shown = self._gather(context.shown_rows)
            self._table.add_batch(columns, column_names(taken), mode, shown, first_row=first_row)
        return records_rows or self._table is not None

    def observers(
        self, args: Any, state: Any, inputs: Mapping[str, Any], *, mode: str
    ) -> list[Callable[[Observation], None]]:
        """What the loss of a micro-batch is to call.

        Args:
            args: the run's `GRPOConfig`.
            state: the Trainer's, before the step.
            inputs: of the micro-batch.
            mode: "train" or "eval".
        """
        found: list[Any] = []
        if self.recorder is not None and mode == "train":
            found.append(self.recorder.observer(args, state, inputs))
        if self._table is not None and "rollout_row" in inputs:
            found.append(partial(self._table.observe, mode))
        return [*filter(None, found)]

    def fill_table(self, columns: Columns, taken: Sequence[str]) -> None:
        """Write the divergences that were seen since the last time; arguments as for `begin_batch`."""
        if self._table is not None:
            self._table.fill(columns, column_names(taken)[1], self._gather)

    def write_own(self, step: int, logs: Mapping[str, Any]) -> None:
        """Write an entry that the user logged; warnings and rows wait for the next of the Trainer."""
        self._log.add(step, logs, {})

    def write(self, step: int, logs: Mapping[str, Any], warnings: Mapping[str, str], *, mode: str) -> None:
        """Write an entry of the log, the warnings since the last, by name, and the rows of a training step."""
        self._log.add(step, logs, warnings)
        if self.recorder is not None and mode == "train":
            trackers.log_table(self._report_to, "credit", table_rows(self.recorder.write(step)))
