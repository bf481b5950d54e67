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


def test_of_one_chunk_of_logits_alone() -> None:
    head, tokens, _ = inputs(4, shape=(8, 16))
    mask = torch.ones_like(tokens).bool()
    head.weight.requires_grad_()
    with Recorder() as recorder:
        got = sdpo.fused_log_probs(head, tokens, loss_mask=mask, temperature=1.0, chunk_size=4)
    assert recorder.largest <= max(head.hidden.numel(), 4 * 31)
    assert got.requires_grad
    with Recorder() as recorder:
        got.sum().backward()
    assert recorder.largest <= max(head.hidden.numel(), head.weight.numel(), 4 * 31)


# --- with a gradient --------------------------------------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "soft-cap": {"softcap": 3.0, "logit_scale": 0.5, "temperature": 1.3},
    "one chunk": {"chunk_size": 100},
}


def with_gradient(head: sdpo.LMHead) -> sdpo.LMHead:
    return sdpo.LMHead(*(None if part is None else part.clone().requires_grad_() for part in head))


def written_out(
    head: sdpo.LMHead,
    tokens: Tensor,
    *,
    loss_mask: Tensor,
    temperature: float,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    logits = logit_scale * (head.hidden @ head.weight.T + (0.0 if head.bias is None else head.bias))
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    log_p = (logits / temperature).log_softmax(-1)
    entropy = -(log_p.exp() * log_p.clamp(min=-1e9)).sum(-1)
    sampled = log_p.gather(-1, tokens[..., None])[..., 0]
    return sampled.masked_fill(~loss_mask, 0.0), entropy.masked_fill(~loss_mask, 0.0)


def gradients(implementation: Callable[..., Any], head: sdpo.LMHead, *arguments: Any, **options: Any) -> Any:
    """Both values, and the gradients of a random linear function of them."""
    head = with_gradient(head)
    log_probs, entropy = implementation(head, *arguments, **options)
    rng = torch.Generator().manual_seed(1)
    factors = torch.randn(2, *entropy.shape, generator=rng, dtype=torch.float64).to(entropy.dtype)
    total = (factors[0] * log_probs + factors[1] * entropy).sum()
    parts = [part for part in head if part is not None]
    return log_probs.detach(), entropy.detach(), *torch.autograd.grad(total, parts)


def property_both_gradients(implementation: Callable[..., Any], case: str, bias: bool) -> None:
    head, tokens, mask = inputs(8, bias=bias)
    options = {"loss_mask": mask, "temperature": 1.0, "chunk_size": 4, **CASES[case]}
    expected = gradients(written_out, head, tokens, **options)
    got = gradients(implementation, head, tokens, **options)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_whole_logits(case: str, bias: bool) -> None:
    property_both_gradients(sdpo.fused_log_probs_and_entropy, case, bias)


def without_gradient_of_the_entropy(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    log_probs, entropy = sdpo.fused_log_probs_and_entropy(*arguments, **options)
    return log_probs, entropy.detach()


def entropy_at_the_temperature_1(head: Any, tokens: Any, **options: Any) -> tuple[Tensor, Tensor]:
    both = sdpo.fused_log_probs_and_entropy(head, tokens, **options)
    return both.log_probs, sdpo.fused_log_probs_and_entropy(
        head, tokens, **{**options, "temperature": 1.0}
    ).entropy


@pytest.mark.parametrize("wrong", [without_gradient_of_the_entropy, entropy_at_the_temperature_1])
def test_the_comparison_of_gradients_rejects(wrong: Callable[..., Any]) -> None:
    with pytest.raises(AssertionError):
        property_both_gradients(wrong, "temperature", True)


@pytest.mark.parametrize("case", ["plain", "soft-cap"])
def test_finite_differences(case: str) -> None:
    head, tokens, mask = inputs(9, shape=(2, 3))
    options = {"loss_mask": mask, "temperature": 1.0, "chunk_size": 4, **CASES[case]}

    def function(*parts: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(sdpo.fused_log_probs_and_entropy(sdpo.LMHead(*parts), tokens, **options))

    parts = [part for part in with_gradient(head) if part is not None]
    assert torch.autograd.gradcheck(function, parts)


@pytest.mark.parametrize("trainable", ["hidden", "weight", "bias"])
def test_only_what_requires_a_gradient_gets_one(trainable: str) -> None:
    head, tokens, mask = inputs(10)
    getattr(head, trainable).requires_grad_()
    options: dict[str, Any] = {"loss_mask": mask, "temperature": 1.0}
    sdpo.fused_log_probs(head, tokens, **options).sum().backward()
    got = getattr(head, trainable).grad.clone()
    getattr(head, trainable).grad = None
    written_out(head, tokens, **options)[0].sum().backward()
    torch.testing.assert_close(got, getattr(head, trainable).grad)
    assert [name for name, part in head._asdict().items() if part.grad is not None] == [trainable]


def test_impossible_tokens_have_no_share() -> None:
    head, tokens, _ = inputs(11)
    mask = torch.ones_like(tokens).bool()
    head.bias[3:20] = -torch.inf
    tokens = tokens % 3
    options: dict[str, Any] = {"loss_mask": mask, "temperature": 1.0}
    got = gradients(sdpo.fused_log_probs_and_entropy, head, tokens, **options)
    possible = torch.cat([torch.arange(3), torch.arange(20, 31)])
    smaller = sdpo.LMHead(head.hidden, head.weight[possible], head.bias[possible])
    expected = gradients(written_out, smaller, tokens, **options)
    torch.testing.assert_close(got[:3], expected[:3])
    torch.testing.assert_close(got[3][possible], expected[3])
    assert not got[3][3:20].any()
    assert not got[4][3:20].any()


def test_a_nearly_certain_token_has_an_exact_gradient() -> None:
    """1 − p is 1e-7 or less: in float32 a difference of near equals would be 0 or a multiple of 6e-8."""
    head, tokens, mask = inputs(12, bias=False)
    mask = torch.ones_like(mask)
    head = sdpo.LMHead(torch.zeros_like(head.hidden), head.weight, torch.zeros(31, dtype=torch.float64))
    head.bias[5] = 20.0
    tokens = torch.full_like(tokens, 5)
    low = sdpo.LMHead(*(part.float() for part in head))

    def of_bias(each: sdpo.LMHead) -> Tensor:
        each = with_gradient(each)
        log_probs = sdpo.fused_log_probs(each, tokens, loss_mask=mask, temperature=1.0)
        return torch.autograd.grad(log_probs.sum(), each.bias)[0]

    torch.testing.assert_close(of_bias(low).double(), of_bias(head), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_have_float32_gradients_inside(dtype: torch.dtype) -> None:
    head, tokens, mask = inputs(13)
    low = sdpo.LMHead(*(part.to(dtype) for part in head if part is not None))
    exact = sdpo.LMHead(*(part.double() for part in low if part is not None))
    options: dict[str, Any] = {"loss_mask": mask, "temperature": 1.0, "chunk_size": 4}
    got = gradients(sdpo.fused_log_probs_and_entropy, low, tokens, **options)
    expected = gradients(written_out, exact, tokens, **options)
    assert [g.dtype for g in got[2:]] == [dtype] * 3
    for mine, theirs in zip(got, expected, strict=True):
        assert ((mine.double() - theirs).norm() / theirs.norm()).item() < torch.finfo(dtype).eps


def test_under_torch_func_grad() -> None:
    head, tokens, mask = inputs(14)

    def loss(implementation: Callable[..., Any], hidden: Tensor) -> Tensor:
        values = implementation(head._replace(hidden=hidden), tokens, loss_mask=mask, temperature=1.0)
        return sum(value.sum() for value in values)

    got, expected = (
        torch.func.grad(lambda hidden, f=function: loss(f, hidden))(head.hidden)
        for function in (sdpo.fused_log_probs_and_entropy, written_out)
    )
    torch.testing.assert_close(got, expected)


def test_what_is_not_supported_is_refused() -> None:
    head, tokens, mask = inputs(15)
    options: dict[str, Any] = {"loss_mask": mask, "temperature": 1.0}
    head.hidden.requires_grad_()
    (grad,) = torch.autograd.grad(
        sdpo.fused_log_probs(head, tokens, **options).sum(), head.hidden, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="a second derivative"):
        grad.sum().backward()
    with pytest.raises(NotImplementedError, match=r"torch\.func\.vmap"):
        torch.func.vmap(
            lambda hidden: sdpo.fused_log_probs(
                head._replace(hidden=hidden), tokens[0], loss_mask=mask[0], temperature=1.0
            )
        )(head.hidden.detach())


def test_without_a_gradient_nothing_is_kept() -> None:
    head, tokens, mask = inputs(16)
    head.weight.requires_grad_()
    with torch.no_grad():
        both = sdpo.fused_log_probs_and_entropy(head, tokens, loss_mask=mask, temperature=1.0)
    assert not any(value.requires_grad for value in both)


# --- edges ------------------------------------------------------------------------------------------------


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
        ({"softcap": float("inf")}, ValueError, r"softcap: expected a number in \(0, inf\), got inf"),
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
