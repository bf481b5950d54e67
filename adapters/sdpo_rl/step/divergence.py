"""What a token's loss is, from whole logits: the divergence by the options of a run, and the anchor."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

import sdpo

from ..config import SDPOConfig


class _Tokens(Protocol):
    """Sampled tokens and loss mask [B, T]."""

    @property
    def tokens(self) -> Tensor: ...
    @property
    def loss_mask(self) -> Tensor: ...


def token_divergence(
    config: SDPOConfig, student: Tensor, teacher: Tensor, targets: _Tokens, *, temperature: float
) -> Tensor:
    """The loss [B, T] of each token from logits [B, T, V], with gradient to the student's."""
    if config.entry_clip is not None:
        log_p, log_q = _log_probs(student, temperature), _log_probs(teacher, temperature)
        return sdpo.clip_entries(log_p, log_q.detach(), alpha=config.alpha, clip=config.entry_clip)
    if config.credit == "sequence":
        advantages = sdpo.token_advantages(student / temperature, teacher / temperature, targets.tokens)
        per_row = sdpo.sequence_advantages(advantages, targets.loss_mask)
        return -per_row[:, None] * sampled_log_probs(student, targets.tokens, temperature)
    return sdpo.distillation_loss(
        student,
        teacher,
        tokens=targets.tokens if config.support == "sampled" else None,
        support=config.support,
        k=config.k if config.uses_topk else None,
        tail=config.tail if config.uses_topk else None,
        alpha=config.alpha,
        temperature=temperature,
    )


def anchor(student: Tensor, reference: Tensor, *, temperature: float) -> Tensor:
    """KL(student‖reference) [B, T] from logits [B, T, V], with gradient to the student's."""
    return sdpo.anchor(_log_probs(student, temperature), _log_probs(reference.float(), temperature))


def entropy(logits: Tensor, temperature: float) -> Tensor:
    """Entropies [B, T] in nats from logits [B, T, V], with gradient."""
    log_probs = _log_probs(logits, temperature)
    # An impossible token has no share; its log-probability is replaced before the product, for the gradient.
    return -(log_probs.exp() * log_probs.masked_fill(log_probs.isneginf(), 0.0)).sum(dim=-1)


def sampled_log_probs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Log-probabilities [B, T] of the sampled tokens, with gradient."""
    return sdpo.gather_log_probs(logits / temperature, tokens[..., None]).log_probs.squeeze(-1)


def _log_probs(logits: Tensor, temperature: float) -> Tensor:
    return (logits / temperature).log_softmax(dim=-1)
