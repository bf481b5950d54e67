"""Attention of packed rows by a `RowMask` is the attention of each row alone."""

from __future__ import annotations

import functools
import math
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora_cases import Operations
from strategies import Claim
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig

from sdpo_rl.step import row_attention
from sdpo_rl.step.row_attention import RowMask, Rows, row_masks

CPU = torch.device("cpu")


def tree(lengths: list[int], taken: list[int]) -> tuple[Rows, list[list[int]]]:
    """Rows whose first tokens are those of the row before, and the places of each row's tokens."""
    places: list[list[int]] = []
    own, start = [], 0
    for length, count in zip(lengths, taken, strict=True):
        before = places[-1][:count] if places else []
        own.append(length)
        places.append([*before, *range(start, start + length)])
        start += length
    # One piece for each token: the simplest cut.
    return Rows([1] * start, places, own), places


@st.composite
def trees(draw: Any) -> tuple[list[int], list[int]]:
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    taken = [0, *(draw(st.integers(0, total)) for total in accumulate(lengths[:-1]))]
    return lengths, taken


def inputs(tokens: int, heads: int, kv_heads: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    sizes = [(1, n, tokens, 4) for n in (heads, kv_heads, kv_heads)]
    return [
        torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for size in sizes
    ]


def by_definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    places: list[list[int]],
    own: list[int],
    window: int | None,
    scale: float,
) -> Tensor:
    """Token by token and head by head."""
    outputs = torch.zeros_like(query)
    for row, count in zip(places, own, strict=True):
        for n in range(len(row) - count, len(row)):
            first = 0 if window is None else max(0, n - window + 1)
            seen = row[first : n + 1]
            for head in range(query.shape[1]):
                source = head * key.shape[1] // query.shape[1]
                scores = key[0, source, seen] @ query[0, head, row[n]] * scale
                outputs[0, head, row[n]] = scores.softmax(0) @ value[0, source, seen]
    return outputs


def property_every_token_attends_its_row(
    attention: Any, shape: Any, window: int | None, grouped: bool
) -> None:
    rows, places = tree(*shape)
    tokens = sum(rows.own)
    tensors = inputs(tokens, 4, 2 if grouped else 4)
    scale = 0.7 / math.sqrt(4)
    mask = RowMask(rows, CPU, window)
    got = attention(*tensors, attn_mask=mask, scale=scale, enable_gqa=grouped)
    expected = by_definition(*tensors, places, list(rows.own), window, scale)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((each * weights).sum(), tensors) for each in (got, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def one_row(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, **options: Any) -> Tensor:
    return scaled_dot_product_attention(query, key, value, is_causal=True, **options)


CLAIM = Claim(
    property_every_token_attends_its_row,
    scaled_dot_product_attention,
    one_row,
    {"shape": trees(), "window": st.sampled_from([None, 1, 2, 3]), "grouped": st.booleans()},
)


def test_every_token_attends_its_row() -> None:
    CLAIM.holds()
    CLAIM.rejects_counter_example()


ROWS, PLACES = tree([4, 2, 3], [0, 3, 2])


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_computes_the_same_attention_again(reentrant: bool) -> None:
    """The mask travels with the arguments, by position as in GPT-2 and by name."""
    tensors = inputs(9, 2, 2)

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask)

    mask = RowMask(ROWS, CPU, 2)
    plain = torch.autograd.grad(attend(*tensors, mask).square().sum(), tensors)
    again = checkpoint(attend, *tensors, mask, use_reentrant=reentrant)
    again.square().sum().backward()
    for tensor, expected in zip(tensors, plain, strict=True):
        torch.testing.assert_close(tensor.grad, expected, rtol=1e-12, atol=1e-12)


def test_dropout_of_attention_weights() -> None:
    query, key, value = inputs(9, 2, 2)
    mask = RowMask(ROWS, CPU)
    whole = scaled_dot_product_attention(query, key, torch.ones_like(value), attn_mask=mask)
    torch.manual_seed(0)
    dropped = scaled_dot_product_attention(query, key, torch.ones_like(value), attn_mask=mask, dropout_p=0.5)
    torch.testing.assert_close(whole, torch.ones_like(whole))
    assert dropped.std() > 0.1


