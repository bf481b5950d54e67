"""Attention of packed rows that costs what the rows alone cost: a mask that replaces SDPA's computation.

A dense mask of a packed sequence makes attention compute every pair of its tokens. `RowMask` is a mask for
`scaled_dot_product_attention` that knows the rows instead: each row's queries meet that row's keys, with torch's
kernel for sequences of different lengths where there is one, and row by row elsewhere. Rows may have their first
tokens in common, which the sequence then holds once.

Like torch's own `torch.nn.attention.bias.CausalBias`, it is a tensor subclass that overrides the function. It is an
argument of every layer, so gradient checkpointing computes the same attention again, whatever the model's
configuration says by then.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.functional import scaled_dot_product_attention

# `varlen_attn` of torch ≥ 2.10.
_KERNEL: Callable[..., Tensor] | None = (
    import_module("torch.nn.attention.varlen").varlen_attn if find_spec("torch.nn.attention.varlen") else None
)
_KERNEL_WIDTH = 8  # head sizes are multiples of it


class Rows(NamedTuple):
    """Which tokens of a packed sequence belong to each row.

    The sequence is cut into pieces. A row's tokens are some of them in order: first pieces of earlier rows with the
    same first tokens, then its own.
    """

    pieces: Sequence[int]  # tokens of each piece; their sum is N
    members: Sequence[Sequence[int]]  # the pieces of each row
    own: Sequence[int]  # the last tokens of each row, which no earlier row has; their sum is N

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row.

        Example:
            >>> Rows(pieces=[3, 2, 4], members=[[0, 1], [0, 2]], own=[5, 4]).lengths
            [5, 7]
        """
        return [sum(self.pieces[piece] for piece in pieces) for pieces in self.members]


class RowMask(torch.Tensor):
    """A mask [1, 1, N, N] by which every token attends the tokens of its row up to itself; it has no N² entries.

    Args:
        rows: of the packed sequence.
        device: of the sequence.
        window: number of nearest tokens that a token attends, itself included; `None`: all.

    Raises:
        TypeError: anything but `scaled_dot_product_attention` computes with the mask.

    Example:
        >>> rows = Rows(pieces=[1, 2, 2], members=[[0, 1], [0, 2]], own=[3, 2])
        >>> mask = RowMask(rows, torch.device("cpu"))
        >>> query = key = value = torch.randn(1, 2, 5, 4)
        >>> torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).shape
        torch.Size([1, 2, 5, 4])
    """

    rows: Rows
    window: int | None
    _bounds: tuple[Tensor, Tensor]  # [B+1] int32 each: where each row's own tokens begin, and its tokens
    _longest: tuple[int, int]  # the most of either
    _taken: _Taken | None  # `None`: no tokens in common, the rows take those of the sequence

    def __new__(cls, rows: Rows, device: torch.device, window: int | None = None) -> RowMask:
        """A mask of these rows."""
        tokens = sum(rows.own)
        unstored = torch.zeros((), dtype=torch.bool, device=device).expand(1, 1, tokens, tokens)
        mask = unstored.as_subclass(cls)
        mask.rows, mask.window = rows, window
        # Copied to the device once, not in every layer.
        bounds = torch.tensor([[0, *rows.own], [0, *rows.lengths]]).cumsum(1).int().to(device)
        mask._bounds = bounds[0], bounds[1]
        mask._longest = max(rows.own), max(rows.lengths)
        has_common = any(len(members) > 1 for members in rows.members)
        mask._taken = _taken(rows, device) if has_common else None
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
        """The attention of the rows, and what describes a tensor."""
        if func is scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        if func in (Tensor.to, Tensor.detach):  # by gradient checkpointing, and by what places inputs
            return args[0]
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__", "dim", "size", "is_floating_point", "is_complex"):
            return super().__torch_function__(func, types, args, kwargs or {})
        raise TypeError(
            f"attention_mask: expected attention by scaled_dot_product_attention, got {name or func} of a RowMask; "
            "set SDPOConfig(packing='groups'), or load the model with attn_implementation='sdpa'"
        )


