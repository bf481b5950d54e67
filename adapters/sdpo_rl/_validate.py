"""Validation of a trainer's arguments, before a token is generated."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import math
import os
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from itertools import islice
from typing import Any

import torch

from .config import SDPOConfig
from .presets import PRESETS, preset_settings
from .rollout.checks import MEDIA, ROWS_CHECKED, check_rendered, holds_media, refuse_media
from .rollout.feedback import check_column, column_name
from .rollout.prompts import check_prompts
from .rollout.rendered import RenderedPrompts

POLICY_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
_TEMPLATES = ("reprompt_template", "solution_template", "feedback_template", "success_feedback_template")
# Names in other trainers, where the nearest name would mislead.
_OTHER_NAMES = {
    "config": "sdpo_config (for an SDPOConfig) or args (for a GRPOConfig)",
    "dataset": "train_dataset",
    "grpo_config": "args",
    "training_args": "args",
    "tokenizer": "processing_class",
    "processor": "processing_class",
}
# Options of `GRPOConfig` that add to GRPO's loss: the value that turns one off, and what it adds. They are refused
# without a part of the loss that is GRPO's.
_OF_POLICY: dict[str, tuple[Any, str]] = {
    "beta": (0.0, "a KL penalty (that of SDPO's part is SDPOConfig.anchor_weight)"),
    "entropy_coef": (0.0, "an entropy bonus"),
    "use_adaptive_entropy": (False, "an entropy bonus"),
    "top_entropy_quantile": (1.0, "a loss on the tokens of highest entropy alone"),
    "off_policy_mask_threshold": (None, "a mask of off-policy rows"),
    "importance_sampling_level": ("token", "importance weights of whole sequences"),
    "delta": (None, "a second bound of the importance weights (here there is one, SDPOConfig.is_clip)"),
}


def check_construction(args: Any, config: SDPOConfig, keywords: Mapping[str, Any], *, trainer: type) -> None:
    """Everything but the model that can be checked before the trainer is built.

    Args:
        args: the GRPOConfig.
        config: the SDPOConfig; with `enabled=False` only types and keywords are checked.
        keywords: the other arguments, by name.
        trainer: the class below SDPOTrainer.
    """
    check_keywords(keywords, trainer, own=("sdpo_config", "teacher_prompt_func"))
    if not isinstance(config, SDPOConfig):
        raise TypeError(f"sdpo_config: expected an SDPOConfig, got {type(config).__name__}; make one")
    check_arguments(args)
    if not config.enabled:
        return
    check_sampling(args, config)
    check_objective(args, config)
    if config.has_policy_loss:
        check_policy(args, config)
    if keywords.get("environment_factory") is None:  # an environment may return the prompts itself
        check_dataset(keywords.get("train_dataset"), "train_dataset")
        check_dataset(keywords.get("eval_dataset"), "eval_dataset")
    check_sizes(args, keywords.get("train_dataset"), keywords.get("eval_dataset"))
    check_tokenizer(keywords.get("processing_class"))


def check_teacher_prompt_func(function: Any, config: SDPOConfig) -> None:
    """It is a function or `None`, and no template is set beside it but by a preset: nothing would read it."""
    if function is None:
        return
    if not callable(function):
        raise TypeError(
            f"teacher_prompt_func: expected a function from an sdpo_rl.Attempt to a prompt, got "
            f"{type(function).__name__}; pass one, such as lambda attempt: attempt.columns['teacher_prompt']"
        )
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name in _TEMPLATES:
        known = {defaults[name], *(preset_settings(preset).get(name) for preset in PRESETS)}
        if (value := getattr(config, name)) not in known:
            raise ValueError(
                f"{name}: expected its default with teacher_prompt_func, which writes the whole prompt, got "
                f"{value!r}; remove one of the two"
            )


def check_model(model: Any) -> None:
    """The model is a model or the name of one."""
    if not isinstance(model, str) and not hasattr(model, "config"):
        raise TypeError(f"model: expected a model or a model's name, got {type(model).__name__}; load one")


def check_not_compiled(model: Any) -> None:
    """The model is not one that `torch.compile` returned, whose modules take no hooks once they are traced."""
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            f"model: expected a model, got the {type(model).__name__} that torch.compile made of one; pass the "
            "model itself, and set GRPOConfig(torch_compile=True)"
        )


def check_prefixes(args: Any, model: Any, peft_config: Any) -> None:
    """No gradient checkpointing with prefix tuning, whose keys and values a checkpointed layer does not get."""
    configs = [*getattr(model, "peft_config", {}).values(), *([] if peft_config is None else [peft_config])]
    kinds = [kind for kind in ("PREFIX_TUNING", "CARTRIDGE") if any(c.peft_type == kind for c in configs)]
    if kinds and args.gradient_checkpointing:
        raise ValueError(
            f"gradient_checkpointing: expected False with {kinds[0]}, whose keys and values a layer with "
            "checkpointing does not get, got True; set GRPOConfig(gradient_checkpointing=False), or use LoRA"
        )


def check_dataset(dataset: Any, name: str) -> None:
    """A dataset has rows, prompts of text that the model answers, feedback that is text, no media.

    Of a dataset without a length only the columns are checked, where they are known.
    """
    if dataset is None:
        return
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            check_dataset(part, f"{name}[{key!r}]")
        return
    has_length = hasattr(dataset, "__len__")
    if has_length and len(dataset) == 0:
        raise ValueError(f"{name}: expected at least one row with a 'prompt', got an empty dataset; add rows")
    columns = getattr(dataset, "column_names", None)
    if columns is None:
        return
    if "prompt" not in columns:
        raise ValueError(
            f"{name}: expected a column 'prompt', got {columns}; rename the column of the prompts"
        )
    if not has_length:
        return
    try:
        check_prompts(list(islice(dataset["prompt"], ROWS_CHECKED)))
        if feedback := column_name(columns):
            check_column(islice(dataset[feedback], ROWS_CHECKED), feedback)
        refuse_media(
            media
            for media in MEDIA
            if media in columns and any(map(holds_media, islice(dataset[media], ROWS_CHECKED)))
        )
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error


def check_sizes(args: Any, train_dataset: Any, eval_dataset: Any) -> None:
    """A dataset with a length has enough prompts for one batch, without which nothing would run."""
    batch, group = getattr(args, "generation_batch_size", None), getattr(args, "num_generations", None)
    if batch and group and hasattr(train_dataset, "__len__") and len(train_dataset) < batch // group:
        raise ValueError(
            f"train_dataset: expected at least {batch // group} prompts, those of one generation batch "
            f"(generation_batch_size={batch} / num_generations={group}), got {len(train_dataset)}, with which no "
            "step would run; add prompts, raise num_generations, or lower per_device_train_batch_size, "
            "steps_per_generation or gradient_accumulation_steps"
        )
    if not args.dataloader_drop_last:
        return
    rows = args.per_device_eval_batch_size * args.world_size
    group = getattr(args, "num_generations_eval", None) or group
    parts = eval_dataset if isinstance(eval_dataset, dict) else {None: eval_dataset}
    for key, part in parts.items():
        if group and hasattr(part, "__len__") and len(part) * group < rows:
            name = "eval_dataset" if key is None else f"eval_dataset[{key!r}]"
            raise ValueError(
                f"{name}: expected at least {-(-rows // group)} prompts, those of one batch "
                f"({rows} completions, {group} per prompt), got {len(part)}, which dataloader_drop_last=True "
                "leaves out; add prompts, lower per_device_eval_batch_size, or set dataloader_drop_last=False"
            )


def check_batches_seen(name: str, batches: int) -> None:
    """A pass over data, also over data without a length, had a batch."""
    if batches == 0:
        raise ValueError(
            f"{name}: expected enough prompts for one batch, got a pass without any; add prompts, or lower the "
            "batch size (a generation batch, and any batch with dataloader_drop_last=True, is left out if it "
            "is not full)"
        )


def check_rendered_dataset(
    dataset: Any, name: str, rendered: RenderedPrompts | None, config: SDPOConfig
) -> None:
    """`check_rendered` of the first prompts of a map-style dataset, or of each in a dict of them."""
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            check_rendered_dataset(part, f"{name}[{key!r}]", rendered, config)
        return
    if "prompt" not in (getattr(dataset, "column_names", None) or ()) or not hasattr(dataset, "__len__"):
        return
    try:
        check_rendered(list(islice(dataset["prompt"], ROWS_CHECKED)), rendered, config)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def check_tokenizer(processing_class: Any) -> None:
    """Batches are padded with the pad token, or, as in TRL, with the end-of-sequence token."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    names = ("pad_token", "eos_token")
    if tokenizer is not None and all(getattr(tokenizer, name, None) is None for name in names):
        raise ValueError(
            "processing_class: expected a tokenizer with a pad token or an end-of-sequence token, got neither; "
            "set `tokenizer.pad_token`"
        )