def test_autocast_converts_the_arguments() -> None:
    """Layers that normalize queries and keys leave float32 among bfloat16."""
    query, key, value = inputs(9, 2, 2, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = scaled_dot_product_attention(query, key, value.bfloat16(), attn_mask=RowMask(ROWS, CPU))
    assert output.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "use",
    [
        lambda mask: torch.zeros(9, 9) + mask,
        lambda mask: mask[:, :, :4, :4],
        lambda mask: mask.float(),
        lambda mask: torch.where(mask, 0.0, 1.0),
        lambda mask: mask.all(),
    ],
)
def test_any_other_use_is_refused(use: Any) -> None:
    with pytest.raises(TypeError, match=r"RowMask"):
        use(RowMask(ROWS, CPU))


@pytest.mark.parametrize("size", [(2, 2, 9, 4), (1, 2, 8, 4)])
def test_queries_of_another_shape_are_refused(size: tuple[int, ...]) -> None:
    query = torch.randn(size)
    with pytest.raises(ValueError, match=r"attention_mask: expected queries and keys \[1, H, 9, D\]"):
        scaled_dot_product_attention(query, query, query, attn_mask=RowMask(ROWS, CPU))


def test_a_mask_has_no_entries() -> None:
    rows = Rows([1 << 20], [[0]], [1 << 20])
    mask = RowMask(rows, CPU)
    assert mask.shape == (1, 1, 1 << 20, 1 << 20)
    assert mask.to("cpu") is mask
    assert mask.detach() is mask
    assert "1048576" in repr(mask)


def test_layers_with_and_without_a_window_get_their_own_masks() -> None:
    config = LlamaConfig()
    assert row_masks(config, ROWS, CPU).window is None
    config.sliding_window = 3
    assert row_masks(config, ROWS, CPU).window == 3
    config.layer_types = ["sliding_attention", "sliding_attention"]
    assert row_masks(config, ROWS, CPU).window == 3
    config.layer_types = ["full_attention", "full_attention"]
    assert row_masks(config, ROWS, CPU).window is None
    config.layer_types = ["sliding_attention", "full_attention"]
    masks = row_masks(config, ROWS, CPU)
    assert {name: mask.window for name, mask in masks.items()} == {
        "full_attention": None,
        "sliding_attention": 3,
    }


# --- torch's kernel, which needs a GPU, replaced by one that computes its documented semantics ------------------


def stand_in(
    query: Tensor, key: Tensor, value: Tensor, own: Tensor, lengths: Tensor, longest_own: int, longest: int,
    *, scale: float, window_size: tuple[int, int],
) -> Tensor:  # fmt: skip
    """Sequences of [N, H, D]; the last query meets the last key; `window_size` tokens before and after a query."""
    outputs = []
    for i in range(len(own) - 1):
        q = query[own[i] : own[i + 1]].transpose(0, 1)
        k, v = (each[lengths[i] : lengths[i + 1]].transpose(0, 1) for each in (key, value))
        assert q.shape[1] <= longest_own
        assert k.shape[1] <= longest
        distance = torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None] - torch.arange(k.shape[1])
        left, right = window_size
        seen = (distance >= -right) & ((distance <= left) if left >= 0 else True)
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, -math.inf)
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


def stand_in_2_10(*args: Any, is_causal: bool = False) -> Tensor:
    """Torch 2.10's has neither scale nor window."""
    return stand_in(*args, scale=args[0].shape[-1] ** -0.5, window_size=(-1, 0 if is_causal else 10**6))


def by_stand_in(kernel: Any, tensors: list[Tensor], **options: Any) -> tuple[Tensor, int]:
    """The attention, and how often the kernel ran."""
    calls: list[Any] = []

    @functools.wraps(kernel)
    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        return kernel(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_attention, "_KERNEL", counted)
        patch.setattr(row_attention, "_kernel_takes", lambda *_: True)
        return scaled_dot_product_attention(*tensors, **options), len(calls)


