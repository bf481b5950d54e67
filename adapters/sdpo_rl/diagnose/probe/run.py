"""The probe of a trainer: generation batches, what both models make of them, and a verdict."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, islice
from typing import Any

from ...rollout.checks import ROWS_CHECKED
from ..generation_batch import check_trainer, training_rows
from ..unchanged import unchanged
from .measure import measure
from .result import ProbeResult
from .summary import summarize


def probe(trainer: Any, *, batches: int = 2, answer_column: str | None = None) -> ProbeResult:
    """Measure, before any training, whether a model can teach itself with the settings of a trainer.

    Generates `batches` generation batches, and as many completions again from the teacher's prompts, which the same
    reward functions judge. Compares both models on them, and predicts in words what training will do. Weights,
    optimizer, teacher, random numbers, metrics and data order stay as they are. Reward functions, tools and
    environments run; an environment must set the same task for the same row.

    On several processes all must call it, and all get the same numbers but for the cost.

    Args:
        trainer: an `SDPOTrainer` with `enabled=True`.
        batches: generation batches; fewer where the dataset has fewer in an epoch.
        answer_column: a column of the dataset with a right completion of each prompt, a text; `None`: right answers
            are successes of the batch.

    Returns:
        The numbers and the verdict. `print` shows them; `to_dict()` is for JSON.

    Raises:
        TypeError: something that is not an SDPOTrainer, a number of the wrong type, or an answer that is no text.
        ValueError: no batch, `enabled=False`, FSDP or DeepSpeed, a column that the dataset does not have.

    Source: a choice of this library.

    Examples:
        >>> probe(3)
        Traceback (most recent call last):
            ...
        TypeError: trainer: expected an SDPOTrainer, got int; pass the trainer that is going to train
    """
    check_probe(trainer, batches, answer_column)
    with unchanged(trainer):
        trainer.model.train()  # as in training: the mode decides the number of generations
        inputs = training_rows(trainer, batches=batches)
        if answer_column is not None:
            for row in chain(*inputs):
                _check_column(answer_column, row)
                check_answers(answer_column, [row[answer_column]])
        measured = [measure(trainer, rows, answer_column=answer_column) for rows in inputs]
    return summarize(trainer, measured, answer_column=answer_column)


def check_probe(trainer: Any, batches: Any, answer_column: Any) -> None:
    """The arguments of `probe`, before anything is generated.

    Args:
        trainer: an `SDPOTrainer`.
        batches: generation batches.
        answer_column: a column of the dataset, or `None`.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument that `probe` refuses.
    """
    check_trainer(trainer)
    if isinstance(batches, bool) or not isinstance(batches, int):
        raise TypeError(f"batches: expected an integer, got {type(batches).__name__}; pass 1 or 2")
    if batches < 1:
        raise ValueError(f"batches: expected at least 1, got {batches}; pass 1 or 2")
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            "trainer: expected one process or DDP, got FSDP or DeepSpeed, which hold parts of the weights; "
            "probe on one process"
        )
    dataset = trainer.train_dataset
    columns = getattr(dataset, "column_names", None)
    if answer_column is None or columns is None:
        return
    _check_column(answer_column, columns)
    if hasattr(dataset, "__len__"):
        check_answers(answer_column, islice(dataset[answer_column], ROWS_CHECKED))


def _check_column(name: str, columns: Iterable[str]) -> None:
    if name not in columns:
        raise ValueError(
            f"answer_column: expected a column of train_dataset, got {name!r}; it has {', '.join(columns)}"
        )


def check_answers(name: str, answers: Iterable[Any]) -> None:
    """Right completions are texts.

    Args:
        name: of their column.
        answers: its entries.

    Raises:
        TypeError: an entry of another kind.
    """
    for answer in answers:
        if not isinstance(answer, str):
            raise TypeError(
                f"answer_column: expected a column of texts, got {type(answer).__name__} in {name!r}; write the "
                "completion that a right answer is, or name another column"
            )
