"""DeepSpeed's trace: the order of modules that it records under ZeRO-3, to gather weights ahead of their use."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_OWN = "_sdpo_coordinator"  # an attribute of DeepSpeed's object: the second coordinator, and a number of its hooks


@contextmanager
def own_trace(model: Any) -> Iterator[None]:
    """Forwards without a gradient, if `model` is an engine of DeepSpeed's ZeRO-3, have a trace of their own.

    DeepSpeed records the modules that run between the starts of two forwards. While they run in that order again,
    it gathers the weights of the next ones ahead; at another order it drops the trace. The teacher's forward ends
    where the student's goes on with its backward pass, so with one trace for both it would drop it in every step.
    """
    offload: Any = getattr(getattr(model, "optimizer", None), "parameter_offload", None)
    coordinator = getattr(offload, "param_coordinator", None)
    if coordinator is None or torch.is_grad_enabled():
        yield
        return
    own, numbers = getattr(offload, _OWN, (None, None))
    if own is None:
        own = copy.copy(coordinator)
        own._clear_trace_structures()  # otherwise both would record into one list
    elif numbers != offload.module.ds_id and not own.is_invalid_trace():
        # TRL removes DeepSpeed's hooks for a generation. Those registered afterwards give modules other numbers.
        own._invalidate_trace()
    setattr(offload, _OWN, (own, offload.module.ds_id))
    offload.param_coordinator = own
    try:
        yield
    finally:
        offload.param_coordinator = coordinator
