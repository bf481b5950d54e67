"""Weights of tokens from what both models say about them."""

from __future__ import annotations

from functools import partial

from torch import Tensor
from torch.func import vmap

import sdpo

from ..config import SDPOConfig


def distillation_weights(
    config: SDPOConfig, statistics: sdpo.TokenStatistics | sdpo.FusedOutput, loss_mask: Tensor
) -> Tensor:
    """Factors [B, T] of the divergence of each token, detached.

    Their mean over the tokens with a loss of a row is 1, so that neither the size of the loss nor a row's share
    depends on them, and no split of a step changes them.

    Args:
        config: of the run, with `token_weights`.
        statistics: of both models at the tokens, [B, T] each.
        loss_mask: [B, T] bool.
    """
    weigh = partial(sdpo.confidence_weights, beta=config.token_weights_beta or 1.0)
    return vmap(weigh)(statistics.teacher_entropy, loss_mask)