@given(shape=trees(), window=st.sampled_from([None, 1, 2, 3]))
def test_the_kernel_gets_the_rows(shape: Any, window: int | None) -> None:
    rows, _ = tree(*shape)
    tensors = inputs(sum(rows.own), 2, 2)
    mask = RowMask(rows, CPU, window)
    expected = scaled_dot_product_attention(*tensors, attn_mask=mask, scale=0.3)
    got, calls = by_stand_in(stand_in, tensors, attn_mask=mask, scale=0.3)
    assert calls == 1
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((output * weights).sum(), tensors) for output in (got, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@given(shape=trees())
def test_gradients_of_tokens_in_common_are_summed_and_rounded_once(shape: Any) -> None:
    rows, places = tree(*shape)
    generator = torch.Generator().manual_seed(0)
    key = torch.zeros(sum(rows.own), 1, 2, dtype=torch.bfloat16, requires_grad=True)
    index = row_attention._gather_index(rows, CPU)
    weights = torch.randn(len(index.tokens), 1, 2, generator=generator).bfloat16()
    outputs = row_attention._Gather.apply(index, key, key.detach())
    (got,) = torch.autograd.grad((outputs[0] * weights).sum(), key)
    expected = torch.zeros(key.shape, dtype=torch.float64)
    for token, weight in zip((token for row in places for token in row), weights, strict=True):
        expected[token] += weight
    # Half a unit in the last place, and what float32 loses where terms cancel.
    torch.testing.assert_close(got.double(), expected, rtol=2**-8, atol=1e-5)


def operations(groups: int, size: int = 2) -> int:
    """Of the kernel's attention over so many groups of rows with a prompt in common, and of its backward."""
    pieces = [5, *[4] * size] * groups
    members = [[(size + 1) * i, (size + 1) * i + j] for i in range(groups) for j in range(1, size + 1)]
    rows = Rows(pieces, members, [9, *[4] * (size - 1)] * groups)
    tensors, mask = inputs(sum(pieces), 2, 2), RowMask(rows, CPU)

    def kernel(query: Tensor, key: Tensor, value: Tensor, *_: Any, scale: Any, window_size: Any) -> Tensor:
        return query + key.sum() + value.sum()

    with Operations() as counted:
        output, _ = by_stand_in(kernel, tensors, attn_mask=mask, scale=0.3)
        output.sum().backward()
    return sum(counted.counts.values())


def test_more_rows_are_no_more_operations() -> None:
    """A small model's GPU waits for them, in every layer."""
    assert operations(8) == operations(1, size=16) == operations(1) <= 50


@pytest.mark.parametrize(
    ("kernel", "options", "used"),
    [
        (stand_in, {"scale": 0.3}, 1),
        (stand_in, {"scale": 0.3, "dropout_p": 0.5}, 0),
        (stand_in_2_10, {"scale": 0.5}, 1),
        (stand_in_2_10, {"scale": 0.3}, 0),
        (stand_in_2_10, {"scale": 0.5, "window": 2}, 0),
        (None, {"scale": 0.5}, 0),
    ],
)
def test_a_kernel_that_cannot_is_not_used(kernel: Any, options: dict[str, Any], used: int) -> None:
    mask = RowMask(ROWS, CPU, options.pop("window", None))
    tensors = inputs(9, 2, 2)
    if kernel is None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(row_attention, "_KERNEL", None)
            patch.setattr(row_attention, "_kernel_takes", lambda *_: True)
            got, calls = scaled_dot_product_attention(*tensors, attn_mask=mask, **options), 0
    else:
        got, calls = by_stand_in(kernel, tensors, attn_mask=mask, **options)
    assert calls == used
    if "dropout_p" not in options:
        expected = scaled_dot_product_attention(*tensors, attn_mask=mask, **options)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_torch_s_kernel_is_found_and_left_to_a_gpu() -> None:
    version = tuple(map(int, torch.__version__.split("+")[0].split(".")[:2]))
    assert (row_attention._KERNEL is not None) == (version >= (2, 10))
    assert not row_attention._kernel_takes(*inputs(4, 2, 2, torch.bfloat16))
