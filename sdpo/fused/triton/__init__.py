"""Triton kernels of the fused loss. Importing this package imports no Triton: the kernels load at first use."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

from sdpo.fused._types import GradLogits, ModelChunk, Objective, TokenInputs

MAX_K = 1024


def missing(device: torch.device, working: torch.dtype, objective: Objective) -> str | None:
    """Why the kernels cannot run here; None if they can.

    On a CPU they run in Triton's interpreter, if TRITON_INTERPRET=1 is set before Triton is imported.
    """
    if not _is_installed():
        return "triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != ("cpu" if interpreted else "cuda"):
        return f"the tensors are on {device} and TRITON_INTERPRET is {'set' if interpreted else 'not set'}"
    if working != torch.float32:
        return f"the kernels compute in float32, not in {working}"
    if objective.k is not None and objective.k > MAX_K:
        return f"the kernels choose at most {MAX_K} tokens, not {objective.k}"
    return None


def chunk_loss(
    student: ModelChunk,
    teacher: ModelChunk,
    tokens: TokenInputs,
    objective: Objective,
    stats: Tensor,
    grad_logits: GradLogits | None,
) -> None:
    """The loss of one chunk, as ``sdpo.fused._torch.chunk_loss``."""
    from sdpo.fused.triton import _launch

    _launch.chunk_loss(student, teacher, tokens, objective, stats, grad_logits)


def scaled(values: Tensor, factor: Tensor) -> Tensor:
    """``values * factor`` for a factor [] of any dtype, in the dtype of ``values``.

    torch multiplies a bf16 tensor by a float32 scalar at a quarter of a GPU's bandwidth, and a bf16 scalar has
    no digits to spare.
    """
    if values.dtype == factor.dtype or values.numel() == 0 or not _runs_on(values):
        return values * factor
    from sdpo.fused.triton import _elementwise

    return _elementwise.scaled(values, factor)


def joined(parts: Tensor, gain: Tensor | None, out: Tensor) -> Tensor:
    """``gain[:, None] * parts.sum(0)`` into out [c, D] of any dtype; parts [n, c, D] float32, gain [c]."""
    if not _runs_on(parts) or not out.is_contiguous():
        total = parts.sum(dim=0)
        return out.copy_(total if gain is None else total.mul_(gain[:, None]))
    from sdpo.fused.triton import _elementwise

    return _elementwise.joined(parts, gain, out)


def _runs_on(tensor: Tensor) -> bool:
    return tensor.is_cuda and _is_installed()


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
