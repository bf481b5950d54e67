"""Weights of tokens from what both models say about them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.func import vmap

import sdpo

from ..config import SDPOConfig


def token_factors(
    config: SDPOConfig,
    statistics: sdpo.TokenStatistics | sdpo.FusedOutput,
    loss_mask: Tensor,
    advantages: Tensor | None,
) -> Tensor:
    """Factors [B, T] by `token_weights`: of the divergence of each token or, with `evidence`, of its policy loss.

    The mean of `confidence` over the tokens with a loss of a row is 1, so that neither the size of the loss nor a
    row's share depends on it, and no split of a step changes it.

    Args:
        config: of the run.
        statistics: of both models at the tokens, [B, T] each.
        loss_mask: [B, T] bool, tokens with a teacher.
        advantages: [B, T]; only `evidence` needs them.
    """
    beta = config.token_weights_beta
    if config.token_weights == "confidence":
        weigh = partial(sdpo.confidence_weights, beta=1.0 if beta is None else beta)
        return vmap(weigh)(statistics.teacher_entropy, loss_mask)
    student, teacher = statistics.log_probs, statistics.teacher_log_probs
    if config.token_weights == "gate":
        return sdpo.evidence_gate(student, teacher, beta=5.0 if beta is None else beta)
    assert advantages is not None  # SDPOConfig refuses evidence without GRPO's part
    signs = advantages.sign()
    factors = signs * sdpo.evidence_weights(
        signs, student, teacher, mix=config.evidence_mix, clip=config.evidence_clip
    )
    # The surrogate is proportional to the size of the advantage, so the factor may multiply either.
    return torch.where(loss_mask, factors, 1.0)
