"""Weights of tokens from what both models say about them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.func import vmap

import sdpo

from ..config import SDPOConfig

Statistics = sdpo.TokenStatistics | sdpo.FusedOutput  # of both models at the tokens, [B, T] each


def weights_of_kept(config: SDPOConfig) -> Callable[[sdpo.TokenStatistics, Tensor], Tensor] | None:
    """The function that weighs the divergence of tokens [B, T] by `token_weights`; `None` without.

    The factors of `confidence` have mean 1 over a row's tokens, and those of a row do not depend on other rows:
    neither the size of the loss nor a row's share depends on them, and no split of a step changes them.
    """
    beta = config.token_weights_beta
    if config.token_weights == "confidence":
        weigh = partial(sdpo.confidence_weights, beta=1.0 if beta is None else beta)
        return lambda statistics, kept: vmap(weigh)(statistics.teacher_entropy, kept)
    if config.token_weights == "gate":
        gate = partial(sdpo.evidence_gate, beta=5.0 if beta is None else beta)
        return lambda statistics, kept: gate(statistics.log_probs, statistics.teacher_log_probs)
    return None


def divergence_factors(
    config: SDPOConfig, statistics: Statistics, per_token: Tensor, loss_mask: Tensor
) -> Tensor:
    """Factors [B, T] of the divergence of each token, detached, by `token_weights` and `token_fraction`.

    Args:
        config: of the run.
        statistics: of both models.
        per_token: [B, T] divergence.
        loss_mask: [B, T] bool.
    """
    fields = {name: getattr(statistics, name) for name in sdpo.TokenStatistics._fields}
    return sdpo.token_factors(
        sdpo.TokenStatistics(**fields),
        per_token.detach(),
        loss_mask,
        fraction=kept_fraction(config),
        weigh=weights_of_kept(config),
    )


def kept_fraction(config: SDPOConfig) -> float | None:
    """The share of a row's tokens whose divergence counts; `None`: all."""
    return None if config.token_fraction == 1.0 else config.token_fraction


def evidence_factors(
    config: SDPOConfig, statistics: Statistics, loss_mask: Tensor, advantages: Tensor
) -> Tensor:
    """Factors [B, T] of the policy loss of each token, detached; 1 where the token has no teacher.

    Args:
        config: of the run, with `token_weights="evidence"`.
        statistics: of both models.
        loss_mask: [B, T] bool, tokens with a teacher.
        advantages: [B, T].
    """
    student, teacher = statistics.log_probs, statistics.teacher_log_probs
    signs = advantages.sign()
    factors = signs * sdpo.evidence_weights(
        signs, student, teacher, mix=config.evidence_mix, clip=config.evidence_clip
    )
    # The surrogate is proportional to the size of the advantage, so the factor may multiply either.
    return torch.where(loss_mask, factors, 1.0)
