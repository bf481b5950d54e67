"""The work of the fused loss, counted: its products of matrices, the tokens in them, its largest tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fused_cases import Answer, divide_by_the_mask, fused, make_case
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Watch(TorchDispatchMode):
    """The sizes of every product of matrices, and the largest tensor any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[int, int, int]] = []  # [a, b] @ [b, c]
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        aten = torch.ops.aten
        first = {aten.mm: 0, aten.addmm: 1, aten.addmm_: 1, aten.bmm: 0, aten.baddbmm: 1}.get(
            func.overloadpacket
        )
        if first is not None:
            left, right = args[first : first + 2]
            self.products.append((left.shape[-2], left.shape[-1], right.shape[-1]))
        made = [result] if isinstance(result, Tensor) else []
        self.largest = max([self.largest, *(tensor.numel() for tensor in made)])
        return result


@pytest.mark.parametrize(("head_learns", "products"), [(False, 3), (True, 4)])
@pytest.mark.parametrize(
    "scalars", [{}, {"k": None}, {"k": None, "support": "sampled", "alpha": 1.0}], ids=str
)
def test_no_product_is_made_twice(scalars: dict[str, Any], head_learns: bool, products: int) -> None:
    case = make_case(12, n=16, v=507, d=5, biases=False, **scalars)
    hidden = case.tensors["student_hidden"].requires_grad_()
    head = case.tensors["student_head"].requires_grad_(head_learns)
    with Watch() as watch:
        case.fused(backend="torch").total.backward()
    assert len(watch.products) == products
    hidden.grad = head.grad = None
    with Watch() as watch:
        case.plain_total().backward()
    assert watch.largest >= 16 * 507


@pytest.mark.parametrize("options", [{}, {"chunk_size": 6}, {"reduction": "none"}], ids=str)
@pytest.mark.parametrize("implementation", [fused, divide_by_the_mask])
def test_masked_tokens_enter_no_product(
    implementation: Callable[..., Answer], options: dict[str, Any]
) -> None:
    """The tokens of a product are that one of its sizes which is neither V nor D."""
    case = make_case(5, n=20, v=507, d=31, teacher_d=29)
    active = int(case.tensors["loss_mask"].sum())
    with Watch() as watch:
        implementation(case, **options)
    tokens = [size for sizes in watch.products for size in sizes if size not in (507, 31, 29)]
    assert len(tokens) == len(watch.products)
    # Logits of both models, gradients of hidden states and head; without a sum the pass runs again in backward.
    passes = 2 if options.get("reduction") == "none" else 1
    expected = active * (2 * passes + 2)
    assert (sum(tokens) == expected) == (implementation is fused)


def test_no_tensor_of_all_logits_ever_exists() -> None:
    case, _ = make_case(13, n=64, v=507, d=5).leaves()
    with Watch() as watch:
        case.fused(backend="torch", chunk_size=4).total.backward()
    assert watch.largest <= 8 * 507
