"""Weights of tokens from what both models say about them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.func import vmap

import sdpo

from ..config import SDPOConfig

Statistics = sdpo.TokenStatistics | sdpo.FusedOutput  # of both models at the tokens, [B, T] each


def divergence_factors(
    config: SDPOConfig, statistics: Statistics, per_token: Tensor, loss_mask: Tensor
) -> Tensor:
    """Factors [B, T] of the divergence of each token, detached, by `token_weights` and `token_fraction`.

    Those of `confidence` and of `token_fraction` have mean 1 over the tokens with a loss of a row: neither the size
    of the loss nor a row's share depends on them, and no split of a step changes them.

    Args:
        config: of the run.
        statistics: of both models.
        per_token: [B, T] divergence.
        loss_mask: [B, T] bool.
    """
    kept = loss_mask
    if config.token_fraction < 1.0:
        entropy = statistics.student_entropy
        kept = sdpo.select_tokens(entropy, per_token, loss_mask, fraction=config.token_fraction)
    factors = kept.float()
    beta = config.token_weights_beta
    if config.token_weights == "confidence":
        weigh = partial(sdpo.confidence_weights, beta=1.0 if beta is None else beta)
        factors = vmap(weigh)(statistics.teacher_entropy, kept)
    elif config.token_weights == "gate":
        student, teacher = statistics.log_probs, statistics.teacher_log_probs
        factors = factors * sdpo.evidence_gate(student, teacher, beta=5.0 if beta is None else beta)
    if config.token_fraction < 1.0:
        counts = [mask.sum(-1, keepdim=True) for mask in (loss_mask, kept)]
        factors = factors * counts[0] / counts[1].clamp(min=1)
    return factors


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
