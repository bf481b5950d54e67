"""Gradient checkpointing by torch's reentrant kind, where launching kernels takes longer than computing them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..step.call_cost import call_cost
from ..step.modules import all_modules

# Before, autocast reuses with gradients enabled the cast of a weight that it made under no_grad (pytorch#158232).
_AUTOCAST_IS_FIXED = torch.__version__ >= "2.11"


def may_be_reentrant(args: Any, accelerator: Any, model: Any) -> bool:
    """Whether layers may use the reentrant kind: it needs one process, no compilation and a user who chose no kind.

    Args:
        args: of the trainer; with `gradient_checkpointing_kwargs` the user chose the kind.
        accelerator: of the run. DDP, FSDP and DeepSpeed reduce gradients in hooks of the backward pass.
        model: the one that trains. Some adapters other than LoRA add hooks for the time of the model's forward,
            which are gone in the recomputation; only the non-reentrant kind raises an error then.
    """
    is_open = args.gradient_checkpointing and args.gradient_checkpointing_kwargs is None
    is_single = not args.torch_compile and accelerator.distributed_type == DistributedType.NO
    is_plain = all(config.peft_type == "LORA" for config in getattr(model, "peft_config", {}).values())
    return bool(is_open and is_single and _AUTOCAST_IS_FIXED and is_plain)


@contextmanager
def reentrant_checkpointing(model: Any) -> Iterator[None]:
    """The model with reentrant in place of non-reentrant checkpointing; its own is back afterwards.

    Both keep the input of a layer and compute the rest again in the backward pass. The non-reentrant kind, which is
    transformers' default, records the graph of the first forward as well, and calls four Python functions for each
    tensor that it would save. The reentrant kind runs that forward without a graph. But its backward pass reaches
    only the tensors among the positional arguments, and it computes the layer to its end, while the other kind
    stops at the last tensor that it needs. So a call stays non-reentrant if another argument may carry a gradient,
    or if it has enough tokens to keep a GPU busy (see `call_cost`). So does a layer with hooks in it, which would
    see a forward without a graph, and the gradients of one call at a time.
    """
    width = getattr(model.config.get_text_config(), "hidden_size", 0)
    max_numel = call_cost(model).min_tokens * width
    layers = [
        vars(module)
        for module in all_modules(model)
        if _is_default(vars(module).get("_gradient_checkpointing_func")) and not _has_hooks(module)
    ]
    originals = [each["_gradient_checkpointing_func"] for each in layers]
    try:
        for each, original in zip(layers, originals, strict=True):
            each["_gradient_checkpointing_func"] = functools.partial(_run, original, max_numel)
        yield
    finally:
        for each, original in zip(layers, originals, strict=True):
            each["_gradient_checkpointing_func"] = original


def _is_default(function: Any) -> bool:
    """Whether transformers made this function, without an option of the user."""
    return (
        type(function) is functools.partial
        and function.func is checkpoint
        and not function.args
        and function.keywords == {"use_reentrant": False}
    )


def _has_hooks(layer: nn.Module) -> bool:
    """Whether a user has put hooks on a module of a layer, or on a parameter of it."""
    return any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or any(
            parameter is not None and (parameter._backward_hooks or parameter._post_accumulate_grad_hooks)
            for parameter in module._parameters.values()
        )
        for module in all_modules(layer)
    )


def _run(original: Callable[..., Any], max_numel: float, call: Any, *args: Any) -> Any:
    """What `call(*args)` returns, checkpointed; reentrant where each input has fewer than `max_numel` elements."""
    sizes = [each.numel() for each in args if isinstance(each, Tensor) and each.requires_grad]
    others = [each for each in args if not isinstance(each, Tensor)]
    function = call
    if isinstance(call, functools.partial):  # a layer of transformers, whose other arguments are bound
        function = call.func
        others += [*call.args, *call.keywords.values()]
    # A function that is defined for the call may hold any tensor.
    is_layer = isinstance(getattr(function, "__self__", function), nn.Module)
    if is_layer and 0 < max(sizes, default=0) < max_numel and all(map(_has_no_gradient, others)):
        return checkpoint(call, *args, use_reentrant=True)
    return original(call, *args)


def _has_no_gradient(value: Any) -> bool:
    """Whether a value is known to carry none: a plain one, a tensor without a gradient, or a tuple of such."""
    if isinstance(value, Tensor):
        return not value.requires_grad
    return (
        value is None
        or isinstance(value, bool | int | float | str)
        or (type(value) in (tuple, list) and all(map(_has_no_gradient, value)))
    )
