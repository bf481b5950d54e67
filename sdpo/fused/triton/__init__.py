"""Triton kernels of the fused loss. Importing this package imports no Triton: the kernels load at first use."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

from sdpo.fused._types import UNSCALED_GRAD_DTYPE, GradLogits, Objective, Project, ProjectTeacher, TokenInputs

# The blocks of a wider support would not fit the registers of one program.
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
        return f"the kernels select at most {MAX_K} tokens, not {objective.k}"
    return None


def can_share_buffer(objective: Objective, grad_dtype: torch.dtype) -> bool:
    """Whether both models' products may share a buffer: those computed first are reduced before the others exist.

    With support "student" they are read again at the end, unless the reduction writes their gradient.
    """
    if objective.support == "student":
        return objective.tail == "bucket" and grad_dtype == UNSCALED_GRAD_DTYPE
    return objective.support != "full"


def chunk_loss(
    student: Project,
    teacher: ProjectTeacher,
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

    torch multiplies a bf16 tensor by a float32 tensor [] at a quarter of a GPU's bandwidth, and the factor is too
    precise for bf16.
    """
    if values.dtype == factor.dtype or values.numel() == 0 or not _runs_on(values):
        return values * factor
    from sdpo.fused.triton import _elementwise

    return _elementwise.scaled(values, factor)


def sum_partials(partials: Tensor, row_scale: Tensor | None, out: Tensor) -> Tensor:
    """``row_scale[:, None] * partials.sum(0)`` into out [C, D] of any dtype.

    partials [n, C, D] are in float32, row_scale [C] is None for 1.
    """
    if not _runs_on(partials) or not out.is_contiguous():
        total = partials.sum(dim=0)
        return out.copy_(total if row_scale is None else total.mul_(row_scale[:, None]))
    from sdpo.fused.triton import _elementwise

    return _elementwise.sum_partials(partials, row_scale, out)


def _runs_on(tensor: Tensor) -> bool:
    return tensor.is_cuda and _is_installed()


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
