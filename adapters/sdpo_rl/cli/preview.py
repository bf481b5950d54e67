"""`sdpo preview`: what student and teacher of a recipe read, before anything is trained.

sdpo preview --config recipe.yaml --rows 6
accelerate launch -m sdpo_rl preview --config recipe.yaml
"""

from __future__ import annotations

from collections.abc import Sequence

from ..diagnose.preview import check_rows
from . import Parser, UserError, show
from .recipe import parse
from .train import build, silence

_ROWS = 4


def run(arguments: Sequence[str]) -> int:
    """Print rows of a generation batch; returns the exit code."""
    parser = Parser(prog="sdpo preview", add_help=False, allow_abbrev=False)
    parser.add_argument("--rows", default=str(_ROWS))
    own, rest = parser.parse_known_args(list(arguments))
    rows = _number(own.rows)
    recipe = parse(
        rest, command="preview", own_options=[f"--rows N: how many rows to show, {_ROWS} by default"]
    )
    if recipe.run.quiet:
        silence(recipe)
    trainer = build(recipe)
    try:
        check_rows(trainer, rows)
    except ValueError as error:
        raise UserError(str(error).replace("n:", "--rows:", 1)) from error
    shown = trainer.preview(rows)
    if trainer.accelerator.is_main_process:
        show(shown)
    return 0


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise UserError(f"--rows: expected a number of rows, got {text!r}; write --rows {_ROWS}") from error
