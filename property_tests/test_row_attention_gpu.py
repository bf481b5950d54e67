"""Attention of packed rows on a GPU: torch's kernel for sequences of different lengths against padded rows."""

from __future__ import annotations

import functools
import inspect
from importlib import import_module
from typing import Any

import pytest
import test_packing
import test_prompts_once
import torch
from test_packing import PACKABLE, Rows, batch_of, build, gradient, losses
from test_prompts_once import ROWS, shared_losses
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sdpo_rl.step import row_attention
from sdpo_rl.step.batch import TokenBatch
from sdpo_rl.step.model_check import row_attention_problem
from sdpo_rl.step.row_attention import RowMask

pytestmark = [
    pytest.mark.gpu,
    # The first product of a backward's thread, in a process that has run none.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA context"),
]

CUDA = torch.device("cuda")
# A group of three completions, a row that shares half its prompt, and one of its own.
PACKED = row_attention.Rows(
    [60, 70, 200, 1, 333, 90], [[0, 1, 2], [0, 1, 3], [0, 1, 4], [0, 5]], [330, 1, 333, 90]
)


def watched(patch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each call of the kernel got."""
    calls: list[int] = []
    true = row_attention._KERNEL
    assert true is not None, "torch has no varlen_attn"

    @functools.wraps(true)
    def kernel(*args: Any, **options: Any) -> Tensor:
        calls.append(len(args[0]))
        return true(*args, **options)

    patch.setattr(row_attention, "_KERNEL", kernel)
    return calls


def dense(rows: row_attention.Rows, window: int | None) -> Tensor:
    """Which pairs of tokens of the sequence attend each other, [N, N]."""
    tokens = sum(rows.own)
    pieces = torch.arange(tokens).split(list(rows.pieces))
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    for members, own in zip(rows.members, rows.own, strict=True):
        places = torch.cat([pieces[i] for i in members])
        for n in range(len(places) - own, len(places)):
            seen[places[n], places[max(0, n - window + 1) if window else 0 : n + 1]] = True
    return seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("window", [None, 1, 50])
@pytest.mark.parametrize("width", [64, 128, 36])
def test_attention_is_that_of_a_dense_mask(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, window: int | None, width: int
) -> None:
    torch.manual_seed(0)
    tokens = sum(PACKED.own)
    tensors = [torch.randn(1, 4, tokens, width, device=CUDA, dtype=dtype).requires_grad_() for _ in range(3)]
    weights = torch.randn(1, 4, tokens, width, device=CUDA, dtype=dtype)
    seen = dense(PACKED, window).to(CUDA)

    def results(mask: Any, precision: torch.dtype) -> list[Tensor]:
        converted = [each.detach().to(precision).requires_grad_() for each in tensors]
        output = scaled_dot_product_attention(*converted, attn_mask=mask)
        return [output, *torch.autograd.grad(output, converted, weights.to(precision))]

    exact = results(seen, torch.float64)
    calls = watched(monkeypatch)
    got = results(RowMask(PACKED, CUDA, window), dtype)
    has_window = "window_size" in inspect.signature(row_attention._KERNEL).parameters
    kernel_takes = dtype != torch.float32 and width % 8 == 0 and (window is None or has_window)
    assert calls == ([tokens] if kernel_takes else [])
    for ours, theirs, expected in zip(got, results(seen, dtype), exact, strict=True):
        error, allowed = (
            (each.double() - expected).norm() / (expected.norm() + 1.0) for each in (ours, theirs)
        )
        assert error < 2 * allowed + torch.finfo(dtype).eps


@pytest.mark.skipif(not row_attention._TAKES_GROUPS, reason="needs the varlen_attn of torch 2.11")
@pytest.mark.parametrize("window", [None, 50])
def test_grouped_heads_are_those_repeated_by_varlen_attn(
    monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    """The outputs bit by bit: log-probabilities are compared with those of another forward."""
    torch.manual_seed(0)
    tokens = sum(PACKED.own)
    tensors = [
        torch.randn(1, heads, tokens, 64, device=CUDA, dtype=torch.bfloat16).requires_grad_()
        for heads in (8, 2, 2)
    ]
    weights, mask = torch.randn_like(tensors[0]), RowMask(PACKED, CUDA, window)

    def results(repeats: int) -> list[Tensor]:
        query, *others = tensors
        others = [each.repeat_interleave(repeats, dim=1) for each in others]
        output = scaled_dot_product_attention(query, *others, attn_mask=mask, enable_gqa=repeats == 1)
        return [output, *torch.autograd.grad(output, tensors, weights)]

    ours = results(1)
    repeated = results(4)
    monkeypatch.setattr(row_attention, "_KERNEL", import_module("torch.nn.attention.varlen").varlen_attn)
    theirs = results(4)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(repeated[0], theirs[0])
    for got, expected in zip(ours, theirs, strict=True):
        assert (got.double() - expected.double()).norm() < 1e-2 * expected.double().norm()


def on_gpu(function: Any, model: Any, *args: Any) -> list[Tensor]:
    """`losses` and `shared_losses` of a batch on the GPU."""

    def moved(rows: Rows) -> TokenBatch:
        batch = batch_of(rows)
        return batch._replace(ids=batch.ids.to(CUDA), mask=batch.mask.to(CUDA))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_packing, "batch_of", moved)
        patch.setattr(test_prompts_once, "batch_of", moved)
        found: list[Tensor] = function(model, ROWS, *args)
    return found


@pytest.mark.parametrize("name", [name for name in PACKABLE if name not in ("llama, eager", "mixtral")])
def test_losses_in_float32_are_those_of_padded_rows(name: str) -> None:
    model = PACKABLE[name]().to(CUDA)
    expected = torch.stack(on_gpu(losses, model, "padded"))
    got = torch.stack(on_gpu(shared_losses, model))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    wanted = gradient(model, expected.sum())
    assert (gradient(model, got.sum()) - wanted).norm() < 1e-4 * wanted.norm()


WIDE = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}  # heads of 64


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Mistral"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_model_in_bfloat16(monkeypatch: pytest.MonkeyPatch, name: str, checkpointed: bool) -> None:
    """By the kernel; its error is that of padded rows."""
    calls = watched(monkeypatch)
    window = {"sliding_window": 4} if name == "Mistral" else {}
    model = build(name, initializer_range=0.1, **{**WIDE, **window}).to(CUDA)
    exact = gradient(model, torch.stack(on_gpu(losses, model, "padded")).sum())
    model.to(torch.bfloat16)
    assert row_attention_problem(model, batch_of(ROWS)) == ""
    padded = gradient(model, torch.stack(on_gpu(losses, model, "padded")).sum())
    calls.clear()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    total = torch.stack(on_gpu(shared_losses, model)).sum()
    got = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    ours = torch.cat([each.flatten() for each in got if each is not None])
    assert len(calls) == (4 if checkpointed else 2)
    assert (ours.float() - exact).norm() < 2 * (padded.float() - exact).norm() + 1e-2 * exact.norm()


def test_autocast_uses_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen3 leaves queries and keys in float32 beside values in bfloat16."""
    calls = watched(monkeypatch)
    model = build("Qwen3", head_dim=64, initializer_range=0.1).to(CUDA)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        expected = torch.stack(on_gpu(losses, model, "padded"))
        got = torch.stack(on_gpu(shared_losses, model))
        torch.testing.assert_close(got, expected, rtol=5e-2, atol=5e-2)
        gradient(model, got.sum())
    assert len(calls) == 2


def test_memory_follows_the_tokens() -> None:
    """A dense mask of these rows would take 16 GiB in bfloat16."""
    rows = row_attention.Rows([1024] * 90, [[i] for i in range(90)], [1024] * 90)
    tokens = sum(rows.own)
    tensors = [
        torch.randn(1, 1, tokens, 64, device=CUDA, dtype=torch.bfloat16).requires_grad_() for _ in range(3)
    ]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    scaled_dot_product_attention(*tensors, attn_mask=RowMask(rows, CUDA)).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 2**29
