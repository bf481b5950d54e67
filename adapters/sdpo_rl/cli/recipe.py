"""A recipe: everything about a run, from a YAML file and from options."""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml
from trl import GRPOConfig, ModelConfig, TrlParser

from ..config import SDPOConfig
from ..presets import training_arguments
from . import UserError, mistake

_DESCRIPTION = """\
--config FILE: a recipe, a YAML file with any of the fields below; options replace its values.
The fields follow in this order: those of a run (--dataset to --quiet), GRPOConfig, ModelConfig, SDPOConfig."""
# Readers of `datasets` by the ending of a file.
FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
# What TRL says of a batch that holds a part of a group; in other words, it is passed on as it is.
_PARTIAL_GROUPS = re.compile(
    r"generation_batch_size \((\d+)\) must be divisible by num_generations \((\d+)\)"
)


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The default of each field, and the lines of the description as they are written."""


@dataclass
class RunArguments:
    """What a run needs besides the fields of `GRPOConfig`, `ModelConfig` and `SDPOConfig`."""

    dataset: str | None = field(
        default=None, metadata={"help": "A hub id, or a file: .json, .jsonl, .csv, .parquet."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on, with eval_strategy."}
    )
    eval_dataset: str | None = field(default=None, metadata={"help": "As dataset, for the evaluation."})
    reward_funcs: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Reward functions, file.py:function or module:function; none: each row has a text."
        },
    )
    environment: str | None = field(
        default=None, metadata={"help": "An environment factory: file.py:name or module:name."}
    )
    tools: list[str] = field(
        default_factory=list, metadata={"help": "Tools of the model: file.py:function or module:function."}
    )
    teacher_prompt_func: str | None = field(
        default=None,
        metadata={"help": "Writes the teacher's prompt: file.py:function or module:function."},
    )
    preset: str | None = field(
        default=None,
        metadata={
            "help": "Settings of a paper (generalization, rich_feedback, test_time, opsd, sdft), or of recorded "
            "long runs (long_run)."
        },
    )
    unsloth: bool = field(
        default=False, metadata={"help": "Load the model with Unsloth, and train with its patched TRL."}
    )
    max_seq_length: int | None = field(
        default=None, metadata={"help": "With unsloth: tokens of the longest reprompt and its completion."}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Print configuration, two sampled rows and memory; train nothing."}
    )
    quiet: bool = field(default=False, metadata={"help": "No progress bar, warnings and errors only."})


class Recipe(NamedTuple):
    """The parsed parts of a run."""

    run: RunArguments
    training: GRPOConfig
    model: ModelConfig
    sdpo: SDPOConfig


class _Parser(TrlParser):
    """TRL's parser, whose errors are one line, without the usage of all fields before it."""

    def error(self, message: str) -> NoReturn:
        raise mistake(message)


def parse(arguments: Sequence[str], *, command: str = "train", own_options: Sequence[str] = ()) -> Recipe:
    """Options over the YAML file of ``--config`` over the preset over the defaults.

    Args:
        arguments: of the command, without its own.
        command: its name, for the help.
        own_options: lines of the help about options that only this command has.

    Raises:
        UserError: an unknown field, a bad value, a file that cannot be read.
    """
    parser = _Parser(
        (RunArguments, GRPOConfig, ModelConfig, SDPOConfig),
        prog=f"sdpo {command}",
        # In place of the list of all options, which is hundreds of lines before the help.
        usage=f"sdpo {command} --config recipe.yaml [--any_field value]",
        description="\n".join((*own_options, _DESCRIPTION)),
        formatter_class=_Help,
    )
    parser.add_argument("--config", help="a YAML file with any of these fields")
    known, _ = parser.parse_known_args(list(arguments))
    values = _read(known.config)
    _demand_lists(values)
    if (preset := known.preset or values.get("preset")) is not None:
        _set_defaults(parser, _preset(preset))
    if unknown := _set_defaults(parser, values):
        raise UserError(
            f"{known.config}: expected fields of GRPOConfig, ModelConfig, SDPOConfig or of the run, got "
            f"{', '.join(unknown)}; {_similar(parser, unknown)}"
        )
    for action in parser._actions:
        if action.dest == "config":
            parser._remove_action(action)
            del parser._option_string_actions["--config"]
            break
    kept = _without_config(arguments)
    if unused := parser.parse_known_args(kept)[1]:
        names = [value.partition("=")[0].lstrip("-") for value in unused if value.startswith("--")]
        raise UserError(
            "expected fields of GRPOConfig, ModelConfig, SDPOConfig or of the run, got "
            f"{' '.join(unused)}; {_similar(parser, names)}"
        )
    return Recipe(*_dataclasses(parser, kept))


def _similar(parser: TrlParser, names: Sequence[str]) -> str:
    """What to write instead of names that are no field."""
    known = [action.dest for action in parser._actions]
    found = {name: difflib.get_close_matches(name, known, n=1) for name in names}
    meant = [f"{match[0]} for {name}" for name, match in found.items() if match]
    return f"write {', '.join(meant)}, or see sdpo train --help" if meant else "sdpo train --help lists them"


def _dataclasses(parser: TrlParser, arguments: list[str]) -> tuple[Any, ...]:
    try:
        return tuple(parser.parse_args_into_dataclasses(args=arguments))
    except (ValueError, TypeError) as error:
        raise UserError(_with_a_fix(str(error))) from error


