"""The SDPO options in what experiment trackers log of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
