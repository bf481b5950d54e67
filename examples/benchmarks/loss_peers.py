"""The losses that the benchmarks compare, on the same inputs: the fused loss, the plain loss, and peers.

Called if installed: the top-K loss of trl.experimental.sdpo, on logits divided by the temperature as its trainer
divides them; trl.kernels.chunked_divergence; LigerFusedLinearJSDLoss. Written here from their formulas: a
log-softmax of the whole vocabulary, then top-K (sdpo-rl 0.0.3); and logsumexp, top-K and gather, TRL's without the
division, which no library ships: a lower bound of what that computation costs.
"""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import sdpo

K, ALPHA, TEMPERATURE = 100, 0.5, 1.0
ROW = 512  # tokens of a row, for weights that depend on the row
TOPK: dict[str, Any] = {"support": "student", "k": K, "tail": "bucket"}


class Shape(NamedTuple):
    """A size to measure."""

    tokens: int
    hidden: int
    vocabulary: int
    trains_head: bool


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
    """Hidden states of N tokens and the weight of the LM head that both models share."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    teacher_hidden: Tensor  # [N, D]
    tokens: Tensor  # [N]


def make_inputs(shape: Shape, device: str) -> Inputs:
    """Logits of standard deviation 4, a teacher that mostly agrees: peaked rows, as language models have them."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    hidden = normal(shape.tokens, shape.hidden)
    teacher_hidden = 0.9 * hidden + math.sqrt(1 - 0.9**2) * normal(shape.tokens, shape.hidden)
    weight = normal(shape.vocabulary, shape.hidden) * (4 / math.sqrt(shape.hidden))
    tokens = torch.randint(shape.vocabulary, (shape.tokens,), generator=generator, device=device)
    return Inputs(
        hidden.to(dtype).requires_grad_(),
        weight.to(dtype).requires_grad_(shape.trains_head),
        teacher_hidden.to(dtype),
        tokens,
    )


def fused_output(x: Inputs, **objective: Any) -> sdpo.FusedOutput:
    tokens = x.tokens.unflatten(0, (-1, min(ROW, len(x.tokens))))
    hidden, teacher_hidden = (h.unflatten(0, tokens.shape) for h in (x.hidden, x.teacher_hidden))
    return sdpo.fused_distillation_loss(
        sdpo.LMHead(hidden, x.weight), sdpo.LMHead(teacher_hidden, x.weight), tokens,
        alpha=ALPHA, temperature=TEMPERATURE, loss_mask=torch.ones_like(tokens, dtype=torch.bool), **objective,
    )  # fmt: skip


def fused(x: Inputs) -> Tensor:
    return fused_output(x, **TOPK).mean()


def fused_full(x: Inputs) -> Tensor:
    return fused_output(x, support="full").mean()


def fused_half(x: Inputs) -> Tensor:
    return fused_output(x, **TOPK, token_fraction=0.5).mean()


def fused_confidence(x: Inputs) -> Tensor:
    return fused_output(x, **TOPK, token_weights=_confidence).mean()


def _confidence(statistics: sdpo.TokenStatistics, kept: Tensor) -> Tensor:
    weigh = partial(sdpo.confidence_weights, beta=1.0)
    return torch.func.vmap(weigh)(statistics.teacher_entropy, kept)


def plain(x: Inputs) -> Tensor:
    teacher = x.teacher_hidden @ x.weight.detach().t()
    student = x.hidden @ x.weight.t()
    return sdpo.distillation_loss(student, teacher, alpha=ALPHA, temperature=TEMPERATURE, **TOPK)


def log_softmax_then_topk(x: Inputs) -> Tensor:
    with torch.no_grad():
        log_q = torch.log_softmax((x.teacher_hidden @ x.weight.t()).float(), dim=-1)
    log_p = torch.log_softmax((x.hidden @ x.weight.t()).float(), dim=-1)
    top, ids = log_p.topk(K, dim=-1)
    return _jsd(_with_tail(top), _with_tail(log_q.gather(-1, ids)))


def trl_topk(x: Inputs) -> Tensor:
    from trl.experimental.sdpo.loss_utils import compute_topk_self_distillation_loss

    with torch.no_grad():
        teacher = (x.teacher_hidden @ x.weight.t()) / TEMPERATURE
    student = (x.hidden @ x.weight.t()) / TEMPERATURE
    per_token: Tensor = compute_topk_self_distillation_loss(
        student, teacher, distillation_topk=K, distillation_alpha=ALPHA, distillation_add_tail=True
    )
    return per_token


def logsumexp_topk_gather(x: Inputs) -> Tensor:
    with torch.no_grad():
        teacher = x.teacher_hidden @ x.weight.t()
    student = x.hidden @ x.weight.t()
    top, ids = student.topk(K, dim=-1)
    log_p = top - torch.logsumexp(student, dim=-1, keepdim=True)
    log_q = teacher.gather(-1, ids) - torch.logsumexp(teacher, dim=-1, keepdim=True)
    return _jsd(_with_tail(log_p.float()), _with_tail(log_q.float()))


def _with_tail(log_probs: Tensor) -> Tensor:
    mass = torch.logsumexp(log_probs, dim=-1, keepdim=True).clamp(max=-1e-7)
    return torch.cat([log_probs, torch.log(-torch.expm1(mass))], dim=-1)


def _jsd(log_p: Tensor, log_q: Tensor) -> Tensor:
    log_m = torch.logaddexp(log_p + math.log(1 - ALPHA), log_q + math.log(ALPHA))
    student = (log_p.exp() * (log_p - log_m)).sum(-1)
    return (1 - ALPHA) * student + ALPHA * (log_q.exp() * (log_q - log_m)).sum(-1)


def trl_chunked(x: Inputs) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    teacher_weight = x.weight.detach()
    return ChunkedDivergenceFunction.apply(
        x.hidden, x.weight, None, x.teacher_hidden, teacher_weight, None, ALPHA
    )[0]


def liger(x: Inputs) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=ALPHA)
    result: Tensor = loss(x.hidden, x.weight, x.teacher_hidden, x.weight.detach(), x.tokens)
    return result


# Each returns its mean, or values per token.
LOSSES: dict[str, dict[str, Callable[[Inputs], Tensor]]] = {
    "cuda": {
        "fused": fused,
        "fused, full vocabulary": fused_full,
        "fused, half of the tokens": fused_half,
        "fused, confidence weights": fused_confidence,
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
    """The arguments of this run, without folders."""
    return [Path(argument).name if "/" in argument else argument for argument in sys.argv[1:]]
