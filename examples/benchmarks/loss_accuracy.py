"""Errors of the loss and its gradient on bf16 inputs, against float64: the fused loss and two simple peers.

    python examples/benchmarks/loss_accuracy.py --output examples/benchmarks/records/loss-accuracy-h100.json

The reference is the plain loss in float64 on the same bf16 inputs. Logits of standard deviation 1 (`flat`), 4
(`ordinary`), and `peaked` ones with almost no probability outside the 100 likeliest tokens. Relative errors: of a
token's loss (median, 99th percentile and maximum), of the norm of the hidden gradient, and of the gradient itself;
of log-tail the largest difference in nats. `rounding` is what rounding the exact gradient to bf16 costs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loss_peers as peers
import torch
from torch import Tensor

import sdpo

SHAPE = {"cuda": peers.Shape(256, 3584, 152064, False), "cpu": peers.Shape(32, 64, 8192, False)}
SHARPEN = {"flat": 0.25, "ordinary": 1.0, "peaked": 2.9}


def exact(x: peers.Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per-token loss, hidden gradient of its sum, log-tail, and the mass of the support, in float64."""
    weight = x.weight.detach().double()
    hidden = x.hidden.detach().double().requires_grad_()
    student, teacher = hidden @ weight.t(), x.teacher_hidden.double() @ weight.t()
    values = sdpo.distillation_loss(
        student, teacher, alpha=peers.ALPHA, temperature=peers.TEMPERATURE, **peers.TOPK
    )
    (gradient,) = torch.autograd.grad(values.sum(), hidden)
    top = sdpo.topk_log_probs(student.detach(), k=peers.K)
    return values.detach(), gradient, top.log_tail, top.log_probs.exp().sum(-1)


def errors(
    values: Tensor, gradient: Tensor, reference: tuple[Tensor, Tensor, Tensor, Tensor]
) -> dict[str, float]:
    value = (values.detach().double() - reference[0]).abs() / reference[0]
    return {
        "value_median": value.median().item(),
        "value_99_percent": value.quantile(0.99).item(),
        "value_max": value.max().item(),
        "gradient_norm": abs(gradient.double().norm() / reference[1].norm() - 1).item(),
        "gradient": ((gradient.double() - reference[1]).norm() / reference[1].norm()).item(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="file for the record, JSON")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    record: dict[str, Any] = {"command": ["loss_accuracy.py", *peers.command()], "versions": peers.versions()}
    record["device"] = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    implementations: dict[str, Callable[[peers.Inputs], Tensor]] = {
        "log-softmax, top-K": peers.log_softmax_then_topk,
        "logsumexp, top-K, gather": peers.logsumexp_topk_gather,
    }
    for name, factor in SHARPEN.items():
        x = peers.make_inputs(SHAPE[device], device)
        low = torch.bfloat16
        x = x._replace(
            hidden=(x.hidden.detach() * factor).to(low).requires_grad_(),
            teacher_hidden=(x.teacher_hidden * factor).to(low),
            weight=x.weight.detach().to(low),
        )
        reference = exact(x)
        out = peers.fused_output(x, **peers.TOPK, reduction="none")
        (gradient,) = torch.autograd.grad(out.per_token.sum(), x.hidden)
        rows = {"fused": errors(out.per_token, gradient, reference)}
        rows["fused"]["log_tail_max"] = (out.student_log_tail - reference[2]).abs().max().item()
        rows["rounding"] = errors(reference[0], reference[1].to(low), reference)
        for peer, implementation in implementations.items():
            values = implementation(x)
            (gradient,) = torch.autograd.grad(values.sum(), x.hidden)
            rows[peer] = errors(values, gradient, reference)
        mass = (1 - reference[3]).median().item()
        print(f"\n{name}: {tuple(SHAPE[device])}, median mass outside the support {mass:.1e}")
        for row, row_errors in rows.items():
            print(f"  {row:26}" + "  ".join(f"{key} {error:.1e}" for key, error in row_errors.items()))
        record[name] = {"mass_outside_median": mass, "errors": rows}
    if args.output:
        args.output.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
