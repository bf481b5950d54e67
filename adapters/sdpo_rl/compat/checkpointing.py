"""Reentrant gradient checkpointing for calls in which launching kernels takes longer than running them."""

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

# Before torch 2.11, autocast could reuse a weight's cast made under no_grad, and the weight got no gradient
# (pytorch#158232).
_AUTOCAST_IS_FIXED = torch.__version__ >= "2.11"


def may_be_reentrant(args: Any, accelerator: Any, model: Any) -> bool:
    """Whether the kind is left open, and reentrant checkpointing safe: one process, no compilation, at most LoRA.

    Args:
        args: of the trainer; with `gradient_checkpointing_kwargs` the user chose the kind.
        accelerator: of the run. DDP, FSDP and DeepSpeed reduce gradients in backward hooks, which the nested
            backward passes of reentrant checkpointing may run too early.
        model: the one that trains. Some adapters other than LoRA register hooks only during the model's forward,
            so that the recomputation runs without them. Non-reentrant checkpointing can detect this and raise an
            error.
    """
    is_open = args.gradient_checkpointing and args.gradient_checkpointing_kwargs is None
    is_single = accelerator.distributed_type == DistributedType.NO and args.n_gpu <= 1  # no nn.DataParallel
    is_lora_or_full = all(config.peft_type == "LORA" for config in getattr(model, "peft_config", {}).values())
    return bool(is_open and is_single and not args.torch_compile and is_lora_or_full and _AUTOCAST_IS_FIXED)


@contextmanager
def reentrant_checkpointing(model: Any) -> Iterator[None]:
    """Switch the model to reentrant checkpointing inside the context, and restore its own functions afterwards.

    Both kinds save the inputs of a layer and recompute its activations in the backward pass. Non-reentrant
    checkpointing, the default of transformers 5, also builds the autograd graph in the first forward and runs
    Python hooks for each tensor that is saved. Reentrant checkpointing runs the first forward under no_grad, which
    costs the host less time. But it passes gradients only to parameters and to tensors given directly as positional
    arguments, and it always recomputes the whole layer, where the non-reentrant kind stops early. So a call stays
    non-reentrant if another argument may need a gradient, or if it has enough tokens to keep a GPU busy (see
    `call_cost`). A layer with hooks stays non-reentrant, too: forward hooks would see tensors without a graph, and
    parameter hooks the gradient of each call instead of the sum.
    """
    width = getattr(model.config.get_text_config(), "hidden_size", 0)
    max_numel = call_cost(model).min_tokens * width
    name = "_gradient_checkpointing_func"
    layers = [
        module
        for module in all_modules(model)
        if _is_default(vars(module).get(name)) and not _has_hooks(module)
    ]
    originals = [vars(layer)[name] for layer in layers]
    try:
        for layer, original in zip(layers, originals, strict=True):
            vars(layer)[name] = functools.partial(_run, original, max_numel)
        yield
    finally:
        for layer, original in zip(layers, originals, strict=True):
            vars(layer)[name] = original


def _is_default(function: Any) -> bool:
    """Whether this is the function that transformers sets by default."""
    return (
        type(function) is functools.partial
        and function.func is checkpoint
        and not function.args
        and function.keywords == {"use_reentrant": False}
    )


def _has_hooks(layer: nn.Module) -> bool:
    """Whether a module of the layer, or a parameter in it, has hooks."""
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
    """`call(*args)`, checkpointed: reentrant if inputs that require gradients have fewer than `max_numel` elements.

    Nothing else that it is given may need a gradient; otherwise `original` does it.
    """
    sizes = [each.numel() for each in args if isinstance(each, Tensor) and each.requires_grad]
    others = [each for each in args if not isinstance(each, Tensor)]
    function = call
    if isinstance(call, functools.partial):  # transformers binds the keyword arguments of a layer
        function = call.func
        others += [*call.args, *call.keywords.values()]
    # A closure may capture a tensor that requires a gradient.
    is_layer = isinstance(getattr(function, "__self__", function), nn.Module)
    if is_layer and 0 < max(sizes, default=0) < max_numel and all(map(_has_no_gradient, others)):
        return checkpoint(call, *args, use_reentrant=True)
    return original(call, *args)


def _has_no_gradient(value: Any) -> bool:
    """Whether a value surely needs none: a plain one, a tensor that requires none, or a tuple or list of such."""
    if isinstance(value, Tensor):
        return not value.requires_grad
    return (
        value is None
        or isinstance(value, bool | int | float | str)
        or (type(value) in (tuple, list) and all(map(_has_no_gradient, value)))
    )
