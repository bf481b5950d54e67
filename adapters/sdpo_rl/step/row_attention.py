"""Attention over packed rows without work across rows: a tensor subclass that SDPA takes as its mask.

A dense mask of a packed sequence makes attention compute every pair of its tokens. `RowMask` is a mask for
`scaled_dot_product_attention` that knows the rows instead: each row's queries attend to that row's keys only,
with torch's variable-length attention kernel where there is one, and row by row elsewhere. Rows may share a prefix,
which the sequence then stores once.

Like torch's own `torch.nn.attention.bias.CausalBias`, it is a tensor subclass that overrides
`scaled_dot_product_attention` through `__torch_function__`. Every layer gets it as an argument, so recomputation
under gradient checkpointing uses the same attention, even if the model's configuration has changed since.
"""

from __future__ import annotations

import functools
import inspect
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations import sdpa_attention


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
) -> Tensor:
    """`varlen_attn` without its layers of Python, which take longer than launching the kernel: what it calls."""
    left, right = window_size
    output: Tensor = torch.ops.aten._flash_attention_forward(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, 0.0, window_size == (-1, 0), False,
        scale=scale, window_size_left=left, window_size_right=right,
    )[0]  # fmt: skip
    return output


def _find_kernel() -> Callable[..., Tensor] | None:
    """`varlen_attn` of torch 2.10; `_flash` where it takes windows, later; `None` earlier."""
    if not find_spec("torch.nn.attention.varlen"):
        return None
    kernel: Callable[..., Tensor] = import_module("torch.nn.attention.varlen").varlen_attn
    return _flash if _takes_window(kernel) else kernel


@functools.lru_cache(maxsize=1)
def _takes_window(kernel: Callable[..., Tensor]) -> bool:
    # A signature takes as long as several kernel launches, and every layer asks.
    return "window_size" in inspect.signature(kernel).parameters


_KERNEL = _find_kernel()
_TAKES_GROUPS = _KERNEL is _flash  # keys and values may have fewer heads than queries
_HEAD_DIM_MULTIPLE = 8  # the kernel needs a head_dim that is a multiple of it


def grouped_kernel() -> Callable[..., Tensor] | None:
    """A kernel for rows of different lengths that takes fewer heads of keys and values than of queries.

    Returns:
        Called as `varlen_attn`, with `scale` and `window_size`; `None` where torch has none.
    """
    available = torch.backends.cuda.is_flash_attention_available()
    return _KERNEL if _TAKES_GROUPS and available else None


