"""Hypothesis strategies shared by the tests, and `Claim`: a property, and a counter-example that it rejects."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

alphas = st.one_of(st.sampled_from([0.0, 1.0, 0.5]), st.floats(0.01, 0.99))
inner_alphas = st.floats(0.01, 0.99)
seeds = st.integers(0, 2**31 - 1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def logits(
    draw: st.DrawFn, *, shape: tuple[int, ...], masked: bool = True, max_scale: float = 30.0
) -> Tensor:
    """Float64 logits [*shape]: flat to very peaked, with ties, an offset, and −inf entries (never a whole row)."""
    rng = generator(draw(seeds))
    scale = draw(st.sampled_from([s for s in (0.1, 1.0, 5.0, 30.0, 300.0) if s <= max_scale]))
    values = torch.randn(shape, generator=rng, dtype=torch.float64) * scale
    if draw(st.booleans()):
        values = values.round()
    values = values + draw(st.sampled_from([0.0, 17.0, -40.0]))
    if masked and draw(st.booleans()):
        allowed = torch.randint(shape[-1], (*shape[:-1], 1), generator=rng)
        hidden = (torch.rand(shape, generator=rng) < 0.4).scatter(-1, allowed, False)
        values = values.masked_fill(hidden, -math.inf)
    return values


@st.composite
def logit_pairs(
    draw: st.DrawFn,
    *,
    masked: bool = True,
    same_mask: bool = False,
    max_scale: float = 30.0,
    min_vocabulary: int = 1,
    max_vocabulary: int = 9,
) -> tuple[Tensor, Tensor]:
    """Student and teacher logits of one shape [..., V]; with ``same_mask`` they exclude the same tokens."""
    leading = draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    shape = (*leading, draw(st.integers(min_vocabulary, max_vocabulary)))
    student = draw(logits(shape=shape, masked=masked, max_scale=max_scale))
    teacher = draw(logits(shape=shape, masked=masked and not same_mask, max_scale=max_scale))
    if same_mask:
        teacher = teacher.masked_fill(student.isneginf(), -math.inf)
    return student, teacher


@st.composite
def token_batches(draw: st.DrawFn, *, max_rows: int = 5, max_tokens: int = 6) -> tuple[Tensor, Tensor]:
    """Per-token values [B, T] float64 and a bool mask [B, T], possibly with rows that have no active token."""
    rows, tokens = draw(st.integers(1, max_rows)), draw(st.integers(1, max_tokens))
    rng = generator(draw(seeds))
    density = draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    values = torch.randn(rows, tokens, generator=rng, dtype=torch.float64)
    return values, torch.rand(rows, tokens, generator=rng) < density


@dataclass(frozen=True)
class Claim:
    """``check(implementation, **drawn)`` asserts a property: it must hold for ``right`` and fail for ``wrong``."""

    check: Callable[..., None]
    right: Callable[..., Any]
    wrong: Callable[..., Any]
    drawn: dict[str, st.SearchStrategy[Any]]

    def holds(self) -> None:
        given(**self.drawn)(lambda **values: self.check(self.right, **values))()

    def rejects_counter_example(self) -> None:
        search = settings(
            max_examples=300,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            report_multiple_bugs=False,
        )
        with pytest.raises(AssertionError):
            search(given(**self.drawn)(lambda **values: self.check(self.wrong, **values)))()


def name_of(claim: Claim) -> str:
    return claim.check.__name__.removeprefix("property_")


def assert_near(got: Tensor, expected: Tensor | float | list[Any], tolerance: float = 1e-9) -> None:
    """Equal up to ``tolerance``, relative to the larger of 1 and the value; NaN never equals, inf equals itself."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(got.to(torch.float64), expected, rtol=tolerance, atol=tolerance)
