"""Factors of the divergence of each token from what both models say about its row.

What ``token_factors`` computes for whole tensors, ``fused_distillation_loss`` computes row by row in its pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from einops import reduce
from torch import Tensor

from sdpo._numerics import upcast
from sdpo._validate import check_shape, check_tensor, is_readable
from sdpo.metrics import TokenStatistics, check_statistics
from sdpo.weights import rounded_up, select_tokens

# From the statistics [R, T] of R rows, and the mask [R, T] of the tokens that have a loss, factors [R, T].
TokenWeights = Callable[[TokenStatistics, Tensor], Tensor]


def token_factors(
    statistics: TokenStatistics,
    per_token: Tensor,
    loss_mask: Tensor,
    *,
    fraction: float | None = None,
    weigh: TokenWeights | None = None,
) -> Tensor:
    """Factors of each token's divergence: some tokens stand for their row, and a function weighs those.

    ::

        kept = select_tokens(statistics.student_entropy, per_token, loss_mask, fraction=fraction)
        factors = kept * weigh(statistics, kept) * loss_mask.sum(-1) / kept.sum(-1)

    Without ``fraction`` all tokens of ``loss_mask`` are kept, without ``weigh`` its factor is 1. The last quotient
    keeps the sum of the factors of a row at its number of tokens, if those of ``weigh`` have mean 1 over the kept
    ones: then neither the size of a loss nor a row's share in it depends on ``fraction``.

    Args:
        statistics: of both models, [R, T] or [..., T] each.
        per_token: [..., T] floating, the divergence of each token.
        loss_mask: [..., T] bool, the tokens that have a divergence.
        fraction: in (0, 1], the share of each row's tokens to keep, rounded up. None: all.
        weigh: function of the statistics and the mask [..., T] of the kept tokens that returns factors [..., T],
            such as ``lambda statistics, kept: evidence_gate(statistics.log_probs, statistics.teacher_log_probs,
            beta=5.0)``; finite, ≥ 0, and it must leave its arguments as they are. None: 1.

    Returns:
        [..., T] float32 (float64 for float64 inputs), 0 where no token is kept. Where the values cannot be read
        without waiting for a device, NaN in place of a factor below 0, so that the loss shows it.

    Raises:
        TypeError: loss_mask is not bool, or per_token, a statistic or a factor of ``weigh`` not floating.
        ValueError: shapes that do not match, a fraction out of range, or on a CPU a factor of a kept token
            that is negative or not finite.

    Gradient: none.

    Source: TIP, arXiv 2604.14084, for ``fraction``; what ``weigh`` returns has its own.

    Examples:
        >>> import torch
        >>> entropy, divergence = torch.tensor([[2.0, 0.1, 0.0, 0.0]]), torch.tensor([[0.1, 0.0, 3.0, 0.2]])
        >>> statistics = TokenStatistics(*[torch.zeros(1, 4)] * 8)._replace(student_entropy=entropy)
        >>> token_factors(statistics, divergence, torch.ones(1, 4, dtype=torch.bool), fraction=0.5).tolist()
        [[2.0, 0.0, 2.0, 0.0]]
    """
    check_tensor("loss_mask", loss_mask, "bool", min_ndim=1)
    check_tensor("per_token", per_token, "floating")
    check_shape("per_token", per_token, loss_mask.shape, like="the shape of loss_mask")
    check_statistics(statistics, per_token)
    kept = loss_mask
    if fraction is not None:
        kept = select_tokens(statistics.student_entropy, per_token, loss_mask, fraction=fraction)
    factors = upcast(torch.ones_like(per_token))
    if weigh is not None:
        factors = weigh(statistics, kept)
        check_tensor("weigh(...)", factors, "floating")
        check_shape("weigh(...)", factors, loss_mask.shape, like="the shape of loss_mask")
        factors = upcast(factors.detach())
        _refuse_bad(factors, kept)
        factors = factors.masked_fill(factors < 0.0, float("nan"))
    factors = factors.masked_fill(~kept, 0.0)
    if fraction is None:
        return factors
    active, left = (reduce(mask, "... t -> ... 1", "sum") for mask in (loss_mask, kept))
    return factors * active / left.clamp(min=1)


def _refuse_bad(factors: Tensor, kept: Tensor) -> None:
    """Demand finite factors >= 0 of the kept tokens, where the values are readable."""
    if not (is_readable(factors) and is_readable(kept)):
        return
    wrong = kept & ~((factors >= 0.0) & factors.isfinite())
    if wrong.any():
        raise ValueError(
            "weigh(...): expected finite numbers >= 0 for the kept tokens, got "
            f"{float(factors[wrong][0])}; clamp or mask them"
        )


def kept_at_most(fraction: float | None, active: Sequence[int]) -> int:
    """Number of tokens that ``token_factors`` keeps of rows with these numbers of tokens, at most."""
    return sum(active) if fraction is None else sum(int(rounded_up(fraction, count)) for count in active)
