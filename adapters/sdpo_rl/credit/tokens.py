"""What both models say of the tokens of one row: their likeliest tokens, and every token as a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

import sdpo

from ..step.head import HeadTransform

# Positions whose logits exist at a time: 80 MB in float32 with a vocabulary of 150 000.
_CHUNK = 128
# Tokens that may be parts of one character; more are shown as they are.
_PARTS = 8

Output = sdpo.LMHead | Tensor  # hidden states and head, or logits [B, T, V]
Likeliest = list[list[tuple[int, float]]]


class LogitSettings(NamedTuple):
    """What turns the outputs of both models into the distributions of the loss.

    Args:
        transform: what the model does to its logits after the head.
        temperature: of the rollout.
        trust_region_coef: weight of the live model's logits, where a teacher is two models.
    """

    transform: HeadTransform
    temperature: float
    trust_region_coef: float


def likeliest_tokens(
    outputs: Sequence[Output], row: int, length: int, settings: LogitSettings, *, k: int
) -> Likeliest:
    """Ids and probabilities of the k likeliest tokens at the first `length` positions of a row, likeliest first.

    Args:
        outputs: of one model, or of the reference and the live model of a trust region.
        row: of the batch.
        length: positions.
        settings: of the loss.
        k: tokens of each position; at most the vocabulary.
    """
    found: Likeliest = []
    for start in range(0, length, _CHUNK):
        positions = slice(start, min(start + _CHUNK, length))
        logits = [_logits(output, row, positions, settings.transform) for output in outputs]
        mixed = logits[0]
        if len(logits) == 2:
            mixed = sdpo.trust_region_logits(*logits, coef=settings.trust_region_coef)
        top = (mixed / settings.temperature).softmax(-1).topk(min(k, mixed.shape[-1]), dim=-1)
        for ids, probabilities in zip(top.indices.tolist(), top.values.tolist(), strict=True):
            found.append(list(zip(ids, probabilities, strict=True)))
    return found


def _logits(output: Output, row: int, positions: slice, transform: HeadTransform) -> Tensor:
    """Logits [t, V] float32 of some positions of a row."""
    if not isinstance(output, sdpo.LMHead):
        return output[row, positions].float()
    logits = linear(output.hidden[row, positions], output.weight, output.bias).float()
    logits = logits * transform.logit_scale
    if transform.softcap is None:
        return logits
    return transform.softcap * torch.tanh(logits / transform.softcap)


def token_texts(ids: Sequence[int], decode: Callable[[list[int]], str]) -> list[str]:
    """The text that each token adds; together they are the text of all.

    A token that ends within a character adds nothing, and the one that completes it the whole character.

    Args:
        ids: tokens in order.
        decode: text of a list of tokens, special ones included.

    Examples:
        >>> token_texts([104, 195, 164], lambda ids: bytes(ids).decode(errors="replace"))
        ['h', '', 'ä']
    """
    texts: list[str] = []
    first = start = (
        0  # a decoder may treat the first token of a text in its own way: `first` is one token before
    )
    for i in range(len(ids)):
        before, now = decode(list(ids[first:start])), decode(list(ids[first : i + 1]))
        incomplete = now.endswith("\N{REPLACEMENT CHARACTER}") and i + 1 < len(ids)
        if incomplete and i + 1 - start < _PARTS:
            texts.append("")
            continue
        texts.append(now[len(before) :])
        first, start = start, i + 1
    return texts


def token_text(token: int, decode: Callable[[list[int]], str]) -> str:
    """The text of one token, as within a text: some decoders drop the space of a first token."""
    return decode([token, token])[len(decode([token])) :]
