"""Exact evaluation of the demo: the probability that the model gives the right answer, without sampling.

A module of `run.py` and `pretrain.py`; nothing to run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from language import encode_answer, encode_question
from transformers import PreTrainedModel, PreTrainedTokenizerFast


class Evaluation(NamedTuple):
    """What the policy would do on N questions."""

    probability: torch.Tensor  # [N] float32, of sampling the right answer at temperature 1
    greedy: torch.Tensor  # [N] bool, whether greedy decoding gives the right answer


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[str],
    answers: Sequence[str],
) -> Evaluation:
    """Teacher-force each answer: one forward pass gives its probability and whether greedy decoding finds it.

    ``p(answer | question) = prod_t p(y_t | question, y_<t)`` over the answer's tokens and its <eos>. That is also
    the expected accuracy at temperature 1. Greedy decoding gives the answer iff every ``y_t`` is the argmax.
    """
    asked = [encode_question(tokenizer, question) for question in questions]
    rows = [ids + encode_answer(tokenizer, answer) for ids, answer in zip(asked, answers, strict=True)]
    width = max(map(len, rows))
    # Padding is on the right, where causal attention never reaches.
    tokens = torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids in rows])
    start = torch.tensor([len(ids) for ids in asked])[:, None]
    end = torch.tensor([len(ids) for ids in rows])[:, None]
    position = torch.arange(1, width)
    in_answer = (start <= position) & (position < end)

    log_probs = model(input_ids=tokens.to(model.device)).logits.float().log_softmax(-1)[:, :-1].cpu()
    of_answer = log_probs.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    is_argmax = log_probs.argmax(-1) == tokens[:, 1:]
    return Evaluation(of_answer.where(in_answer, 0.0).sum(-1).exp(), (is_argmax | ~in_answer).all(-1))


@torch.no_grad()
def complete(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, question: str) -> str:
    """The greedy completion of one question."""
    prompt = torch.tensor([encode_question(tokenizer, question)], device=model.device)
    output = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=24
    )
    return tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)
