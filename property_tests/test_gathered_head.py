"""A head whose weight exists only around its own calls, as under DeepSpeed ZeRO-3; here by hooks of the test."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_hidden_states import LENGTH, arguments, build, head_trained_in_full
from torch import Tensor, nn

import sdpo
from sdpo_rl.step.forward import completion_head
from sdpo_rl.step.head import call_with, head_transform, linear_head, transform_matches

TOKENS = torch.arange(2 * LENGTH).view(2, LENGTH) % 7


def frozen_head() -> nn.Module:
    model = build("Qwen2", tie_word_embeddings=False)
    model.get_output_embeddings().requires_grad_(False)
    return model


MODELS = {
    "plain": lambda: build("Qwen2", tie_word_embeddings=False),
    "frozen": frozen_head,
    "tied": lambda: build("Qwen2", tie_word_embeddings=True),
    "trained beside adapters": head_trained_in_full,
}


class Gathered:
    """Hooks that fill the weight before a call and before its backward pass, and empty it after the call."""

    def __init__(self, head: nn.Linear) -> None:
        self.weight = head.weight
        self.full = head.weight.detach().clone()
        if head.weight.requires_grad:
            # Autograd notes the shape of a gradient when the node is made.
            self.node = head.weight.expand_as(head.weight).grad_fn.next_functions[0][0]
        head.register_forward_pre_hook(lambda *_: self.fill())
        head.register_forward_hook(self.after)
        self.empty()

    def fill(self, *_: Any) -> None:
        self.weight.data = self.full

    def empty(self) -> None:
        self.weight.data = self.full.new_empty(0)

    def after(self, head: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(self.fill)
        self.empty()


def loss(student: sdpo.LMHead, reduction: Any) -> Tensor:
    teacher = student._replace(hidden=student.hidden.detach().flip(0))
    output = sdpo.fused_distillation_loss(
        student,
        teacher,
        TOKENS,
        support="student",
        k=5,
        tail="bucket",
        alpha=0.5,
        temperature=1.3,
        loss_mask=TOKENS > 0,
        reduction=reduction,
        chunk_size=3,
    )
    return output.total if reduction == "sum" else (output.per_token * TOKENS).sum()


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("name", MODELS)
def test_the_loss_within_a_call_of_the_head_has_the_gradients_of_a_head_that_stays(
    name: str, reduction: str
) -> None:
    """With "none" backward computes all chunks again, with the weight of then."""
    whole, model = MODELS[name](), MODELS[name]()
    expected = loss(completion_head(whole, whole, arguments(whole), length=LENGTH), reduction)
    expected.backward()
    gathered = Gathered(linear_head(model.get_output_embeddings()))
    if name == "tied":
        gathered.fill()
        model.model.embed_tokens.register_forward_pre_hook(gathered.fill)
    student = completion_head(model, model, arguments(model), length=LENGTH)
    assert student.weight.numel() == 0
    with pytest.raises(ValueError, match="weight"):
        loss(student, reduction)

    found = call_with(
        model.get_output_embeddings(),
        lambda hidden: loss(student._replace(hidden=hidden), reduction),
        student.hidden,
    )
    assert student.weight.numel() == 0
    found.backward()
    torch.testing.assert_close(found, expected)
    wanted = gradients(whole)
    assert gradients(model).keys() == wanted.keys()
    assert any("lm_head" in key or (name == "tied" and "embed" in key) for key in wanted) == (
        name != "frozen"
    )
    for key, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[key])


@pytest.mark.parametrize("name", MODELS)
def test_the_transform_is_checked_within_a_call_of_the_head(name: str) -> None:
    model = MODELS[name]()
    gathered = Gathered(linear_head(model.get_output_embeddings()))
    if name == "tied":
        model.model.embed_tokens.register_forward_pre_hook(gathered.fill)
    transform = head_transform(model.config)
    assert transform_matches(model, arguments(model), transform)
    assert not transform_matches(model, arguments(model), transform._replace(logit_scale=1.2))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("replaced", [False, True], ids=["the class's forward", "a forward of its own"])
def test_the_head_has_its_forward_again_also_after_an_error(name: str, replaced: bool) -> None:
    model = MODELS[name]()
    module = model.get_output_embeddings()
    head: Any = linear_head(module)
    if replaced:
        head.forward = lambda hidden: hidden @ head.weight.T + 1.0
    hidden = torch.ones(2, 3, head.in_features)
    before = module(hidden)
    assert call_with(module, lambda values: values.sum(), hidden) == hidden.sum()
    torch.testing.assert_close(module(hidden), before)

    def fail(values: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call_with(module, fail, hidden)
    torch.testing.assert_close(module(hidden), before)
    assert ("forward" in vars(head)) == replaced


def test_a_head_that_is_not_linear_is_refused() -> None:
    with pytest.raises(ValueError, match="LM head: expected a plain linear layer"):
        call_with(nn.Identity(), torch.sum, torch.ones(1, 2, 3))
