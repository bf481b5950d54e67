"""Trainers that must refuse bad input before they sample anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
from datasets import Dataset, IterableDataset


def without_generate(**changes: Any) -> Any:
    """A model that must not be asked to generate."""
    model = tiny.model(**changes)

    def generate(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model was asked to generate")

    model.generate = generate
    return model


def train(path: Path, **changes: Any) -> None:
    tiny.trainer(path, **{"start": without_generate(), **changes}).train()


def build(path: Path, **changes: Any) -> None:
    """The constructor alone."""
    tiny.trainer(path, **{"start": without_generate(), **changes})


def streaming(data: Dataset) -> IterableDataset:
    """The rows of `data`, whose columns are not known before the first."""
    return IterableDataset.from_generator(lambda: iter(list(data)))