def _with_a_fix(message: str) -> str:
    """What `GRPOConfig` says of its values; where that names no remedy, with one."""
    # bf16=True is its default, and transformers' message does not name both options.
    if "bf16/gpu" in message:
        return f"{message.rstrip('.')}; without a GPU add --use_cpu true --bf16 false"
    if found := _PARTIAL_GROUPS.match(message):
        batch, group = map(int, found.groups())
        divisors = [str(size) for size in range(2, batch + 1) if batch % size == 0]
        one_of = " or ".join(filter(None, (", ".join(divisors[:-1]), *divisors[-1:])))
        fix = f"set {one_of}, or change" if divisors else "raise"
        return (
            f"num_generations: expected a divisor of {batch}, the completions of a generation batch, got {group}; "
            f"{fix} per_device_train_batch_size or gradient_accumulation_steps"
        )
    return message.rstrip(".")


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which also refuses a name that is written twice: the last value would win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in seen:
                raise yaml.YAMLError(f"{key.value} is in lines {seen[key.value]} and {line}")
            seen[key.value] = line
        return super().construct_mapping(node, deep)


def _read(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        values = yaml.load(Path(path).read_text(), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(
            f"--config: expected a YAML file, got {path!r} ({error}); correct the path or the file"
        ) from error
    if not isinstance(values, dict):
        raise UserError(
            f"--config: expected a mapping in {path}, got {type(values).__name__}; write name: value lines"
        )
    return values


def _demand_lists(values: dict[str, Any]) -> None:
    """Refuse one text for several: it would be read letter by letter."""
    for name in ("reward_funcs", "tools"):
        if isinstance(values.get(name), str):
            raise UserError(
                f"{name}: expected a list, got {values[name]!r}; write {name}: [{values[name]}] in the recipe"
            )


def _preset(name: str) -> dict[str, Any]:
    try:
        config = SDPOConfig.preset(name)
        arguments = training_arguments(name)
    except ValueError as error:
        raise UserError(str(error)) from error
    default = SDPOConfig()
    changed = {f.name: getattr(config, f.name) for f in fields(config)}
    return arguments | {k: v for k, v in changed.items() if v != getattr(default, k)}


def _set_defaults(parser: TrlParser, values: dict[str, Any]) -> list[str]:
    """Make these the defaults of the parser; the names that are no field."""
    known = {action.dest for action in parser._actions}
    parser.set_defaults_with_config(**{name: value for name, value in values.items() if name in known})
    return sorted(str(name) for name in set(values) - known)


def _without_config(arguments: Sequence[str]) -> list[str]:
    kept, skip = [], False
    for argument in arguments:
        if skip or argument == "--config" or argument.startswith("--config="):
            skip = argument == "--config"
            continue
        kept.append(argument)
    return kept


def load_object(where: str, what: str) -> Any:
    """What ``file.py:name``, ``module:name`` or ``module.name`` stands for.

    Raises:
        UserError: there is no such file, module or name.
    """
    source, _, name = where.rpartition(":") if ":" in where else where.rpartition(".")
    if not source:
        raise UserError(
            f"{what}: expected file.py:name or module:name, got {where!r}; say where it is defined"
        )
    if source.endswith(".py"):
        path = Path(source)
        if not path.is_file():
            raise UserError(f"{what}: expected a file, got {source!r}; there is none in {Path.cwd()}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # Found by the file's own imports, as when Python runs the file.
        sys.path.insert(0, str(path.parent.resolve()))
        sys.modules.setdefault(path.stem, module)
        spec.loader.exec_module(module)
    else:
        sys.path.insert(0, os.getcwd())
        try:
            module = importlib.import_module(source)
        except ModuleNotFoundError as error:
            if error.name is None or not source.startswith(error.name):
                raise
            raise UserError(
                f"{what}: expected a module, got {source!r}, which cannot be imported; pass file.py:name for a file"
            ) from error
    if not hasattr(module, name):
        names = sorted(
            key for key, value in vars(module).items() if callable(value) and not key.startswith("_")
        )
        raise UserError(f"{what}: expected a name of {source}, got {name!r}; it has {', '.join(names)}")
    return getattr(module, name)


def load_rows(where: str, split: str, config: str | None = None) -> Any:
    """A dataset from the hub or from a file.

    Raises:
        UserError: there is no such file, its ending is not known, or it cannot be read.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    path = Path(where)
    if path.suffix in FORMATS:
        if not path.is_file():
            raise UserError(f"dataset: expected a file or a hub id, got {where!r}; there is no such file")
        if path.stat().st_size == 0:
            raise UserError(f"dataset: expected rows, got the empty file {where!r}; write rows to it")
        try:
            return load_dataset(FORMATS[path.suffix], data_files=str(path), split="train")
        except DatasetGenerationError as error:
            raise UserError(
                f"dataset: expected {FORMATS[path.suffix]} rows, got {where!r}, which cannot be read "
                f"({error.__cause__ or error}); correct the file"
            ) from error
    if path.exists():
        raise UserError(
            f"dataset: expected a file that ends in {', '.join(FORMATS)}, got {where!r}; convert it"
        )
    try:
        return load_dataset(where, config, split=split)
    except (OSError, ValueError) as error:
        raise UserError(
            f"dataset: expected a hub id with the split {split!r}, got {where!r} ({error}); correct dataset, "
            "dataset_config or the split, or pass a file"
        ) from error
