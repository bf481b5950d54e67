"""Grouped heads: the kernel of packed rows gets keys and values that are not repeated for each query head."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_packing import PACKABLE, gradient, losses
from test_prompts_once import ROWS, shared_losses
from test_row_attention import stand_in
from torch import Tensor
from transformers.integrations import sdpa_attention

from sdpo_rl.step import row_attention
from sdpo_rl.step.row_attention import RowMask, grouped_heads

GROUPED = ("llama", "qwen2", "qwen3", "gemma3, windows", "mistral, a window shorter than a row", "lora")


def watch(patch: pytest.MonkeyPatch, *, takes: bool = True, takes_groups: bool = True) -> list[list[int]]:
    """A stand-in on the CPU; the heads of query, key and value in each of its calls."""
    heads: list[list[int]] = []

    @functools.wraps(stand_in)
    def kernel(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        heads.append([each.shape[1] for each in (query, key, value)])
        repeated = (each.repeat_interleave(query.shape[1] // each.shape[1], dim=1) for each in (key, value))
        return stand_in(query, *repeated, *args, **options)

    patch.setattr(row_attention, "_KERNEL", kernel)
    patch.setattr(row_attention, "_kernel_takes", lambda *_: takes)
    patch.setattr(row_attention, "_TAKES_GROUPS", takes_groups)
    return heads


@pytest.mark.parametrize("name", GROUPED)
def test_losses_and_gradients_are_those_of_padded_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = PACKABLE[name]()
    expected = torch.stack(losses(model, ROWS, "padded"))
    wanted = gradient(model, expected.sum())
    heads = watch(monkeypatch)
    with grouped_heads():
        got = torch.stack(shared_losses(model, ROWS))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        assert (gradient(model, got.sum()) - wanted).norm() < 1e-5 * wanted.norm()
    config = model.config.get_text_config()
    grouped = [config.num_attention_heads, *2 * [config.num_key_value_heads]]
    assert grouped[1] < grouped[0]
    assert heads == [grouped] * config.num_hidden_layers


@pytest.mark.parametrize("changes", [{"takes": False}, {"takes_groups": False}])
def test_heads_are_repeated_for_a_kernel_that_does_not_take_groups(
    changes: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = PACKABLE["llama"](), []
    watch(monkeypatch, **changes)
    attention = row_attention._attention

    def watched(query: Tensor, key: Tensor, *args: Any, **options: Any) -> Tensor:
        seen.append((query.shape[1], key.shape[1], options.get("enable_gqa", False)))
        return attention(query, key, *args, **options)

    monkeypatch.setattr(row_attention, "_attention", watched)
    with grouped_heads():
        shared_losses(model, ROWS)
    assert set(seen) == {(2, 2, False)}


def test_a_step_passes_groups_and_transformers_is_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sdpa_attention.use_gqa_in_sdpa
    heads = watch(monkeypatch)
    trainer = tiny.trainer(
        tmp_path, sdpo_config=tiny.config(packing="packed"), max_steps=1, gradient_checkpointing=True
    )
    trainer.train()
    # Of two layers: the test of the model, the teacher, the student and its recomputation.
    assert len(heads) >= 3 * 2
    assert {tuple(each) for each in heads} == {(4, 2, 2)}
    assert sdpa_attention.use_gqa_in_sdpa is before
    with pytest.raises(ZeroDivisionError), grouped_heads():
        raise ZeroDivisionError
    assert sdpa_attention.use_gqa_in_sdpa is before


def test_regions_of_two_threads_may_end_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    watch(monkeypatch)
    before = sdpa_attention.use_gqa_in_sdpa
    first, second = grouped_heads(), grouped_heads()
    first.__enter__()
    inside = sdpa_attention.use_gqa_in_sdpa
    second.__enter__()
    first.__exit__(None, None, None)
    assert sdpa_attention.use_gqa_in_sdpa is inside is not before
    second.__exit__(None, None, None)
    assert sdpa_attention.use_gqa_in_sdpa is before


def test_other_masks_are_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    watch(monkeypatch)
    key, mask = torch.zeros(1, 2, 3, 4), torch.ones(3, 3, dtype=torch.bool)
    before = [sdpa_attention.use_gqa_in_sdpa(each, key, key) for each in (None, mask)]
    with grouped_heads():
        assert [sdpa_attention.use_gqa_in_sdpa(each, key, key) for each in (None, mask)] == before
        rows = RowMask(row_attention.Rows([3], [[0]], [3]), torch.device("cpu"))
        assert sdpa_attention.use_gqa_in_sdpa(rows, key, key)


@pytest.mark.skipif(not row_attention._TAKES_GROUPS, reason="needs the varlen_attn of torch 2.11")
@pytest.mark.parametrize("window", [(-1, 0), (3, 0)])
def test_the_kernel_is_one_operation_with_a_derivative(window: tuple[int, int]) -> None:
    """On the meta device, which computes shapes alone; the numbers need a GPU."""
    sizes = [(10, 4, 16), (14, 2, 16), (14, 2, 16)]
    tensors = [torch.empty(size, device="meta", dtype=torch.bfloat16, requires_grad=True) for size in sizes]
    lengths = torch.empty(3, device="meta", dtype=torch.int32)
    output = row_attention._flash(*tensors, lengths, lengths, 5, 7, scale=0.3, window_size=window)
    assert output.shape == (10, 4, 16)
    output.backward(torch.empty_like(output))
    assert [each.grad.shape for each in tensors] == [each.shape for each in tensors]
