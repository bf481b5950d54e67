"""Triton kernels of the fused loss. Importing this package imports no Triton: the kernels load at first use."""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo._recipe import Recipe, Rows, Side, TokenStats

MAX_K = 1024


def missing(device: torch.device, working: torch.dtype, recipe: Recipe) -> str | None:
    """Why the kernels cannot run here; None if they can."""
    return "there are none yet"


def chunk(student: Side, teacher: Side, rows: Rows, recipe: Recipe, slope: Tensor | None) -> TokenStats:
    """The loss of one chunk, as ``sdpo._fused_torch.chunk``."""
    raise NotImplementedError
