"""`sdpo train`: one run by a recipe; under `accelerate launch` on several GPUs.

sdpo train --config recipe.yaml --learning_rate 1e-5
accelerate launch -m sdpo_rl train --config recipe.yaml
"""

from __future__ import annotations

import dataclasses
import enum
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import transformers
import yaml
from trl import get_peft_config, get_quantization_config

from ..compat.vocabulary import check_vocabulary
from ..diagnose.probe.cost import stored_bytes
from ..diagnose.probe.result import stored
from ..trainer import SDPOTrainer
from . import UserError, show, unsloth
from .recipe import Recipe, load_object, load_rows, parse

_PREVIEW_ROWS = 2  # of a dry run


def run(arguments: Sequence[str]) -> int:
    """Train by a recipe; returns the exit code."""
    recipe = parse(arguments)
    if recipe.run.quiet:
        silence(recipe)
    trainer = build(recipe)
    main_process = trainer.accelerator.is_main_process
    if recipe.run.dry_run:
        shown = trainer.preview(_PREVIEW_ROWS)
        if main_process:
            print(f"{resolved(recipe)}\nPreview:\n")
            show(shown)
            print(f"\nMemory besides activations: {stored(*stored_bytes(trainer))}.")
            print(f"{len(trainer.train_dataset)} rows; nothing was trained (dry_run).")
        return 0
    if recipe.run.quiet:
        trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=checkpoint_choice(recipe.training.resume_from_checkpoint))
    trainer.save_model()
    if main_process:
        print(f"Saved to {trainer.args.output_dir}.")
    if recipe.training.push_to_hub:
        trainer.push_to_hub(dataset_name=recipe.run.dataset)
    return 0


def silence(recipe: Recipe) -> None:
    """Leave warnings and errors of what a run prints."""
    recipe.training.disable_tqdm = True
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("sdpo_rl").setLevel(logging.WARNING)


def build(recipe: Recipe) -> SDPOTrainer:
    """The trainer of a recipe.

    Raises:
        UserError: something is missing or cannot be loaded, or the trainer refuses a setting.
    """
    run, model = recipe.run, recipe.model
    if model.model_name_or_path is None:
        raise UserError(
            "model_name_or_path: expected a hub id or a folder, got nothing; add it to the recipe"
        )
    name = model.model_name_or_path
    # What begins like this is no hub id; the hub's own message says how to name a repository.
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise UserError(
            f"model_name_or_path: expected a hub id or a folder, got {name!r}, which is no folder; correct the path"
        )
    if run.dataset is None:
        raise UserError("dataset: expected a hub id or a file, got nothing; add it to the recipe")
    rewards = [load_object(where, "reward_funcs") for where in run.reward_funcs]
    extra: dict[str, Any] = {}
    if run.environment is not None:
        extra["environment_factory"] = load_object(run.environment, "environment")
    if run.tools:
        extra["tools"] = [load_object(where, "tools") for where in run.tools]
    if run.teacher_prompt_func is not None:
        extra["teacher_prompt_func"] = load_object(run.teacher_prompt_func, "teacher_prompt_func")
    if not run.unsloth:  # which may load another repository than that of the name
        _prepare_model(recipe)
    rows = load_rows(run.dataset, run.train_split, run.dataset_config)
    if run.eval_dataset is not None or run.eval_split is not None:
        extra["eval_dataset"] = load_rows(
            run.eval_dataset or run.dataset, run.eval_split or run.train_split, run.dataset_config
        )
    try:
        return SDPOTrainer(
            reward_funcs=rewards,
            args=recipe.training,
            train_dataset=rows,
            sdpo_config=recipe.sdpo,
            **_model_arguments(recipe),
            **extra,
        )
    except (ValueError, TypeError, OSError) as error:
        raise UserError(str(error)) from error


def _prepare_model(recipe: Recipe) -> None:
    """How the trainer loads the model, and what its configuration refuses before data or weights are read."""
    model = recipe.model
    recipe.training.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(recipe.training.model_init_kwargs or {}),
    }
    if (quantization := get_quantization_config(model)) is not None:
        recipe.training.model_init_kwargs["quantization_config"] = quantization
    k = recipe.sdpo.k if recipe.sdpo.enabled and recipe.sdpo.uses_topk else None
    try:
        check_vocabulary(k, model.model_name_or_path, recipe.training.model_init_kwargs)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error


def _model_arguments(recipe: Recipe) -> dict[str, Any]:
    """The model as the trainer takes it: a name with its adapters' configuration, or loaded by Unsloth."""
    model = recipe.model
    if recipe.run.unsloth:
        loaded, tokenizer = unsloth.load_model(recipe)
        return {"model": loaded, "processing_class": tokenizer}
    return {"model": model.model_name_or_path, "peft_config": get_peft_config(model)}


def resolved(recipe: Recipe) -> str:
    """The configuration as YAML: of `SDPOConfig` everything, of the others what is not a default."""
    parts = {"run": recipe.run, "GRPOConfig": recipe.training, "ModelConfig": recipe.model}
    text = []
    for title, part in parts.items():
        values = {
            item.name: _plain(value)
            for item in dataclasses.fields(part)
            if not _is_default(value := getattr(part, item.name), _default(item))
        }
        text.append(_section(f"{title}, without defaults", values))
    fields = dataclasses.fields(recipe.sdpo)
    text.append(
        _section("SDPOConfig", {item.name: _plain(getattr(recipe.sdpo, item.name)) for item in fields})
    )
    return "\n".join(text)


def _section(title: str, values: dict[str, Any]) -> str:
    return f"# {title}\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}"


def _is_default(value: Any, default: Any) -> bool:
    """Whether a value is the default of its field, or what `TrainingArguments` makes of that."""
    made = dataclasses.is_dataclass(value) and not isinstance(value, type) and value == type(value)()
    return made or _plain(value) in (default, [], {})


def _default(item: dataclasses.Field[Any]) -> Any:
    if item.default_factory is not dataclasses.MISSING:
        return _plain(item.default_factory())
    return _plain(item.default)


def _plain(value: Any) -> Any:
    """A value that YAML can hold: an enumeration's value, and the text of what it does not know."""
    if isinstance(value, enum.Enum):
        return value.value
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else str(value)


def checkpoint_choice(given: Any) -> Any:
    """What `train` resumes from: `True`, the last checkpoint, is a text on the command line.

    Examples:
        >>> checkpoint_choice("true"), checkpoint_choice("output/checkpoint-8"), checkpoint_choice(None)
        (True, 'output/checkpoint-8', None)
    """
    return True if str(given).lower() == "true" else given
