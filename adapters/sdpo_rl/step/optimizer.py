"""Optimizer steps that change nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.hooks import RemovableHandle


def drop_gradients(optimizer: Any, *, unless: Callable[[], bool]) -> RemovableHandle:
    """From now on, steps of an optimizer for which `unless()` is false find no gradient.

    PyTorch's optimizers skip a parameter whose gradient is None: its weights, moments and step count stay. With a
    gradient of 0 they would go on moving the weights by momentum and weight decay.

    The gradients are removed within the step of the innermost optimizer. So their norm, the loss scaling of fp16
    and the reductions over processes are those of any step, and it works where DeepSpeed steps in its backward
    pass. An optimizer that steps without `step()`, in hooks of the backward pass (LOMO, layer-wise GaLore), is not
    affected.

    Args:
        optimizer: one of PyTorch's interface, or what Accelerate or DeepSpeed wrapped around it.
        unless: called at the begin of a step.

    Returns:
        A handle whose `remove()` ends it.

    Examples:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.SGD([weight], lr=0.5, weight_decay=1.0)
        >>> handle = drop_gradients(optimizer, unless=lambda: False)
        >>> weight.grad = torch.zeros(1)
        >>> optimizer.step()
        >>> weight.item()
        1.0
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer

    def remove(stepping: Any, *_: Any) -> None:
        if unless():
            return
        for group in stepping.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    handle: RemovableHandle = optimizer.register_step_pre_hook(remove)
    return handle
