"""The loss alone: numbers from two tensors of logits, without a model.

    python examples/01_pure_loss.py

A vocabulary of six tokens, one row of two positions. The student has not seen the feedback, the teacher has. The
program prints the divergence for several α and supports, the gradient, and the same loss from hidden states.
"""

from __future__ import annotations

import torch

import sdpo

STUDENT = torch.tensor(
    [[[2.0, 1.0, 0.5, 0.0, -1.0, -2.0], [0.0, 3.0, 0.0, 0.0, 0.0, 0.0]]]
)  # [B=1, T=2, V=6]
TEACHER = torch.tensor([[[0.5, 2.0, 0.0, 1.0, -1.5, -3.0], [0.0, 3.0, 0.0, 0.0, 0.0, 0.0]]])


def main() -> None:
    alphas = (0.0, 0.5, 1.0)
    print("nats of the first token; at the second both agree, and every divergence is 0\n")
    print(f"{'support':24}" + "".join(f"  α={alpha:<4}" for alpha in alphas))
    supports = {
        "full vocabulary": {"support": "full"},
        "student's top 3, bucket": {"support": "student", "k": 3, "tail": "bucket"},
        "student's top 1, bucket": {"support": "student", "k": 1, "tail": "bucket"},
    }
    for name, choice in supports.items():
        first = [
            sdpo.distillation_loss(STUDENT, TEACHER, **choice, alpha=alpha, temperature=1.0)[0, 0]
            for alpha in alphas
        ]
        print(f"{name:24}" + "".join(f"  {value:.4f}" for value in first))

    # A loss is a sum and a count, so that means over micro-batches and processes are exact.
    logits = STUDENT.clone().requires_grad_()
    per_token = sdpo.distillation_loss(logits, TEACHER, support="full", alpha=0.0, temperature=1.0)
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss = sdpo.self_distillation_loss(per_token, mask, row_mask=[True])
    loss.mean().backward()
    print(f"\nloss {loss.mean():.4f} = {loss.total:.4f} nats over {loss.count} tokens")
    print("gradient of the first token's logits:", [round(g, 3) for g in logits.grad[0, 0].tolist()])
    # With α = 0 the gradient of a token is softmax(student) − softmax(teacher), over the count.
    expected = (STUDENT.softmax(-1) - TEACHER.softmax(-1)) / 2
    print("= (p − q) / 2:", torch.allclose(logits.grad, expected, atol=1e-6))

    # From hidden states and the LM head: the same loss, without the logits of all tokens in memory.
    torch.manual_seed(0)
    hidden, better, weight = torch.randn(1, 2, 4), torch.randn(1, 2, 4), torch.randn(6, 4)
    fused = sdpo.fused_distillation_loss(
        sdpo.LMHead(hidden, weight), sdpo.LMHead(better, weight), torch.tensor([[0, 1]]),
        support="student", k=3, tail="bucket", alpha=0.5, temperature=1.0, loss_mask=mask,
    )  # fmt: skip
    plain = sdpo.distillation_loss(
        hidden @ weight.T,
        better @ weight.T,
        support="student",
        k=3,
        tail="bucket",
        alpha=0.5,
        temperature=1.0,
    )
    print(f"from hidden states {fused.mean():.6f}, from logits {plain.mean():.6f}")


if __name__ == "__main__":
    main()
