"""Independent answers: float64 loops over Python lists, from the definitions, sharing nothing with sdpo."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Row = Sequence[float]


def log_softmax(logits: Row) -> list[float]:
    top = max(logits)
    normalizer = top + math.log(math.fsum(math.exp(z - top) for z in logits))
    return [z - normalizer for z in logits]


def log_mass(log_probs: Row) -> float:
    total = math.fsum(math.exp(x) for x in log_probs)
    if total > 0.0:
        return math.log(total)
    return max(log_probs, default=-math.inf)  # every term underflows: the largest one is all there is


def kl(log_p: Row, log_q: Row) -> float:
    terms = []
    for lp, lq in zip(log_p, log_q, strict=True):
        if lp == -math.inf:
            continue
        if lq == -math.inf:
            return math.inf
        terms.append(math.exp(lp) * (lp - lq))
    return math.fsum(terms)


def jsd(log_p: Row, log_q: Row, alpha: float) -> float:
    if alpha == 0.0:
        return kl(log_q, log_p)
    if alpha == 1.0:
        return kl(log_p, log_q)
    terms = []
    for lp, lq in zip(log_p, log_q, strict=True):
        p, q = math.exp(lp), math.exp(lq)
        m = (1 - alpha) * p + alpha * q
        if p > 0:
            terms.append((1 - alpha) * p * math.log(p / m))
        if q > 0:
            terms.append(alpha * q * math.log(q / m))
    return math.fsum(terms)


def read_support(logits: Row, ids: Sequence[int], tail: str) -> list[float]:
    """Log-probabilities at ``ids``, then the tail bucket; or conditioned on ``ids``."""
    log_probs = log_softmax(logits)
    inside = [log_probs[i] for i in ids]
    if tail == "bucket":
        return [*inside, log_mass([x for i, x in enumerate(log_probs) if i not in set(ids)])]
    mass = log_mass(inside)
    return [x - mass if mass > -math.inf else x for x in inside]


def topk_loss(student: Row, teacher: Row, ids: Sequence[int], alpha: float, tail: str) -> float:
    return jsd(read_support(student, ids, tail), read_support(teacher, ids, tail), alpha)


def per_row(function: Callable[..., float], *tensors: Tensor) -> Tensor:
    """Apply ``function`` to the last dimension of the tensors, for every leading index: [..., V] to [...]."""
    leading = tensors[0].shape[:-1]
    values = [
        function(*(tensor[index].tolist() for tensor in tensors))
        for index in itertools.product(*(range(size) for size in leading))
    ]
    return torch.tensor(values, dtype=torch.float64).reshape(leading)


def numerical_gradient(
    function: Callable[[list[float]], float], point: Row, step: float = 1e-5
) -> list[float]:
    """Central differences; 0 where the point is −inf."""
    gradient = []
    for i, z in enumerate(point):
        if z == -math.inf:
            gradient.append(0.0)
            continue
        up, down = list(point), list(point)
        up[i], down[i] = z + step, z - step
        gradient.append((function(up) - function(down)) / (2 * step))
    return gradient


def binary_entropy(alpha: float) -> float:
    return -alpha * math.log(alpha) - (1 - alpha) * math.log(1 - alpha)
