"""Exact evaluation: the probability that the model gives the right answer, without drawing a single sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast


class Evaluation(NamedTuple):
    """What the policy would do on N questions."""

    probability: torch.Tensor  # [N] float32, of sampling the right answer at temperature 1
    greedy: torch.Tensor  # [N] bool, whether greedy decoding gives the right answer


@torch.no_grad()
def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, questions: Sequence[str], answers: Sequence[str]
) -> Evaluation:
    """Teacher-force each answer: one forward pass gives its probability and whether greedy decoding finds it.

    ``p(answer | question) = prod_t p(y_t | question, y_<t)`` over the answer's tokens and its <eos>. That is also
    the expected accuracy at temperature 1. Greedy decoding gives the answer iff every ``y_t`` is the argmax.
    """
    prefixes = [tokenizer(f"<user>{question}<assistant>").input_ids for question in questions]
    targets = [tokenizer(f"{answer}<eos>").input_ids for answer in answers]
    rows = [prefix + target for prefix, target in zip(prefixes, targets, strict=True)]
    width = max(map(len, rows))
    # Padding stands on the right, where a causal model never looks.
    tokens = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    starts = torch.tensor([len(prefix) for prefix in prefixes])[:, None]
    ends = torch.tensor([len(row) for row in rows])[:, None]
    position = torch.arange(1, width)
    is_answer = (position >= starts) & (position < ends)

    log_probs = model(input_ids=tokens.to(model.device)).logits.float().log_softmax(-1)[:, :-1].cpu()
    chosen = log_probs.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    best = log_probs.argmax(-1) == tokens[:, 1:]
    return Evaluation(chosen.where(is_answer, 0.0).sum(-1).exp(), (best | ~is_answer).all(-1))
