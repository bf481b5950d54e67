"""`sdpo probe`: whether the model of a recipe can teach itself, before it is trained.

sdpo probe --config recipe.yaml --json probe.json
accelerate launch -m sdpo_rl probe --config recipe.yaml
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..diagnose.probe.run import check_probe, probe
from ..diagnose.probe.verdict import DOES_NOT_LEARN
from . import Parser, UserError, show
from .recipe import parse
from .train import build, silence

_BATCHES = 2
_OPTIONS = (
    "--json FILE: also write the numbers to this file",
    f"--batches N: generation batches, {_BATCHES} by default",
    "--answer_column NAME: a column of the dataset with a right completion of each prompt",
)


def run(arguments: Sequence[str]) -> int:
    """Print the result; returns 1 if the verdict is not to train."""
    parser = Parser(prog="sdpo probe", add_help=False, allow_abbrev=False)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--batches", default=str(_BATCHES))
    parser.add_argument("--answer_column")
    own, rest = parser.parse_known_args(list(arguments))
    if own.json is not None and not own.json.parent.is_dir():
        raise UserError(
            f"--json: expected a file in a folder, got {str(own.json)!r}; create the folder first"
        )
    if own.json is not None and own.json.is_dir():
        raise UserError(
            f"--json: expected a file, got the folder {str(own.json)!r}; add a name that ends in .json"
        )
    batches = _number(own.batches)
    recipe = parse(rest, command="probe", own_options=_OPTIONS)
    if recipe.run.quiet:
        silence(recipe)
    trainer = build(recipe)
    try:
        check_probe(trainer, batches, own.answer_column)
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error
    result = probe(trainer, batches=batches, answer_column=own.answer_column)
    if trainer.accelerator.is_main_process:
        show(result)
        if own.json is not None:
            own.json.write_text(json.dumps(result.to_dict(), indent=1) + "\n")
    return int(result.verdict.outlook == DOES_NOT_LEARN)


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise UserError(
            f"--batches: expected a number of generation batches, got {text!r}; write --batches {_BATCHES}"
        ) from error
