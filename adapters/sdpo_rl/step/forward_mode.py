"""How the forwards of a run are executed, found by test forwards of its model."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from .batch import TokenBatch
from .forward import evaluating
from .micro_batch import StepContext, can_fuse, reads_padding
from .model_check import autoregression_problem
from .runner import ChosenLayout, choose_layout


class ForwardMode(NamedTuple):
    """What the first forward of a run showed of its model.

    Attributes:
        fused: the loss is computed from hidden states and head (see `can_fuse`).
        reads_padding: rows of different lengths must not share a forward (see `reads_padding`), on every process
            alike.
        layout: of the rows in a forward.
    """

    fused: bool
    reads_padding: bool
    layout: ChosenLayout

    def of(self, context: StepContext) -> StepContext:
        """The context of a step in this mode."""
        found = self.layout
        return replace(
            context,
            reads_padding=self.reads_padding,
            layout=found.layout,
            by_row=found.by_row,
            sequence_limit=found.sequence_limit,
        )


def find_forward_mode(context: StepContext, tokens: TokenBatch) -> ForwardMode:
    """The mode of a run, found by test forwards over `tokens`; all processes must call it.

    Raises:
        ValueError: the model is not autoregressive; also those of `choose_layout`.
    """
    fused = can_fuse(context, tokens)
    apart = reads_padding(context, tokens)
    with context.accelerator.autocast(), evaluating(context.unwrapped):
        problem = autoregression_problem(context.unwrapped, tokens)
    found = torch.tensor([float(apart), float(bool(problem))], device=context.accelerator.device)
    apart, refused = context.accelerator.reduce(found, reduction="sum").bool().tolist()
    if refused:
        base = context.unwrapped
        base = base.get_base_model() if hasattr(base, "get_base_model") else base
        raise ValueError(
            f"model: expected an autoregressive model whose positions start from 0, got {type(base).__name__}, "
            f"{problem or 'which failed this test on another process'}"
        )
    return ForwardMode(fused, apart, choose_layout(context, tokens))