class Rows(NamedTuple):
    """Which tokens of a packed sequence belong to each row.

    The sequence is split into contiguous pieces, and a row is a list of them: the prefixes that it shares with
    other rows, then its own suffix. A shared piece is stored once, with the first row that has it, and its queries
    are computed with that row.
    """

    pieces: Sequence[int]  # length of each piece; the sum is N
    members: Sequence[Sequence[int]]  # indices of each row's pieces
    own: Sequence[int]  # tokens of each row that no earlier row has: its queries; the sum is N

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row.

        Examples:
            >>> Rows(pieces=[3, 2, 4], members=[[0, 1], [0, 2]], own=[5, 4]).lengths
            [5, 7]
        """
        return [sum(self.pieces[piece] for piece in pieces) for pieces in self.members]


class RowMask(torch.Tensor):
    """A causal mask for each row, of shape [1, 1, N, N] without N² stored entries.

    Args:
        rows: of the packed sequence.
        device: of the sequence.
        window: of sliding-window attention: the last tokens that a token attends to, itself included; `None`: all.

    Raises:
        TypeError: another operation than `scaled_dot_product_attention` uses the mask's values.

    Examples:
        >>> rows = Rows(pieces=[1, 2, 2], members=[[0, 1], [0, 2]], own=[3, 2])
        >>> mask = RowMask(rows, torch.device("cpu"))
        >>> query = key = value = torch.randn(1, 2, 5, 4)
        >>> torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).shape
        torch.Size([1, 2, 5, 4])
    """

    rows: Rows
    window: int | None
    _cu_seqlens: tuple[
        Tensor, Tensor
    ]  # [B+1] int32: cumulative lengths of queries (own) and keys (whole rows)
    _max_seqlens: tuple[int, int]  # the largest number of queries and of keys
    _gather: _GatherIndex | None  # `None`: no prefix is shared, and keys and values are used as they are

    def __new__(cls, rows: Rows, device: torch.device, window: int | None = None) -> RowMask:
        """A mask of these rows."""
        tokens = sum(rows.own)
        unstored = torch.zeros((), dtype=torch.bool, device=device).expand(1, 1, tokens, tokens)
        mask = unstored.as_subclass(cls)
        mask.rows, mask.window = rows, window
        # Copied to the device once, not in every layer.
        cumulative = torch.tensor([[0, *rows.own], [0, *rows.lengths]]).cumsum(1).int().to(device)
        mask._cu_seqlens = cumulative[0], cumulative[1]
        mask._max_seqlens = max(rows.own), max(rows.lengths)
        has_prefix = any(len(members) > 1 for members in rows.members)
        mask._gather = _gather_index(rows, device) if has_prefix else None
        return mask

    def __init__(self, rows: Rows, device: torch.device, window: int | None = None) -> None:
        super().__init__()

    def __repr__(self) -> str:  # type: ignore[override]
        """The rows' lengths and the window."""
        return f"RowMask(lengths={self.rows.lengths}, own={list(self.rows.own)}, window={self.window})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """SDPA as attention within the rows, and queries of shape and dtype; nothing else reads the mask."""
        if func is scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        if func in (Tensor.to, Tensor.detach):  # gradient checkpointing and device hooks call them
            # The index tensors go to the device of the queries later.
            return args[0]
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__", "dim", "size", "is_floating_point", "is_complex"):
            return super().__torch_function__(func, types, args, kwargs or {})
        raise TypeError(
            f"attention_mask: expected attention by scaled_dot_product_attention, got {name or func} of a RowMask; "
            "set SDPOConfig(packing='groups'), or load the model with attn_implementation='sdpa'"
        )


def row_masks(config: Any, rows: Rows, device: torch.device) -> Any:
    """A model's `attention_mask`: a `RowMask`, or one for each layer type of a model with several.

    Args:
        config: of the text model, with `sliding_window` and `layer_types` where it has them.
        rows: of the packed sequence.
        device: of the sequence.
    """
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    full = RowMask(rows, device)
    if window is None or kinds == {"full_attention"}:
        return full
    sliding = RowMask(rows, device, window)
    return {"full_attention": full, "sliding_attention": sliding} if "full_attention" in kinds else sliding


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` [1, H, N, D] with a `RowMask`."""
    tokens = sum(attn_mask.rows.own)
    if query.shape[0] != 1 or query.shape[2] != tokens or key.shape[2] != tokens:
        raise ValueError(
            f"attention_mask: expected queries and keys [1, H, {tokens}, D] for a RowMask of {tokens} tokens, got "
            f"{tuple(query.shape)} and {tuple(key.shape)}; set SDPOConfig(packing='groups')"
        )
    query, key, value = map(_as_autocast, (query, key, value))
    options = _kernel_options(attn_mask.window, scale, query.shape[-1])
    if options is not None and dropout_p == 0.0 and _kernel_takes(query, key, value):
        return _by_kernel(query, key, value, attn_mask, options)
    outputs = []
    keys, values = _of_rows(key, attn_mask.rows), _of_rows(value, attn_mask.rows)
    for own, row_keys, row_values in zip(query.split(attn_mask.rows.own, dim=2), keys, values, strict=True):
        mask = _dense(own.shape[2], row_keys.shape[2], attn_mask.window, query.device)
        outputs.append(
            scaled_dot_product_attention(
                own, row_keys, row_values, attn_mask=mask, dropout_p=dropout_p, is_causal=mask is None,
                scale=scale, enable_gqa=enable_gqa,
            )
        )  # fmt: skip
    return torch.cat(outputs, dim=2)


def _as_autocast(tensor: Tensor) -> Tensor:
    """The tensor in autocast's dtype, which autocast does for SDPA's arguments and not for `varlen_attn`'s."""
    device_type = tensor.device.type
    if torch.is_autocast_enabled(device_type) and tensor.dtype != torch.float64:
        return tensor.to(torch.get_autocast_dtype(device_type))
    return tensor


def _of_rows(tensor: Tensor, rows: Rows) -> list[Tensor]:
    """The keys or values [1, H, n, D] of each row, of those of the sequence [1, H, N, D]."""
    pieces = tensor.split(list(rows.pieces), dim=2)
    return [torch.cat([pieces[i] for i in members], dim=2) for members in rows.members]


def _dense(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """The mask [queries, keys] of the last tokens of a row; `None` where `is_causal=True` is enough."""
    if queries == keys and (window is None or window >= keys):
        return None
    places = torch.arange(keys, device=device)
    distance = places[keys - queries :, None] - places
    return (distance >= 0) & (distance < (keys if window is None else window))


# --- torch's variable-length attention kernel -------------------------------------------------------------


def _kernel_options(window: int | None, scale: float | None, head_dim: int) -> dict[str, Any] | None:
    """The kernel's arguments for causal attention with this window and scale; `None` if this torch lacks them."""
    if _KERNEL is None:
        return None
    if _takes_window(_KERNEL):
        # Tokens before a query, and after it.
        return {"scale": scale, "window_size": (-1 if window is None else window - 1, 0)}
    # Torch 2.10 has `is_causal` alone: no window, and the default scale.
    usual = scale is None or math.isclose(scale, head_dim**-0.5)
    return {"is_causal": True} if window is None and usual else None


def _kernel_takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    if not query.is_cuda or not query.shape[-1] == key.shape[-1] == value.shape[-1]:
        return False
    is_grouped = query.shape[1] != key.shape[1]
    if query.shape[-1] % _HEAD_DIM_MULTIPLE or (is_grouped and not _TAKES_GROUPS):
        return False
    # What the device, the precision, the head size and the user's own settings allow.
    return bool(can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, False, is_grouped)))


