"""Log-probabilities from hidden states: those of whole logits, in the memory of a chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_fused_work import Recorder
from torch import Tensor

import sdpo

Implementation = Callable[..., Tensor]


def inputs(
    seed: int, *, bias: bool = True, shape: tuple[int, ...] = (3, 7)
) -> tuple[sdpo.LMHead, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, 5, generator=rng, dtype=torch.float64)
    weight = torch.randn(31, 5, generator=rng, dtype=torch.float64) * 2
    head_bias = torch.randn(31, generator=rng, dtype=torch.float64) if bias else None
    tokens = torch.randint(31, shape, generator=rng)
    return sdpo.LMHead(hidden, weight, head_bias), tokens, torch.rand(*shape, generator=rng) < 0.7


def property_those_of_whole_logits(
    implementation: Implementation,
    seed: int,
    bias: bool,
    temperature: float,
    softcap: float | None,
    chunk_size: int | None,
) -> None:
    head, tokens, mask = inputs(seed, bias=bias)
    got = implementation(
        head,
        tokens,
        loss_mask=mask,
        temperature=temperature,
        softcap=softcap,
        logit_scale=0.7,
        chunk_size=chunk_size,
    )
    logits = 0.7 * (head.hidden @ head.weight.T + (0.0 if head.bias is None else head.bias))
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = (logits / temperature).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    torch.testing.assert_close(got, expected.masked_fill(~mask, 0.0), rtol=1e-10, atol=1e-10)


@given(
    st.tuples(
        st.integers(0, 99),
        st.booleans(),
        st.sampled_from([0.5, 1.0]),
        st.sampled_from([None, 2.0]),
        st.sampled_from([None, 1, 4]),
    )
)
def test_those_of_whole_logits(case: tuple[Any, ...]) -> None:
    property_those_of_whole_logits(sdpo.fused_log_probs, *case)


def without_temperature(head: sdpo.LMHead, tokens: Tensor, **options: Any) -> Tensor:
    return sdpo.fused_log_probs(head, tokens, **(options | {"temperature": 1.0}))


def everywhere(head: sdpo.LMHead, tokens: Tensor, **options: Any) -> Tensor:
    return sdpo.fused_log_probs(head, tokens, **(options | {"loss_mask": torch.ones_like(tokens).bool()}))


@pytest.mark.parametrize("wrong", [without_temperature, everywhere])
def test_the_comparison_rejects(wrong: Implementation) -> None:
    with pytest.raises(AssertionError):
        property_those_of_whole_logits(wrong, 0, True, 0.5, None, 4)


def test_they_are_those_of_the_loss() -> None:
    head, tokens, mask = inputs(3)
    head = sdpo.LMHead(*(part.float() for part in head if part is not None))
    output = sdpo.fused_distillation_loss(
        head, head, tokens, support="sampled", alpha=1.0, temperature=0.8, loss_mask=mask
    )
    got = sdpo.fused_log_probs(head, tokens, loss_mask=mask, temperature=0.8)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, output.log_probs, rtol=1e-6, atol=1e-6)


def test_of_one_chunk_of_logits_alone_and_without_a_gradient() -> None:
    head, tokens, _ = inputs(4, shape=(8, 16))
    mask = torch.ones_like(tokens).bool()
    head.weight.requires_grad_()
    with Recorder() as recorder:
        got = sdpo.fused_log_probs(head, tokens, loss_mask=mask, temperature=1.0, chunk_size=4)
    assert recorder.largest <= max(head.hidden.numel(), 4 * 31)
    assert not got.requires_grad


@pytest.mark.parametrize("active", [0, 1])
def test_few_tokens_or_none(active: int) -> None:
    head, tokens, mask = inputs(5)
    mask = torch.zeros_like(mask)
    mask.view(-1)[:active] = True
    got = sdpo.fused_log_probs(head, tokens, loss_mask=mask, temperature=1.0)
    assert int((got != 0).sum()) == active


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_give_float32_products(dtype: torch.dtype) -> None:
    head, tokens, mask = inputs(6)
    low = sdpo.LMHead(*(part.to(dtype) for part in head if part is not None))
    exact = sdpo.LMHead(*(part.double() for part in low if part is not None))
    got, expected = (
        sdpo.fused_log_probs(each, tokens, loss_mask=mask, temperature=1.0) for each in (low, exact)
    )
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"temperature": 0.0}, ValueError, "temperature: expected"),
        ({"softcap": -1.0}, ValueError, "softcap: expected"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale: expected"),
        ({"chunk_size": 0}, ValueError, "chunk_size: expected"),
        ({"loss_mask": torch.ones(3, 7)}, TypeError, "loss_mask: expected"),
        ({"loss_mask": torch.ones(3, 6).bool()}, ValueError, "loss_mask: expected shape"),
        ({"tokens": torch.full((3, 7), 31)}, ValueError, "tokens: expected ids"),
        ({"student": torch.ones(3, 7, 5)}, TypeError, "student: expected an LMHead"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_by_name(changes: dict[str, Any], error: type, message: str) -> None:
    head, tokens, _ = inputs(7)
    mask = torch.ones_like(tokens).bool()
    arguments: dict[str, Any] = {"student": head, "tokens": tokens, "loss_mask": mask, "temperature": 1.0}
    with pytest.raises(error, match=message):
        sdpo.fused_log_probs(**(arguments | changes))
