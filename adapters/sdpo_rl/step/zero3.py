"""DeepSpeed's trace: the order of modules that it records under ZeRO-3, to gather weights ahead of their use."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Attribute of `parameter_offload`: the coordinator of forwards without gradients, which keeps their trace, and the
# root module's `ds_id` when it was last used.
_OWN = "_sdpo_coordinator"


@contextmanager
def own_trace(model: Any) -> Iterator[None]:
    """Give forwards without gradients a trace of their own if `model` is a DeepSpeed ZeRO-3 engine.

    DeepSpeed records the modules that run from the start of one forward to the start of the next. While that
    order repeats, it gathers the next modules' weights ahead of use; when the order differs, it drops the trace.
    A backward pass follows the student's forward but not the teacher's, so DeepSpeed would drop a shared trace in
    every step.
    """
    offload: Any = getattr(getattr(model, "optimizer", None), "parameter_offload", None)
    coordinator = getattr(offload, "param_coordinator", None)
    if coordinator is None or torch.is_grad_enabled():
        yield
        return
    own, root_id = getattr(offload, _OWN, (None, None))
    if own is None:
        own = copy.copy(coordinator)
        own._clear_trace_structures()  # the copy is shallow: this gives it lists of its own
    elif root_id != offload.module.ds_id and not own.is_invalid_trace():
        # TRL removes DeepSpeed's hooks for a generation; registering them again gives every module a new `ds_id`.
        own._invalidate_trace()
    setattr(offload, _OWN, (own, offload.module.ds_id))
    offload.param_coordinator = own
    try:
        yield
    finally:
        offload.param_coordinator = coordinator
