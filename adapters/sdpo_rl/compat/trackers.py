"""What experiment trackers log of a run besides TRL's: the SDPO options, and tables of rows."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

# Events in which the callbacks of transformers start a tracker and log the arguments of the run.
_STARTS = ("on_train_begin", "on_log", "on_evaluate", "on_predict")


def log_options(handler: Any, options: Mapping[str, Any]) -> None:
    """Make every tracker log `options` with the training arguments.

    The callbacks of transformers (Weights & Biases, TensorBoard, MLflow, trackio, ...) log `args.to_dict()`, or a
    method that calls it, when they start. During these events it contains the options too.

    Args:
        handler: the `callback_handler` of a Trainer.
        options: by the names they are logged under.
    """
    call_event = handler.call_event

    def call_event_with_options(event: str, args: Any, *others: Any, **keywords: Any) -> Any:
        if event not in _STARTS:
            return call_event(event, args, *others, **keywords)
        with _in_dictionary(args, options):
            return call_event(event, args, *others, **keywords)

    handler.call_event = call_event_with_options


def log_table(report_to: Sequence[str], name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Log a table to the trackers that TRL logs its completions to, if their run has begun.

    Args:
        report_to: names of trackers; those without tables are passed over.
        name: of the table.
        rows: by the names of the columns.
    """
    trackers = [tracker for tracker in ("wandb", "trackio", "comet_ml") if tracker in report_to]
    if not rows or not trackers:
        return
    import pandas

    table = pandas.DataFrame(list(rows))
    for tracker in trackers:
        if tracker == "comet_ml":
            from trl.trainer.utils import log_table_to_comet_experiment

            log_table_to_comet_experiment(name=f"{name}.csv", table=table)
            continue
        backend = importlib.import_module(tracker)
        if tracker == "trackio" or backend.run is not None:
            backend.log({name: backend.Table(dataframe=table)})


@contextmanager
def _in_dictionary(args: Any, options: Mapping[str, Any]) -> Iterator[None]:
    """`args.to_dict()` contains `options`. Only for a while: a checkpoint contains the pickled `args`."""
    if "to_dict" in vars(args):  # one event within another
        yield
        return
    args.to_dict = lambda: {**type(args).to_dict(args), **options}
    try:
        yield
    finally:
        del args.to_dict
