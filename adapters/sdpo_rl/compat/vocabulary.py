"""Check K against the size of a model's vocabulary before its weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig


def check_vocabulary(k: int | None, model: Any, init_kwargs: Mapping[str, Any] | None) -> None:
    """Check that K does not exceed the size of the model's vocabulary.

    Args:
        k: number of tokens of the top-K support; `None` for other supports.
        model: the model, or its name.
        init_kwargs: keyword arguments with which TRL loads a model given by name, `GRPOConfig.model_init_kwargs`.

    Raises:
        ValueError: K is larger.
        OSError: no model has that name.
    """
    if k is None:
        return
    named = isinstance(model, str)
    config = AutoConfig.from_pretrained(model, **(init_kwargs or {})) if named else model.config
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    if vocabulary is not None and k > vocabulary:
        raise ValueError(
            f"k: expected at most {vocabulary}, the model's vocabulary, got {k}; lower it, or set support='full'"
        )