@contextmanager
def grouped_heads() -> Iterator[None]:
    """Models of transformers pass fewer heads of keys and values than of queries to a `RowMask` and its kernel.

    Otherwise they repeat them in every layer, because SDPA has no fast kernel for them that takes a mask.
    """
    if not _TAKES_GROUPS or not hasattr(sdpa_attention, "use_gqa_in_sdpa"):
        yield
        return
    _grouped_heads.begin()
    try:
        yield
    finally:
        _grouped_heads.end()


class _GroupedHeads:
    """Replaces transformers' `use_gqa_in_sdpa` while any region lasts; regions of several threads may overlap."""

    def __init__(self) -> None:
        self._lock, self._regions = threading.Lock(), 0
        self._original: Any = None

    def begin(self) -> None:
        with self._lock:
            self._regions += 1
            if self._regions == 1:
                self._original, sdpa_attention.use_gqa_in_sdpa = sdpa_attention.use_gqa_in_sdpa, self

    def end(self) -> None:
        with self._lock:
            self._regions -= 1
            if self._regions == 0:
                sdpa_attention.use_gqa_in_sdpa = self._original

    def __call__(self, mask: Any, key: Tensor, *others: Any) -> Any:
        return (
            _kernel_takes(key, key, key) if isinstance(mask, RowMask) else self._original(mask, key, *others)
        )


_grouped_heads = _GroupedHeads()


def _by_kernel(
    query: Tensor, key: Tensor, value: Tensor, mask: RowMask, options: Mapping[str, Any]
) -> Tensor:
    assert _KERNEL is not None
    # Layers may be on several devices.
    cu_seq_q, cu_seq_k = (each.to(query.device) for each in mask._cu_seqlens)
    # Not `each[0]`, whose backward would copy the gradient into zeros.
    query, key, value = (each.squeeze(0).transpose(0, 1) for each in (query, key, value))
    if mask._gather is not None:
        key, value = _Gather.apply(mask._gather.to(query.device), key, value)
    # The kernel's causal mask is aligned at the bottom right, as a row with more keys than queries needs.
    output = _KERNEL(query, key, value, cu_seq_q, cu_seq_k, *mask._max_seqlens, **options)
    return output.transpose(0, 1)[None]


class _GatherIndex(NamedTuple):
    """The index that lays out all rows, one after another at M positions, from the N tokens of the sequence."""

    tokens: Tensor  # [M] int64
    # Tokens by the number n of their positions: for each n the tokens [T] that have so many, and these [T, n].
    positions: Sequence[tuple[Tensor, Tensor]]

    def to(self, device: torch.device) -> _GatherIndex:
        tokens, *parts = (each.to(device) for each in (self.tokens, *chain(*self.positions)))
        return _GatherIndex(tokens, list(zip(parts[::2], parts[1::2], strict=True)))


def _gather_index(rows: Rows, device: torch.device) -> _GatherIndex:
    pieces = torch.arange(sum(rows.pieces)).split(list(rows.pieces))
    tokens = torch.cat([pieces[i] for members in rows.members for i in members])
    by_token = tokens.argsort(stable=True)
    counts = tokens.bincount()
    starts = counts.cumsum(0) - counts
    pieces_with: dict[int, list[Tensor]] = {}  # by the number of rows that have them
    for piece, count in Counter(chain.from_iterable(rows.members)).items():
        pieces_with.setdefault(count, []).append(pieces[piece])
    parts = [tokens]
    for count, those in pieces_with.items():
        these = torch.cat(those)
        parts += [these, by_token[starts[these, None] + torch.arange(count)]]
    # One copy to the device.
    flat = torch.cat([part.flatten() for part in parts]).to(device).split([part.numel() for part in parts])
    tokens, *parts = (one.view_as(part) for one, part in zip(flat, parts, strict=True))
    return _GatherIndex(tokens, list(zip(parts[::2], parts[1::2], strict=True)))


class _Gather(torch.autograd.Function):
    """Keys and values [N, H, D] of the sequence at the M positions, [M, H, D] each.

    One `index_select` in place of a split and a concatenation for each row in every layer. The backward sums a
    token's gradients by a deterministic reduction; that of `index_select` has atomic additions, whose order varies.
    """

    @staticmethod
    def forward(ctx: Any, index: _GatherIndex, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        ctx.positions = index.positions
        return key.index_select(0, index.tokens), value.index_select(0, index.tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(_sum_of_positions(grad, ctx.positions) for grad in grads)


def _sum_of_positions(grad: Tensor, positions: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The sums [N, ...] of the gradients [M, ...] of all positions of each token; each token has at least one."""
    total = grad.new_empty(sum(len(tokens) for tokens, _ in positions), *grad.shape[1:])
    for tokens, places in positions:
        total.index_copy_(0, tokens, grad[places].sum(1, dtype=grad.dtype))
    return total
