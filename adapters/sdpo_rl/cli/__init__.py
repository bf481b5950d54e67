"""The command line `sdpo`: one module for each command.

    train     train by a recipe, a YAML file (`train`, and `recipe` for what it may hold)
    preview   show what student and teacher of a recipe read, before training
    probe     measure before training whether the model can teach itself
    init      write a recipe and a reward file to start from
    report    a run as one HTML file
    doctor    check the installation

A user's mistake ends a command with one line on standard error and the exit code 2; a failed check with 1, Ctrl-C
with 130. A reader of the output that has enough, such as `head`, ends it without a word.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

_COMMANDS = {
    "train": "train by a recipe: sdpo train --config recipe.yaml [--any_field value]",
    "preview": "what student and teacher read: sdpo preview --config recipe.yaml [--rows N]",
    "probe": "whether the model can teach itself: sdpo probe --config recipe.yaml [--json FILE]",
    "init": "write a recipe and a reward file to start from",
    "report": "a run, or two, as one HTML file: curves, and the teacher on each token",
    "doctor": "check versions, GPU and known conflicts of the installation",
}
# What the extra `peft` installs.
_EXTRA = ("trl", "transformers", "accelerate", "datasets", "peft", "yaml", "jinja2")


class UserError(Exception):
    """A mistake in the arguments or the recipe; the message says what to change."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        """Refuse what cannot be parsed."""
        raise mistake(message)


def mistake(message: str) -> UserError:
    """What a parser says of an argument that it cannot parse, with what to do.

    Args:
        message: argparse's.
    """
    return UserError(f"{message}; correct it, or see --help")


def show(text: object) -> None:
    """Print a text, in a terminal that cannot show one of its characters with the escape of that character.

    Args:
        text: what to print.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    print(text)


def _leave_process_group() -> None:
    """The end of one process of several.

    A process that ends while gloo's threads still hold tensors of its last reduction aborts.
    """
    accelerate = sys.modules.get("accelerate")  # not imported by the commands without a trainer
    if accelerate is not None and accelerate.PartialState().num_processes > 1:
        accelerate.PartialState().wait_for_everyone()
        accelerate.PartialState().destroy_process_group()


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments; `None`: those of the process.

    Returns:
        The exit code: 0, 1 for a check that failed, 2 for a mistake in the arguments or the recipe, 130 for
        Ctrl-C.
    """
    parser = Parser(
        prog="sdpo",
        description="Self-Distillation Policy Optimization for TRL.",
        epilog="\n".join(f"  {name:8} {text}" for name, text in _COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the versions of both packages")
    parser.add_argument("command", nargs="?", choices=_COMMANDS, metavar="command", help="one of those below")
    arguments = sys.argv[1:] if argv is None else list(argv)
    # What follows the command is the command's own.
    split = next((i + 1 for i, value in enumerate(arguments) if value in _COMMANDS), len(arguments))
    try:
        options = parser.parse_args(arguments[:split])
    except UserError as error:
        print(f"sdpo: {error}", file=sys.stderr)
        return 2
    if options.version:
        import sdpo
        import sdpo_rl

        print(f"sdpo {sdpo.__version__}, sdpo_rl {sdpo_rl.__version__}")
        return 0
    if options.command is None:
        parser.print_help()
        return 2
    try:
        # Before a command imports TRL.
        importlib.import_module(".unsloth", __name__).patch_if_asked(arguments[split:])
        run = importlib.import_module(f".{options.command}", __name__).run
        code = int(run(arguments[split:]))
        sys.stdout.flush()
        _leave_process_group()
        return code
    except KeyboardInterrupt:
        hint = ""
        if options.command == "train":
            hint = (
                "; with --resume_from_checkpoint true the same command continues from the last checkpoint, "
                "without it the run and its log begin anew"
            )
        print(f"sdpo {options.command}: interrupted{hint}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Python would write again when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UserError as error:
        # Messages of YAML and of the hub have several lines.
        message = " ".join(line.strip() for line in str(error).splitlines())
        print(f"sdpo {options.command}: {message}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _EXTRA:
            raise
        print(
            f'sdpo {options.command}: it needs {error.name}, which is not installed; pip install "sdpo-rl[peft]"',
            file=sys.stderr,
        )
        return 2
