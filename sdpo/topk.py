"""Top-K selection: the log-probabilities of K tokens, and of all others together.

The student selects the K tokens and the teacher is gathered at the same ids. The probability outside is
summed from the tokens outside: 1 − Σp would cancel to rounding noise where nearly all probability is on the
support, which is the normal case.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sdpo._numerics import log_softmax, logsumexp, upcast
from sdpo._validate import (
    check_device,
    check_distinct,
    check_distribution,
    check_ids,
    check_int,
    check_shape,
    check_tensor,
    check_top_k,
)


class TopK(NamedTuple):
    """The K most probable tokens of each distribution and the probability of the others.

    Args:
        log_probs: [..., K] nats, descending, normalised over the full vocabulary.
        indices: [..., K] int64 token ids.
        log_tail: [...] nats, log of the total probability outside the K; -inf if nothing is outside.

    Source: SDPO, arXiv 2601.20802, section 2 (top-K distillation).
    """

    log_probs: Tensor
    indices: Tensor
    log_tail: Tensor


class GatheredLogProbs(NamedTuple):
    """A distribution gathered at given token ids, and the probability of the others.

    Args:
        log_probs: [..., K] nats, normalised over the full vocabulary.
        log_tail: [...] nats, log of the total probability outside the K; -inf if nothing is outside.

    Source: SDPO, arXiv 2601.20802, section 2 (top-K distillation).
    """

    log_probs: Tensor
    log_tail: Tensor


def topk_log_probs(logits: Tensor, *, k: int) -> TopK:
    """Log-probabilities of the K largest logits, their ids, and the log-mass of everything else.

    Naively: ``p = softmax(logits); values, ids = p.topk(k); tail = log(1 - values.sum(-1))``, with the tail
    summed from the tokens outside instead. Ties are broken as ``torch.topk`` breaks them.

    Args:
        logits: [..., V] floating; -inf allowed.
        k: number of tokens, in [1, V].

    Returns:
        TopK of log_probs [..., K] (nats, descending), indices [..., K] (int64) and log_tail [...] (nats),
        float32 (float64 for float64 logits).

    Raises:
        TypeError: logits are not a floating tensor, or k is not an int.
        ValueError: k is not in [1, V].

    Gradient: to the logits, through log_probs and log_tail.

    Source: SDPO, arXiv 2601.20802, section 2 (top-K distillation).

    Examples:
        >>> import torch
        >>> top = topk_log_probs(torch.tensor([0.5, 0.125, 0.25, 0.125]).log(), k=2)
        >>> top.indices.tolist(), top.log_probs.exp().tolist(), top.log_tail.exp().item()
        ([0, 2], [0.5, 0.25], 0.25)
    """
    check_distribution("logits", logits)
    vocabulary = logits.shape[-1]
    k = check_top_k(k, vocabulary=vocabulary)
    # Chosen among the logits, not the log-probabilities: normalising rounds, and may tie what was not tied.
    indices = logits.topk(k, dim=-1).indices
    log_probs, log_tail = _gather(logits, indices)
    return TopK(log_probs=log_probs, indices=indices, log_tail=log_tail)


def gather_log_probs(logits: Tensor, indices: Tensor) -> GatheredLogProbs:
    """Log-probabilities of given tokens and the log-mass of all others, of the model that did not select them.

    Naively: ``p = softmax(logits); values = p.gather(-1, indices); tail = log(1 - values.sum(-1))``. The
    values are normalised by this model's own full vocabulary and the tail is its own.

    Args:
        logits: [..., V] floating; -inf allowed.
        indices: [..., K] integer token ids, distinct along K.

    Returns:
        GatheredLogProbs of log_probs [..., K] and log_tail [...], nats, float32 (float64 for float64 logits).

    Raises:
        TypeError: logits are not floating, or indices not integer.
        ValueError: the leading shapes or devices differ, K is not in [1, V], or, checked on a CPU, ids repeat or
            lie outside the vocabulary.

    Gradient: to the logits, through both results.

    Source: SDPO, arXiv 2601.20802, section 2 (top-K distillation).

    Examples:
        >>> import torch
        >>> teacher = gather_log_probs(torch.tensor([0.25, 0.25, 0.5]).log(), torch.tensor([2]))
        >>> teacher.log_probs.exp().tolist(), teacher.log_tail.exp().item()
        ([0.5], 0.5)
    """
    check_distribution("logits", logits)
    check_tensor("indices", indices, "integer", min_ndim=1)
    k = check_int(
        "indices.shape[-1]", indices.shape[-1], low=1, high=logits.shape[-1], meaning="1 to V distinct ids"
    )
    check_shape("indices", indices, (*logits.shape[:-1], k), like="the leading shape of logits, then K")
    check_device("indices", indices, logits, like="the device of the logits")
    check_ids("indices", indices, logits.shape[-1], fix="pass ids of the model's own vocabulary")
    check_distinct("indices", indices, fix="drop the repetition, whose probability would count twice")
    return GatheredLogProbs(*_gather(logits, indices.long()))


def add_tail_bucket(log_probs: Tensor, log_tail: Tensor) -> Tensor:
    """Append the tail as one more category, so that the K+1 probabilities sum to 1.

    Formula: ``cat([log_probs, log_tail[..., None]], -1)``. A divergence of two such vectors is a lower bound
    of the divergence over the full vocabulary, rises with K, and equals it at K = V.

    Args:
        log_probs: [..., K] floating, nats, of the support.
        log_tail: [...] floating, nats, of everything outside it.

    Returns:
        [..., K+1] nats.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: log_tail has not the leading shape of log_probs.

    Gradient: to both arguments.

    Source: SDPO, arXiv 2601.20802, section 2 (top-K distillation).

    Examples:
        >>> import torch
        >>> add_tail_bucket(torch.tensor([0.5, 0.25]).log(), torch.tensor(0.25).log()).exp().tolist()
        [0.5, 0.25, 0.25]
    """
    check_distribution("log_probs", log_probs)
    check_tensor("log_tail", log_tail, "floating")
    check_shape("log_tail", log_tail, log_probs.shape[:-1], like="the leading shape of log_probs")
    return torch.cat([upcast(log_probs), upcast(log_tail).unsqueeze(-1)], dim=-1)


def renormalize(log_probs: Tensor) -> Tensor:
    """Condition a distribution on its K-token support: the alternative to a tail bucket.

    Formula: ``log_probs - logsumexp(log_probs)``. A divergence of two such vectors is no bound, and blind to
    mass that enters or leaves the support. A support without mass (all −inf) keeps none.

    Args:
        log_probs: [..., K] floating, nats, of the support.

    Returns:
        [..., K] nats.

    Raises:
        TypeError: log_probs are not a floating tensor.

    Gradient: to log_probs.

    Source: SDPO, arXiv 2601.20802, section 2 (top-K distillation).

    Examples:
        >>> import torch
        >>> [round(p, 6) for p in renormalize(torch.tensor([0.3, 0.1]).log()).exp().tolist()]
        [0.75, 0.25]
    """
    check_distribution("log_probs", log_probs)
    log_probs = upcast(log_probs)
    mass = logsumexp(log_probs).unsqueeze(-1)
    return log_probs - mass.masked_fill(mass.isneginf(), 0.0)


def _gather(logits: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities at ``indices`` and the log of the probability of all other tokens."""
    log_probs = log_softmax(logits)
    outside = log_probs.scatter(-1, indices, -math.inf)
    return log_probs.gather(-1, indices), logsumexp(outside)