def check_keywords(keywords: Iterable[str], trainer: type, own: Iterable[str]) -> None:
    """Every keyword is one of SDPOTrainer's `own`, or one that `trainer`, its base class, accepts."""
    accepted = set(own)
    # A constructor with **kwargs passes the rest on to the next one.
    for constructor in (vars(cls)["__init__"] for cls in trainer.__mro__ if "__init__" in vars(cls)):
        parameters = inspect.signature(constructor).parameters.values()
        accepted |= {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    for name in keywords:
        if name not in accepted:
            nearest = _OTHER_NAMES.get(name) or next(iter(get_close_matches(name, accepted, n=1)), None)
            expected = nearest or f"one of {sorted(accepted - {'self'})}"
            raise TypeError(
                f"SDPOTrainer: expected {expected}, got the keyword {name!r}; rename or remove it"
            )


def check_arguments(args: Any) -> None:
    """`args` is a `GRPOConfig`."""
    if not hasattr(args, "num_generations"):
        raise TypeError(
            f"args: expected a GRPOConfig, got {type(args).__name__}; the order is "
            "SDPOTrainer(model, reward_funcs, args, train_dataset)"
        )


def check_sampling(args: Any, config: SDPOConfig) -> None:
    """Whole groups in a generation batch, with enough completions to show, sampled at a temperature above 0."""
    batch, group = getattr(args, "generation_batch_size", None), getattr(args, "num_generations", None)
    if batch and group and batch % group:
        raise ValueError(
            f"generation_batch_size: expected a multiple of num_generations ({group}), got {batch}; change one of "
            "per_device_train_batch_size, gradient_accumulation_steps or num_generations"
        )
    if group:
        peers = group - 1 if config.dont_reprompt_on_self_success else group
        if config.num_demonstrations > peers:
            raise ValueError(
                f"num_demonstrations: expected at most {peers}, of {group} completions of a prompt, got "
                f"{config.num_demonstrations}; lower it, or raise num_generations"
            )
    if not 0 < args.temperature < math.inf:
        raise ValueError(
            f"temperature: expected a finite number > 0, got {args.temperature}; logits are divided by it, and "
            "greedy completions of one prompt are all alike: set 1.0"
        )


def check_backend(config: SDPOConfig, device: torch.device) -> None:
    """The Triton kernels, if they are asked for, run on the device."""
    if config.loss_backend != "triton":
        return
    problem = ""
    if importlib.util.find_spec("triton") is None:
        problem = "triton is not installed"
    elif device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        problem = "the model is on a CPU, where they run with TRITON_INTERPRET=1 alone"
    if problem:
        raise ValueError(
            f"loss_backend: expected a backend that can run here, got 'triton', but {problem}; set it to 'auto'"
        )


def check_rows_alone(args: Any, model: Any, *, mode: str) -> None:
    """Batches of one row, for a model that reads padding on several processes, all of which call it together."""
    name = f"per_device_{mode}_batch_size"
    if (size := getattr(args, name)) > 1:
        raise ValueError(
            f"{name}: expected 1, got {size}; {type(model).__name__} reads the padding before a row, and on "
            "several processes the rows of a batch cannot run separately: set it to 1"
        )


def check_objective(args: Any, config: SDPOConfig) -> None:
    """Without GRPO's part no option asks for a term or a mask that this loss does not have."""
    if config.has_policy_loss:
        return
    for name, (off, what) in _OF_POLICY.items():
        value = getattr(args, name, off)
        if value not in (off, None):
            raise ValueError(
                f"{name}: expected {off!r}, got {value!r}, {what}, which the self-distillation loss does not have; "
                f"set {name}={off!r}, SDPOConfig(grpo_weight=...) for a part that has it, or "
                "SDPOConfig(enabled=False)"
            )


def check_policy(args: Any, config: SDPOConfig) -> None:
    """GRPO's part of the loss can be computed per token, over steps whose tokens are known when they begin."""
    if args.loss_type not in POLICY_LOSS_TYPES:
        raise ValueError(
            f"loss_type: expected one of {POLICY_LOSS_TYPES} for GRPO's part of the loss, got {args.loss_type!r}; "
            "set one of them"
        )
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    if args.loss_type == "cispo" and high < 1.0:
        raise ValueError(
            f"epsilon_high: expected at least 1 with loss_type='cispo', whose largest ratio it is, got {high}; "
            "set it to 5.0, for example"
        )
    level = getattr(args, "importance_sampling_level", "token")
    if level not in ("token", "sequence"):
        raise ValueError(
            f"importance_sampling_level: expected 'token' or 'sequence', got {level!r}; set one of them"
        )
    delta = getattr(args, "delta", None)
    if delta is not None and not delta > 0.0:
        raise ValueError(
            f"delta: expected a number > 0, the largest ratio, or None, got {delta}; set it to 4.0"
        )
    quantile = getattr(args, "top_entropy_quantile", 1.0)
    if not 0.0 <= quantile <= 1.0:
        raise ValueError(
            f"top_entropy_quantile: expected a number in [0, 1], got {quantile}; set the share of the tokens that "
            "keep their policy loss, 1.0 for all"
        )
    generate_every, accumulation = (
        args.steps_per_generation * args.num_iterations,
        args.gradient_accumulation_steps,
    )
    if generate_every % accumulation:
        raise ValueError(
            f"steps_per_generation: expected a multiple of gradient_accumulation_steps ({accumulation}) with "
            f"GRPO's part of the loss, got {args.steps_per_generation}; the divergence's denominator of a step "
            "over several generation batches is known only at its end: change one of the two"
        )


def check_reward_functions(reward_funcs: Any) -> None:
    """Every reward is a callable, a reward model or a model's name; there may be none at all."""
    if reward_funcs is None:
        return
    for index, reward in enumerate(reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]):
        if not isinstance(reward, str) and not callable(reward):
            raise TypeError(
                f"reward_funcs[{index}]: expected a function, a reward model or a model's name, got "
                f"{type(reward).__name__}; the order is SDPOTrainer(model, reward_funcs, args, train_dataset)"
            )
