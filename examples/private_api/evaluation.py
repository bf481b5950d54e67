"""Exact evaluation: the probability of the right call, and whether greedy decoding gives it, without sampling.

A module of `train.py`; nothing to run.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from statistics import fmean
from typing import Any, NamedTuple

import torch
from tasks import Task


class Score(NamedTuple):
    """Means over the tasks."""

    probability: float  # of sampling the right call at temperature 1
    accuracy: float  # share of tasks that greedy decoding answers with the right call


def prompt_ids(tokenizer: Any, task: Task) -> list[int]:
    """Token ids of a task's conversation, up to where the model continues."""
    text = tokenizer.apply_chat_template(task.prompt, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids


def answer_ids(tokenizer: Any, task: Task) -> list[int]:
    """Token ids of the right call and of the end of the turn."""
    return [*tokenizer(task.answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]


@torch.no_grad()
def evaluate(model: Any, tokenizer: Any, tasks: Sequence[Task], *, batch_size: int = 48) -> Score:
    """Teacher-force each right call: one forward gives its probability and whether greedy decoding finds it.

    ``p(answer | prompt) = prod_t p(y_t | prompt, y_<t)``. Greedy decoding gives the answer iff every ``y_t`` is the
    argmax. Another spelling of the same call counts as wrong, so both are lower bounds.
    """
    rows = [(prompt_ids(tokenizer, task), answer_ids(tokenizer, task)) for task in tasks]
    device = next(model.parameters()).device
    training, _ = model.training, model.eval()
    autocast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
    probabilities: list[float] = []
    found: list[bool] = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        width = max(len(prompt) + len(answer) for prompt, answer in batch)
        # Padding is on the right, where causal attention never reaches.
        ids = torch.tensor(
            [prompt + answer + [0] * (width - len(prompt + answer)) for prompt, answer in batch]
        )
        mask = torch.tensor([[1] * len(p + a) + [0] * (width - len(p + a)) for p, a in batch])
        with autocast:
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        for row, (prompt, answer) in zip(logits, batch, strict=True):
            log_probs = row[len(prompt) - 1 : len(prompt + answer) - 1].float().log_softmax(-1).cpu()
            target = torch.tensor(answer)
            probabilities.append(log_probs.gather(-1, target[:, None]).sum().exp().item())
            found.append(bool((log_probs.argmax(-1) == target).all()))
    model.train(training)
    return Score(fmean(probabilities), fmean(found))
