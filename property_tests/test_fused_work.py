"""The work of the fused loss: its matrix products, the tokens in them, its largest tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fused_cases import Result, fused, make_case, multiply_by_the_mask
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Recorder(TorchDispatchMode):
    """Records the sizes of every matrix product, and the largest tensor that any operation returned."""

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
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize(("trains_head", "products"), [(False, 3), (True, 4)])
@pytest.mark.parametrize("scalars", [{}, {"support": "full"}, {"support": "sampled"}], ids=str)
def test_no_product_is_computed_twice(scalars: dict[str, Any], trains_head: bool, products: int) -> None:
    case = make_case(12, n=16, v=507, d=5, biases=False, **scalars)
    hidden = case.tensors["student_hidden"].requires_grad_()
    weight = case.tensors["student_weight"].requires_grad_(trains_head)
    with Recorder() as recorder:
        case.fused(backend="torch").total.backward()
    assert len(recorder.products) == products
    hidden.grad = weight.grad = None
    with Recorder() as recorder:
        case.plain_total().backward()
    assert recorder.largest >= 16 * 507


@pytest.mark.parametrize("options", [{}, {"chunk_size": 6}, {"reduction": "none"}], ids=str)
@pytest.mark.parametrize("implementation", [fused, multiply_by_the_mask])
def test_masked_tokens_enter_no_product(
    implementation: Callable[..., Result], options: dict[str, Any]
) -> None:
    """A product's number of tokens is that of its sizes which is neither V nor D."""
    case = make_case(5, n=20, v=507, d=31, teacher_d=29)
    active = int(case.tensors["loss_mask"].sum())
    with Recorder() as recorder:
        implementation(case, **options)
    tokens = [size for sizes in recorder.products for size in sizes if size not in (507, 31, 29)]
    assert len(tokens) == len(recorder.products)
    # Logits of both models, gradients of hidden states and head; without a sum backward computes all again.
    traversals = 2 if options.get("reduction") == "none" else 1
    expected = active * (2 * traversals + 2)
    assert (sum(tokens) == expected) == (implementation is fused)


def test_no_tensor_of_all_logits_ever_exists() -> None:
    case, _ = make_case(13, n=64, v=507, d=5).leaves()
    with Recorder() as recorder:
        case.fused(backend="torch", chunk_size=4).total.backward()
    assert recorder.largest <= 8 * 507
