"""TRL's log-probabilities on a CPU, whose kernel is replaced there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from trl.trainer import utils

from sdpo_rl.compat import trl as compat_trl


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
def test_values_and_gradients_are_those_of_the_formula(
    monkeypatch: pytest.MonkeyPatch, softcap: float | None, bias: bool, entropy: bool
) -> None:
    monkeypatch.setattr(compat_trl, "_CHUNK", 3 * 11)  # several chunks, the last one smaller
    rng = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=rng) for shape in ((7, 5), (11, 5), (11,))][: 3 if bias else 2]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    targets, factors = torch.randint(11, (7,), generator=rng), torch.randn(2, 7, generator=rng)
    outputs = ("log_probs", "entropy") if entropy else ("log_probs",)
    given = [*leaves, *([] if bias else [None])]
    got = compat_trl.ChunkedLogProbs.apply(*given, targets, 0.8, 32768, softcap, 0.7, outputs)
    assert (got[1] is not None) == entropy
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    logits = (exact[0] @ exact[1].T + (exact[2] if bias else 0.0)) * 0.7
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    log_p = (logits / 0.8).log_softmax(-1)
    expected = [log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)][: len(outputs)]
    for value, formula in zip(got, expected, strict=False):
        torch.testing.assert_close(value.double(), formula, rtol=1e-5, atol=1e-5)

    def gradients(values: Any, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        total = sum((value * factor).sum() for value, factor in zip(values, factors, strict=False))
        return torch.autograd.grad(total, inputs)

    got_grads, expected_grads = gradients(got[: len(outputs)], leaves), gradients(expected, exact)
    for gradient, formula in zip(got_grads, expected_grads, strict=True):
        torch.testing.assert_close(gradient.double(), formula, rtol=1e-4, atol=1e-5)


def test_an_impossible_token_has_no_entropy() -> None:
    hidden = torch.ones(1, 1, requires_grad=True)
    bias = torch.tensor([0.0, 0.0, float("-inf")])
    log_probs, entropy, *_ = compat_trl.ChunkedLogProbs.apply(
        hidden, torch.zeros(3, 1), bias, torch.tensor([0]), 1.0, 32768, None, 1.0, ("log_probs", "entropy")
    )
    (gradient,) = torch.autograd.grad(log_probs.sum() + entropy.sum(), hidden)
    assert entropy.item() == pytest.approx(torch.tensor(2.0).log().item())
    assert gradient.isfinite().all()


def test_an_output_that_grpo_does_not_use_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="got \\['is_top1'\\]"):
        compat_trl.ChunkedLogProbs.apply(
            torch.ones(1, 1), torch.ones(2, 1), None, torch.tensor([0]), 1.0, 1, None, 1.0, ("is_top1",)
        )


@pytest.mark.parametrize(("device", "replaced"), [("cpu", True), ("meta", False)])
def test_the_kernel_is_replaced_on_a_cpu_during_a_call_alone(device: str, replaced: bool) -> None:
    kernel = utils._ChunkedLogProbFunction
    with compat_trl.torch_kernel(torch.device(device)):
        assert (utils._ChunkedLogProbFunction is compat_trl.ChunkedLogProbs) == replaced
    assert utils._ChunkedLogProbFunction is kernel
