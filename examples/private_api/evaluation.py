"""Evaluation on held-out questions: what greedy decoding replies, and the probability of the right answer.

A module of `train.py`; nothing to run.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from statistics import fmean
from typing import Any, NamedTuple

import torch
from environment import Environment, Question
from transformers import GenerationConfig

BATCH = 32  # questions of a forward whose logits are over the whole vocabulary
COMPLETED = 96  # questions completed at a time


class Score(NamedTuple):
    """Means over the questions."""

    probability: float  # of sampling `Question.answer` at temperature 1
    accuracy: float  # the judge's mean score of greedy completions


def prompt_ids(tokenizer: Any, question: Question) -> list[int]:
    """Token ids of a conversation, up to where the model continues."""
    text = tokenizer.apply_chat_template(question.prompt, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids


def end_turns_with_eos(tokenizer: Any) -> None:
    """Make the token that ends a turn in the chat template the tokenizer's EOS token.

    Some files name the one that ends a document: completions would go on after their turn.
    """
    prompt = [{"role": "user", "content": "question"}]
    begun = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    whole = [*prompt, {"role": "assistant", "content": "answer"}]
    rest = tokenizer.apply_chat_template(whole, tokenize=False).removeprefix(f"{begun}answer")
    token = next(iter(tokenizer.tokenize(rest)), None)
    if token in tokenizer.all_special_tokens or token in tokenizer.get_added_vocab():
        tokenizer.eos_token = token


def answer_ids(tokenizer: Any, question: Question) -> list[int]:
    """Token ids of the right answer and of the end of the turn."""
    return [*tokenizer(question.answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]


def evaluate(model: Any, tokenizer: Any, environment: Environment, questions: Sequence[Question]) -> Score:
    """Probability of the right answers, and greedy accuracy.

    The accuracy is the judge's. A comparison with `Question.answer` would count every other spelling of it as
    wrong, and a run that changes its spelling as one that forgets.
    """
    training, _ = model.training, model.eval()
    texts = complete(model, tokenizer, environment, questions)
    verdicts = [environment.judge(text, **q.columns) for text, q in zip(texts, questions, strict=True)]
    score = Score(probability(model, tokenizer, questions), fmean(verdict.score for verdict in verdicts))
    model.train(training)
    return score


@torch.no_grad()
def probability(model: Any, tokenizer: Any, questions: Sequence[Question]) -> float:
    """Mean of ``p(answer | prompt) = prod_t p(y_t | prompt, y_<t)`` over the questions."""
    rows = [(prompt_ids(tokenizer, question), answer_ids(tokenizer, question)) for question in questions]
    device = next(model.parameters()).device
    likelihoods: list[torch.Tensor] = []  # kept on the device, so that the CPU waits only once
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        width = max(len(prompt) + len(answer) for prompt, answer in batch)
        # Padding is on the right, where causal attention never reaches.
        ids = torch.tensor(
            [prompt + answer + [0] * (width - len(prompt + answer)) for prompt, answer in batch]
        )
        mask = torch.tensor([[1] * len(p + a) + [0] * (width - len(p + a)) for p, a in batch])
        with autocast(device):
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        for row, (prompt, answer) in zip(logits, batch, strict=True):
            log_probs = row[len(prompt) - 1 : len(prompt + answer) - 1].float().log_softmax(-1)
            target = torch.tensor(answer, device=device)
            likelihoods.append(log_probs.gather(-1, target[:, None]).sum().exp())
    return torch.stack(likelihoods).mean().item()


@torch.no_grad()
def complete(
    model: Any, tokenizer: Any, environment: Environment, questions: Sequence[Question]
) -> list[str]:
    """Greedy completions."""
    device = next(model.parameters()).device
    pad = tokenizer.eos_token_id
    config = GenerationConfig(
        do_sample=False, max_new_tokens=environment.max_completion, pad_token_id=pad, eos_token_id=pad
    )
    texts: list[str] = []
    for start in range(0, len(questions), COMPLETED):
        rows = [prompt_ids(tokenizer, question) for question in questions[start : start + COMPLETED]]
        width = max(map(len, rows))
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        with autocast(device):
            output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        texts += tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    return texts


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 on a GPU, as in training."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
