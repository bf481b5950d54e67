"""What the benchmarks of the loss compare: the fused loss, the plain one, and peers on the same inputs.

Called where installed: the top-K loss of trl.experimental.sdpo, on logits divided by the temperature as its trainer
divides them; trl.kernels.chunked_divergence; LigerFusedLinearJSDLoss. Written here from their formulas: log-softmax
of everything, then top-K (sdpo-rl 0.0.3); logsumexp, top-K and gather, which is TRL's without the division,
nobody's own: what that way costs at least.
"""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import sdpo

K, ALPHA, TEMPERATURE = 100, 0.5, 1.0


class Shape(NamedTuple):
    """A size to measure."""

    tokens: int
    hidden: int
    vocabulary: int
    head_learns: bool


SHAPES = {
    "cuda": [
        Shape(8192, 3584, 152064, False),
        Shape(32768, 3584, 152064, False),
        Shape(8192, 3584, 152064, True),
        Shape(4096, 896, 151936, True),
    ],
    "cpu": [Shape(256, 896, 151936, False)],
}


class Inputs(NamedTuple):
    """Hidden states and the head that both models share."""

    hidden: Tensor
    head: Tensor
    teacher_hidden: Tensor
    tokens: Tensor


def make_inputs(shape: Shape, device: str) -> Inputs:
    """Logits of standard deviation 4, a teacher that mostly agrees: peaked rows, as language models have them."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    hidden = normal(shape.tokens, shape.hidden)
    teacher_hidden = 0.9 * hidden + math.sqrt(1 - 0.9**2) * normal(shape.tokens, shape.hidden)
    head = normal(shape.vocabulary, shape.hidden) * (4 / math.sqrt(shape.hidden))
    tokens = torch.randint(shape.vocabulary, (shape.tokens,), generator=generator, device=device)
    return Inputs(
        hidden.to(dtype).requires_grad_(),
        head.to(dtype).requires_grad_(shape.head_learns),
        teacher_hidden.to(dtype),
        tokens,
    )


def fused(x: Inputs, k: int | None = K, **options: Any) -> Tensor:
    out = sdpo.fused_topk_distillation_loss(
        x.hidden, x.head, x.teacher_hidden, x.head, x.tokens, k=k, alpha=ALPHA, tail="bucket",
        temperature=TEMPERATURE, loss_mask=torch.ones_like(x.tokens, dtype=torch.bool), **options,
    )  # fmt: skip
    return out.total / x.tokens.numel()


def fused_full(x: Inputs) -> Tensor:
    return fused(x, k=None)


def plain(x: Inputs) -> Tensor:
    teacher = x.teacher_hidden @ x.head.detach().t()
    student = x.hidden @ x.head.t()
    return sdpo.topk_distillation_loss(student, teacher, k=K, alpha=ALPHA, tail="bucket")


def log_softmax_then_topk(x: Inputs) -> Tensor:
    with torch.no_grad():
        log_q = torch.log_softmax((x.teacher_hidden @ x.head.t()).float(), dim=-1)
    log_p = torch.log_softmax((x.hidden @ x.head.t()).float(), dim=-1)
    top, ids = log_p.topk(K, dim=-1)
    return _jsd(_with_rest(top), _with_rest(log_q.gather(-1, ids)))


def trl_topk(x: Inputs) -> Tensor:
    from trl.experimental.sdpo.loss_utils import compute_topk_self_distillation_loss

    with torch.no_grad():
        teacher = (x.teacher_hidden @ x.head.t()) / TEMPERATURE
    student = (x.hidden @ x.head.t()) / TEMPERATURE
    per_token: Tensor = compute_topk_self_distillation_loss(
        student, teacher, k=K, distillation_alpha=ALPHA, tail="bucket"
    )
    return per_token


def logsumexp_topk_gather(x: Inputs) -> Tensor:
    with torch.no_grad():
        teacher = x.teacher_hidden @ x.head.t()
    student = x.hidden @ x.head.t()
    top, ids = student.topk(K, dim=-1)
    log_p = top - torch.logsumexp(student, dim=-1, keepdim=True)
    log_q = teacher.gather(-1, ids) - torch.logsumexp(teacher, dim=-1, keepdim=True)
    return _jsd(_with_rest(log_p.float()), _with_rest(log_q.float()))


def _with_rest(log_probs: Tensor) -> Tensor:
    mass = torch.logsumexp(log_probs, dim=-1, keepdim=True).clamp(max=-1e-7)
    return torch.cat([log_probs, torch.log(-torch.expm1(mass))], dim=-1)


def _jsd(log_p: Tensor, log_q: Tensor) -> Tensor:
    log_m = torch.logaddexp(log_p + math.log(1 - ALPHA), log_q + math.log(ALPHA))
    student = (log_p.exp() * (log_p - log_m)).sum(-1)
    return (1 - ALPHA) * student + ALPHA * (log_q.exp() * (log_q - log_m)).sum(-1)


def trl_chunked(x: Inputs) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    head = x.head.detach()
    return ChunkedDivergenceFunction.apply(x.hidden, x.head, None, x.teacher_hidden, head, None, ALPHA)[0]


def liger(x: Inputs) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=ALPHA)
    result: Tensor = loss(x.hidden, x.head, x.teacher_hidden, x.head.detach(), x.tokens)
    return result


# Each gives its mean, or values per token.
LOSSES: dict[str, dict[str, Callable[[Inputs], Tensor]]] = {
    "cuda": {
        "fused": fused,
        "fused, full vocabulary": fused_full,
        "log-softmax, top-K": log_softmax_then_topk,
        "logsumexp, top-K, gather": logsumexp_topk_gather,
        "TRL SDPO": trl_topk,
        "TRL chunked divergence": trl_chunked,
        "Liger JSD": liger,
    },
    "cpu": {"fused": fused, "plain": plain},
}


PEERS = ("log-softmax, top-K", "logsumexp, top-K, gather", "TRL SDPO", "TRL chunked divergence", "Liger JSD")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "trl", "liger-kernel"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def command() -> list[str]:
    """The arguments of this run, without the folders of this machine."""
    return [Path(argument).name if "/" in argument else argument for argument in sys.argv[1:]]
