"""The loss in loops that keep other tensors: those of verl, prime-rl and ms-swift, for example.

    python examples/07_other_codebases.py

Such loops seldom have the logits of both models at hand. Three functions below take what they have, and the program
compares each gradient with that of the whole divergence KL(student‖teacher), over many sampled tokens:

* `log_probs_only`: log-probabilities of the sampled tokens, [B, T] (an actor like verl's).
* `packed_log_probs`: the same for packed sequences, [N] (a trainer like prime-rl's).
* `served_teacher`: the student's logits, and the top-K of a teacher that a server runs (as in ms-swift's GKD).

A student of one position stands for the model: its logits are the parameters.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

import sdpo

VOCABULARY, TOP = 32, 16


def log_probs_only(
    log_probs: Tensor,
    old_log_probs: Tensor,
    teacher_log_probs: Tensor,
    response_mask: Tensor,
    row_mask: Tensor,
) -> Tensor:
    """A policy loss, where such a loop calls its own: the teacher's log-ratio is the advantage of a token.

    `teacher_log_probs` come from the call that computes the reference's, with the teacher's weights and the
    reprompt as the prompt. Rows without a demonstration or feedback are left out by `row_mask`.
    """
    advantages = teacher_log_probs - old_log_probs
    per_token = sdpo.clipped_policy_gradient(
        log_probs, old_log_probs, advantages, clip_low=0.2, clip_high=0.28
    )
    return sdpo.self_distillation_loss(per_token, response_mask, row_mask=row_mask).mean()


def packed_log_probs(
    log_probs: Tensor, teacher_log_probs: Tensor, loss_mask: Tensor, cu_seqlens: Tensor
) -> Tensor:
    """The reverse divergence of packed tokens, a mean over sequences; `loss_mask` is false for prompts."""
    per_token = sdpo.sampled_reverse_kl(log_probs, teacher_log_probs)
    segments = sdpo.packed_segment_ids(cu_seqlens, num_tokens=len(per_token))
    return sdpo.packed_sequence_sum(
        per_token, loss_mask, segment_ids=segments, num_segments=len(cu_seqlens) - 1
    ).mean()


def served_teacher(logits: Tensor, ids: Tensor, teacher_log_probs: Tensor, loss_mask: Tensor) -> Tensor:
    """The divergence on the tokens that the server returned, and one bucket for all others."""
    per_token = sdpo.given_topk_distillation_loss(
        logits, ids, teacher_log_probs, tail="bucket", alpha=1.0, temperature=1.0
    )
    return sdpo.token_sum(per_token, loss_mask).mean()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=200_000)
    samples = parser.parse_args().samples

    rng = torch.Generator().manual_seed(0)
    teacher = 2.0 * torch.randn(VOCABULARY, generator=rng)
    student = (teacher + 0.5 * torch.randn(VOCABULARY, generator=rng)).requires_grad_()
    exact = sdpo.distillation_loss(student[None], teacher[None], support="full", alpha=1.0, temperature=1.0)
    (wanted,) = torch.autograd.grad(exact.sum(), student)

    # A rollout of rows with two tokens each, and what a loop keeps of it.
    probabilities = student.detach().softmax(-1).expand(samples // 2, -1)
    tokens = torch.multinomial(probabilities, 2, replacement=True, generator=rng)
    teacher_log_probs = teacher.log_softmax(-1)[tokens]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    rows = torch.ones(len(tokens), dtype=torch.bool)

    def now() -> Tensor:
        return student.log_softmax(-1)[tokens]

    top = sdpo.topk_log_probs(teacher, k=TOP)
    losses = {
        "log-probabilities only": log_probs_only(now(), now().detach(), teacher_log_probs, mask, rows),
        "packed log-probabilities": packed_log_probs(
            now().flatten(),
            teacher_log_probs.flatten(),
            mask.flatten(),
            torch.arange(0, tokens.numel() + 1, 2),
        ),
        f"a served teacher's top {TOP}": served_teacher(
            student[None], top.indices[None], top.log_probs[None], torch.ones(1, dtype=torch.bool)
        ),
    }
    for name, loss in losses.items():
        (gradient,) = torch.autograd.grad(loss, student)
        error = (gradient - wanted).norm() / wanted.norm()
        print(f"{name:27} gradient differs from that of the whole divergence by {error:.3f} of its norm")


if __name__ == "__main__":
    main()