def row_masks(config: Any, rows: Rows, device: torch.device) -> Any:
    """A model's `attention_mask`: a `RowMask`, or one by layer type where some layers have a window.

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
    if options is not None and not enable_gqa and dropout_p == 0.0 and _kernel_takes(query, key, value):
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
    """As autocast converts the arguments of attention."""
    kind = tensor.device.type
    if torch.is_autocast_enabled(kind) and tensor.dtype != torch.float64:
        return tensor.to(torch.get_autocast_dtype(kind))
    return tensor


def _of_rows(tensor: Tensor, rows: Rows) -> list[Tensor]:
    """The keys or values [1, H, n, D] of each row, of those of the sequence [1, H, N, D]."""
    pieces = tensor.split(list(rows.pieces), dim=2)
    return [torch.cat([pieces[i] for i in members], dim=2) for members in rows.members]


def _dense(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """The mask [queries, keys] of a row's last tokens; `None` for one that is only causal."""
    if queries == keys and (window is None or window >= keys):
        return None
    places = torch.arange(keys, device=device)
    distance = places[keys - queries :, None] - places
    return (distance >= 0) & (distance < (keys if window is None else window))


# --- torch's kernel for sequences of different lengths ----------------------------------------------------


def _kernel_options(window: int | None, scale: float | None, width: int) -> dict[str, Any] | None:
    """What makes the kernel causal, with this window and scale; `None` where it cannot be."""
    if _KERNEL is None:
        return None
    if _takes_window(_KERNEL):
        # Tokens before a query, and after it.
        return {"scale": scale, "window_size": (-1 if window is None else window - 1, 0)}
    # Torch 2.10.
    usual = scale is None or math.isclose(scale, width**-0.5)
    return {"is_causal": True} if window is None and usual else None


@functools.lru_cache(maxsize=1)
def _takes_window(kernel: Callable[..., Tensor]) -> bool:
    # A signature takes as long as several kernel launches, and every layer asks.
    return "window_size" in inspect.signature(kernel).parameters


def _kernel_takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    if not query.is_cuda or not query.shape[-1] == key.shape[-1] == value.shape[-1]:
        return False
    if query.shape[-1] % _KERNEL_WIDTH or query.shape[1] != key.shape[1]:
        return False
    # What the device, the precision, the head size and the user's own settings allow.
    return bool(can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, False, False)))


def _by_kernel(
    query: Tensor, key: Tensor, value: Tensor, mask: RowMask, options: Mapping[str, Any]
) -> Tensor:
    assert _KERNEL is not None
    # Layers may be on several devices.
    own, lengths = (each.to(query.device) for each in mask._bounds)
    query, key, value = (each[0].transpose(0, 1) for each in (query, key, value))
    if mask._taken is not None:
        key, value = _Take.apply(mask._taken.to(query.device), key, value)
    # The last query of a row meets its last key.
    output = _KERNEL(query, key, value, own, lengths, *mask._longest, **options)
    return output.transpose(0, 1)[None]


class _Taken(NamedTuple):
    """The tokens of all rows, one row after another at M places, among those of the packed sequence."""

    tokens: Tensor  # [M] int64
    uses: Sequence[tuple[Tensor, Tensor]]  # tokens and places: the first of every token, then the second, ...

    def to(self, device: torch.device) -> _Taken:
        tokens, *parts = (each.to(device) for each in (self.tokens, *chain(*self.uses)))
        return _Taken(tokens, list(zip(parts[::2], parts[1::2], strict=True)))


def _taken(rows: Rows, device: torch.device) -> _Taken:
    pieces = torch.arange(sum(rows.pieces)).split(list(rows.pieces))
    tokens = torch.cat([pieces[i] for members in rows.members for i in members])
    by_token, places = tokens.sort(stable=True)
    counts = tokens.bincount()
    earlier = torch.arange(len(tokens)) - (counts.cumsum(0) - counts)[by_token]  # places of the same token
    most = max(Counter(chain.from_iterable(rows.members)).values())
    chosen = [earlier == i for i in range(most)]
    parts = [tokens, *(part[these] for these in chosen for part in (by_token, places))]
    # One copy to the device.
    tokens, *parts = torch.cat(parts).to(device).split([len(part) for part in parts])
    return _Taken(tokens, list(zip(parts[::2], parts[1::2], strict=True)))


class _Take(torch.autograd.Function):
    """Keys and values [N, H, D] of the sequence at the M places, [M, H, D] each.

    The gradients of a token's places are added in their order; those of an index would be added in any order.
    """

    @staticmethod
    def forward(ctx: Any, taken: _Taken, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        ctx.uses = taken.uses
        return key.index_select(0, taken.tokens), value.index_select(0, taken.tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(_added(grad, ctx.uses) for grad in grads)


def _added(grad: Tensor, uses: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Of gradients [M, ...] of the places, those [N, ...] of the tokens."""
    (_, first), *later = uses
    total = grad.index_select(0, first)
    for tokens, places in later:
        total.index_add_(0, tokens, grad.index_select(0, places))
    return total
