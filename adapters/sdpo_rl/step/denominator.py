"""One denominator for a whole optimizer step, whatever its micro-batches and processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import Aggregation, SDPOConfig
from .batch import sampled_mask
from .policy import PolicyTerm, signal_mask


def loss_count(inputs: Mapping[str, Any], aggregation: Aggregation) -> Tensor:
    """What the loss is a mean of, [] int64: the tokens with a loss, the sampled tokens, or the rows with a loss.

    Args:
        inputs: of a micro-batch, with `loss_mask` and `completion_mask` [B, T], and perhaps `tool_mask` [B, T].
        aggregation: `token-mean`, `batch-token-mean` or `sequence-mean`.

    Examples:
        >>> mask = torch.tensor([[True, True], [True, False], [False, False]])
        >>> inputs = {"loss_mask": mask, "completion_mask": torch.ones(3, 2, dtype=torch.long)}
        >>> [loss_count(inputs, name).item() for name in ("token-mean", "batch-token-mean", "sequence-mean")]
        [3, 6, 2]
    """
    if aggregation == "batch-token-mean":
        return sampled_mask(inputs).sum()
    loss_mask: Tensor = inputs["loss_mask"]
    return loss_mask.any(-1).sum() if aggregation == "sequence-mean" else loss_mask.sum()


def signal_counts(inputs: Mapping[str, Any], policy_mask: Tensor | None) -> Tensor:
    """Tokens whose policy loss and whose divergence have a weight other than 0, [2] int64.

    Args:
        inputs: of a micro-batch, with `loss_mask` [B, T], and perhaps `row_weights` [B, 1], of the divergence.
        policy_mask: [B, T] bool; `None`: no token has a policy loss.

    Examples:
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> signal_counts({"loss_mask": mask, "row_weights": torch.tensor([[0.0], [1.5]])}, None).tolist()
        [0, 1]
    """
    distilled: Tensor = inputs["loss_mask"]
    row_weights = inputs.get("row_weights")
    if row_weights is not None:
        distilled = distilled & (row_weights != 0)
    count = distilled.sum()
    return torch.stack([torch.zeros_like(count) if policy_mask is None else policy_mask.sum(), count])


def batch_counts(
    batches: Sequence[Mapping[str, Any]],
    config: SDPOConfig,
    term: PolicyTerm | None,
    *,
    total: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """`loss_count` [M] and `signal_counts` [M, 2] of the M micro-batches of a generation batch, over all processes.

    Args:
        batches: the inputs of the micro-batches.
        config: of the run.
        term: GRPO's part of the loss; `None` without.
        total: sums a tensor over all processes.
    """
    masks = [None if term is None else signal_mask(config, term, batch) for batch in batches]
    counts = torch.stack([loss_count(batch, config.loss_aggregation) for batch in batches])
    signals = torch.stack([signal_counts(batch, mask) for batch, mask in zip(batches, masks, strict=True)])
    totals = total(torch.cat([counts[:, None], signals], dim=1))
    return totals[:, 0], totals[:, 1:]


class StepWindow:
    """The count (`loss_count`) of the optimizer step that a micro-batch belongs to, over all processes.

    The loss of a micro-batch is its sum over the count of its whole step, so that a step split into any
    micro-batches has one loss and one gradient. The counts of a generation batch are known before its first
    micro-batch. If a step spans several generation batches, the later counts are not known yet: all its
    micro-batches then share one estimate, and the accumulated gradient is multiplied by `correction` once the true
    count is known. So it is where the step has another length than was said at its beginning: the Trainer takes no
    step after the last micro-batches of a stream's pass where they are too few, and adds those of the next pass.

    Attributes:
        index: of the next micro-batch in its optimizer step.
        has_signal: whether a token of the present step, or of the last one that ended, has a loss of a weight other
            than 0 on any process, as far as its micro-batches have run.
    """

    def __init__(self) -> None:
        self.index = 0
        self.has_signal = False
        self._loss: Tensor | float = 0.0  # of the step's micro-batches so far
        self._counts: Tensor | None = None
        self._signals: list[list[int]] = []
        self._denominator: Tensor | None = None
        self._seen: Tensor | None = None
        self._length = 0  # of the step, as said at its beginning
        self._exact = True

    def set_counts(self, counts: Tensor, signals: Tensor) -> None:
        """The micro-batches of a new generation batch.

        Args:
            counts: `loss_count` of each of the M micro-batches, [M], summed over processes.
            signals: `signal_counts` likewise, [M, 2].
        """
        self._counts = counts.to(torch.float32)
        # Read once, before the forwards of the batch are queued.
        self._signals = signals.tolist()

    def denominator(
        self, *, step: int, length: int, generate_every: int, part_weights: tuple[float, float]
    ) -> Tensor:
        """The count [] float32 to divide by, at least 1.

        Args:
            step: micro-batches before this one.
            length: micro-batches of the optimizer step as known now; only what its first micro-batch has is used.
            generate_every: micro-batches from one generation batch to the next.
            part_weights: of the policy loss and of the divergence in the step.

        Raises:
            RuntimeError: `set_counts` was not called.
        """
        if self._counts is None:
            raise RuntimeError("StepWindow: expected set_counts() before denominator()")
        slots = len(self._counts)
        if self.index == 0 or self._denominator is None or self._seen is None:
            generation = step // generate_every
            known = [
                (step + ahead) % slots
                for ahead in range(length)
                if (step + ahead) // generate_every == generation
            ]
            # Not indexed by a list, which would be copied to the device and wait for the forwards.
            total = torch.stack([self._counts[slot] for slot in known]).sum()
            self._length = length
            self._exact = len(known) == length
            self._denominator = (total * (length / len(known))).clamp(min=1.0)
            self._seen = torch.zeros_like(total)
            self.has_signal = False
        signals = zip(part_weights, self._signals[step % slots], strict=True)
        self.has_signal = self.has_signal or any(weight * tokens for weight, tokens in signals)
        self._seen = self._seen + self._counts[step % slots]
        return self._denominator

    def end_micro_batch(self, loss: Tensor, *, ends_step: bool) -> tuple[Tensor, Tensor | None]:
        """The loss [] to log, and the factor [] for the step's gradient where it needs one.

        Args:
            loss: [] of the micro-batch that just ended.
            ends_step: it was the last of its optimizer step.
        """
        self.index += 1
        self._loss = self._loss + loss
        if not ends_step:
            return loss, None
        self._exact = self._exact and self.index == self._length
        step_loss, self._loss, self.index = self._loss, 0.0, 0
        correction = self.correction()
        # The earlier micro-batches were logged with the estimate; this one makes up for it.
        return loss if correction is None else loss + step_loss * (correction - 1.0), correction

    def correction(self) -> Tensor | None:
        """Estimate over true count of the step that just ended, []; `None` if the count was exact."""
        if self._exact or self._denominator is None or self._seen is None:
            return None
        return self._denominator / self._seen.clamp(min=1.0)
