"""Unsloth from a recipe: TRL is patched before anything imports it, then Unsloth loads the model."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import Parser, UserError

if TYPE_CHECKING:
    from .recipe import Recipe

# The linear layers of a decoder, for `lora_target_modules: all-linear` or nothing.
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def patch_if_asked(arguments: Sequence[str]) -> None:
    """Patch TRL if the options or the recipe say ``unsloth: true``; to be called before TRL is imported.

    Raises:
        UserError: Unsloth is not installed.
    """
    if not _asked(arguments):
        return
    if find_spec("unsloth") is None:
        raise UserError(
            'unsloth: expected the package unsloth, which is not installed; pip install "sdpo-rl[unsloth]", or '
            "remove unsloth: true"
        )
    from unsloth import FastLanguageModel, PatchFastRL

    PatchFastRL("GRPO", FastLanguageModel)


def _asked(arguments: Sequence[str]) -> bool:
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--unsloth", nargs="?", const="true")
    parser.add_argument("--config")
    known, _ = parser.parse_known_args(list(arguments))
    if known.unsloth is not None:
        return _is_true(known.unsloth)
    return known.config is not None and _in_file(Path(known.config))


def _in_file(path: Path) -> bool:
    """What a file says of `unsloth`; a file that cannot be read is refused later, where recipes are parsed."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    return isinstance(values, dict) and _is_true(values.get("unsloth"))


def _is_true(value: object) -> bool:
    """As the parser of options reads it, so that a quoted value means the same here."""
    return str(value).lower() in ("true", "yes", "y", "t", "1")


def load_model(recipe: Recipe) -> tuple[Any, Any]:
    """Model with adapters, and tokenizer, both by Unsloth.

    Raises:
        UserError: the recipe asks for what Unsloth's loader does not do.
    """
    model, length = recipe.model, recipe.run.max_seq_length
    if length is None:
        raise UserError(
            "max_seq_length: expected a number of tokens with unsloth, got nothing; add the length of the longest "
            "reprompt and its completion, for example max_seq_length: 4096"
        )
    if not model.use_peft:
        raise UserError(
            "use_peft: expected true with unsloth, got false; Unsloth's adapters are LoRA: add it"
        )
    if model.use_dora:
        raise UserError("use_dora: expected false with unsloth, got true; Unsloth's adapters are plain LoRA")
    import torch
    from unsloth import FastLanguageModel

    targets = model.lora_target_modules
    loaded, tokenizer = FastLanguageModel.from_pretrained(
        model.model_name_or_path,
        max_seq_length=length,
        dtype=None if model.dtype in ("auto", None) else getattr(torch, model.dtype),
        load_in_4bit=model.load_in_4bit,
        load_in_8bit=model.load_in_8bit,
        revision=model.model_revision,
        trust_remote_code=recipe.training.trust_remote_code,
    )
    adapted = FastLanguageModel.get_peft_model(
        loaded,
        r=model.lora_r,
        lora_alpha=model.lora_alpha,
        lora_dropout=model.lora_dropout,
        target_modules=ALL_LINEAR if targets in (None, "all-linear", ["all-linear"]) else targets,
        modules_to_save=model.lora_modules_to_save,
        use_rslora=model.use_rslora,
        use_gradient_checkpointing="unsloth" if recipe.training.gradient_checkpointing else False,
        random_state=recipe.training.seed,
    )
    return adapted, tokenizer
