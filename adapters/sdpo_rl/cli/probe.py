"""`sdpo probe`: whether the model of a recipe can teach itself, before it is trained.

sdpo probe --config recipe.yaml --json probe.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from ..diagnose.probe.run import probe
from . import UserError
from .recipe import parse
from .train import build

DOES_NOT_LEARN = "does not learn"


def run(arguments: Sequence[str]) -> int:
    """Print the result; returns 1 if the verdict is not to train."""
    parser = argparse.ArgumentParser(prog="sdpo probe", add_help=False, allow_abbrev=False)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to this file")
    parser.add_argument("--batches", type=int, default=2, help="generation batches; default: 2")
    parser.add_argument("--answer_column", help="a column of the dataset with a right completion")
    own, rest = parser.parse_known_args(list(arguments))
    if own.json is not None and not own.json.parent.is_dir():
        raise UserError(
            f"--json: expected a file in a folder, got {str(own.json)!r}; create the folder first"
        )
    recipe = parse(rest)
    trainer = build(recipe)
    try:
        result = probe(trainer, batches=own.batches, answer_column=own.answer_column)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error
    if trainer.accelerator.is_main_process:
        print(result)
        if own.json is not None:
            own.json.write_text(json.dumps(result.to_dict(), indent=1) + "\n")
    return int(result.verdict.outlook == DOES_NOT_LEARN)
