"""What the programs refuse: numbers, records and models that no run could use.

A module of `run.py`, `train.py` and `report.py`; nothing to run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from curves import Run
from environment import Messages

LONGEST_REASON = 200  # characters: an error of the hub is a page long


def positive(text: str) -> int:
    """A positive integer of the command line.

    Examples:
        >>> positive("12")
        12
    """
    value = int(text) if text.strip().isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return value


def non_negative(text: str) -> int:
    """An integer of 0 or more of the command line, as a seed has to be.

    Examples:
        >>> non_negative("0")
        0
    """
    if not text.strip().isdecimal():
        raise argparse.ArgumentTypeError(f"expected an integer of 0 or more, got {text!r}")
    return int(text)


def cannot_be_a_folder(path: Path) -> bool:
    """Whether a folder cannot be made at a path, since it or a folder above it is a file."""
    return any(part.exists() and not part.is_dir() for part in (path, *path.parents))


def read_record(path: Path) -> Run | None:
    """A record, also of a run that was stopped; `None` without one.

    Raises:
        ValueError: the file is no record.
    """
    if not path.exists():
        return None
    content = path.read_bytes()
    try:
        record = json.loads(content)
    except ValueError:
        got = f"{len(content)} bytes that are not JSON" if content.strip() else "an empty file"
        raise ValueError(
            f"{path}: expected a record, got {got} (cut off?); remove the file and start again"
        ) from None
    if not isinstance(record, dict) or not {"complete", "points"} <= record.keys():
        raise ValueError(
            f"{path}: expected a record, got JSON without 'complete' and 'points'; remove the file and start again"
        )
    return record


def check_model(given: str, prompt: Messages) -> None:
    """Refuse a model that every run would fail with, before any of them starts; loads no weights.

    Args:
        given: a folder or a hub id.
        prompt: of a task, which the chat template must be able to write.

    Raises:
        ValueError: the model cannot be used; the message names `--model`.
    """
    if (reason := _problem(given, prompt)) is not None:
        raise ValueError(
            f"--model: expected a model folder or a hub id with a chat template, got {given!r}: {reason}; pass "
            "the folder of an instruct model, or its id (without a network it must be in the cache)"
        )


def _problem(given: str, prompt: Messages) -> str | None:
    """Why a model cannot be used, in one line; `None` if nothing is known to be wrong."""
    path = Path(given)
    if path.is_file():
        return "it is a file"
    if path.is_dir() and not (path / "config.json").is_file():
        return "no config.json in the folder"
    if path.is_dir() and not [*path.glob("*.safetensors"), *path.glob("*.bin")]:
        return "no weights in the folder"
    if not path.is_dir() and (path.is_absolute() or given.startswith((".", "~")) or given.count("/") > 1):
        return "no such folder"
    import transformers

    transformers.utils.logging.set_verbosity_error()
    try:
        transformers.AutoConfig.from_pretrained(given)
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(given)
        if tokenizer.chat_template is None:
            return "its tokenizer has no chat template"
        turns = [*prompt, {"role": "assistant", "content": "answer"}]
        tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # noqa: BLE001 - of transformers, tokenizers, the hub or the template
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return (lines[0] if lines else type(error).__name__)[:LONGEST_REASON]
    return None
