"""Sums over active tokens, kept apart from their counts: the caller divides.

A mean of means depends on how a step is split into micro-batches and processes. Sums and counts add up:
divide once, over the whole optimizer step, and the objective is the same however it is split.
"""

from __future__ import annotations

from typing import NamedTuple

from einops import reduce
from torch import Tensor

from sdpo._numerics import upcast, zero_where_not
from sdpo._validate import check_shape, check_tensor


class MaskedSum(NamedTuple):
    """A sum and the number of items in it. Add totals to totals and counts to counts, then divide.

    Args:
        total: [] float32 or float64, carries the gradient.
        count: [] int64.

    Source: a choice of this library; the reference implementation divides per micro-batch.
    """

    total: Tensor
    count: Tensor  # type: ignore[assignment]  # shadows tuple.count on purpose

    def mean(self) -> Tensor:
        """``total / count``; where the count is 0, 0 with gradients of exactly 0.

        Returns:
            [] in the dtype of total.

        Examples:
            >>> import torch
            >>> MaskedSum(total=torch.tensor(6.0), count=torch.tensor(4)).mean().item()
            1.5
        """
        return self.total / self.count.clamp(min=1)


def token_sum(per_token: Tensor, mask: Tensor) -> MaskedSum:
    """Sum over the active tokens and their number: every token weighs the same.

    Formula: ``(per_token[mask].sum(), mask.sum())``. Values at inactive positions, even NaN or inf, reach
    neither the sum nor the gradient.

    Args:
        per_token: [..., T] floating, in any unit.
        mask: [..., T] bool, active tokens.

    Returns:
        MaskedSum with total [] float32 (float64 for float64 input) and count [] int64.

    Raises:
        TypeError: per_token is not floating, or mask not bool.
        ValueError: the shapes differ.

    Gradient: to per_token.

    Source: SDPO, arXiv 2601.20802, section 2 (token-level mean).

    Examples:
        >>> import torch
        >>> loss = torch.tensor([[1.0, 2.0, float("nan")], [4.0, 5.0, 6.0]])
        >>> token_sum(loss, torch.tensor([[True, True, False], [True, False, False]]))
        MaskedSum(total=tensor(7.), count=tensor(3))
    """
    values = _active(per_token, mask)
    return MaskedSum(total=values.sum(), count=mask.sum())


def sequence_sum(per_token: Tensor, mask: Tensor) -> MaskedSum:
    """Sum of the active rows' means and the number of active rows: every sequence weighs the same.

    Formula: ``(Σ_rows mean(per_token[row][mask[row]]), rows with an active token)``. Rows without an active
    token do not count. Values at inactive positions, even NaN or inf, reach neither the sum nor the gradient.

    Args:
        per_token: [..., T] floating, in any unit.
        mask: [..., T] bool, active tokens.

    Returns:
        MaskedSum with total [] float32 (float64 for float64 input) and count [] int64.

    Raises:
        TypeError: per_token is not floating, or mask not bool.
        ValueError: the shapes differ, or there is no token dimension.

    Gradient: to per_token.

    Source: SDPO's ``sequence-mean``; the sequence-level mean of GRPO, arXiv 2402.03300.

    Examples:
        >>> import torch
        >>> loss = torch.tensor([[1.0, 3.0, float("nan")], [4.0, 5.0, 6.0]])
        >>> sequence_sum(loss, torch.tensor([[True, True, False], [True, False, False]]))
        MaskedSum(total=tensor(6.), count=tensor(2))
    """
    values = _active(per_token, mask)
    lengths = reduce(mask, "... t -> ...", "sum")
    means = reduce(values, "... t -> ...", "sum") / lengths.clamp(min=1)
    return MaskedSum(total=means.sum(), count=(lengths > 0).sum())


def _active(per_token: Tensor, mask: Tensor) -> Tensor:
    check_tensor("per_token", per_token, "floating", min_ndim=1)
    check_tensor("mask", mask, "bool")
    check_shape("mask", mask, per_token.shape, like="the shape of per_token")
    return zero_where_not(upcast(per_token), mask)
