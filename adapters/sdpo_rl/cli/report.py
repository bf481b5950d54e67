"""`sdpo report`: a run, or two beside each other, as one HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..credit.report import credit_report
from . import Parser, UserError


def run(arguments: Sequence[str]) -> int:
    """Write the file; returns the exit code."""
    parser = Parser(
        prog="sdpo report",
        description="One HTML file about a run: its curves, and what the teacher said of each token.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the output_dir of a run")
    parser.add_argument("other", metavar="OTHER_RUN_DIR", nargs="?", help="a second run, shown beside it")
    parser.add_argument("--output", type=Path, help="default: sdpo_report.html in RUN_DIR")
    options = parser.parse_args(list(arguments))
    try:
        path = credit_report(options.run_dir, options.other, options.output)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    print(f"wrote {path}")
    return 0
