"""Packed rows in the decoder layers that Unsloth compiles."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..step.modules import all_modules
from ..step.row_attention import grouped_kernel
from ..teacher import shards

_LAYER = "unsloth.models.llama", "LlamaDecoderLayer_fast_forward"  # of Llama, Mistral, Qwen2 and Qwen3
_FIND_ROWS = "unsloth.utils.packing", "get_packed_info_from_kwargs"
_ATTEND = "unsloth.utils.attention_dispatch", "run_attention"
_UNCOMPILED = "_unsloth_block_original"  # of a compiled layer's forward: what is compiled, within wrappers
_SLOT = "forward"
_HALF = torch.float16, torch.bfloat16


class PackedRows(NamedTuple):
    """Which tokens of a packed sequence belong to each row, in the order of Unsloth's tuple."""

    lengths: Tensor  # [B] int32
    cu_seqlens: Tensor  # [B+1] int32, cumulative lengths
    max_seqlen: int


@contextmanager
def compiled_packed_rows(model: nn.Module) -> Iterator[None]:
    """Let the layers that Unsloth compiles compute packed rows compiled, too; undo this on exit.

    Unsloth compiles each decoder layer for training. It leaves packed rows uncompiled, because its attention reads
    their lengths on the host. Here, a layer gets them as an argument of another name, and attention is one call of
    a kernel that takes them on the GPU. The teacher's forward, for which the model is in evaluation mode, is
    compiled, too. All this in 16 bits on a GPU, for layers of Llama, Mistral, Qwen2 and Qwen3; the others run as
    Unsloth runs them.
    """
    kernel = grouped_kernel()
    layers = [] if kernel is None or shards.is_sharded(model) else _compiled_layers(model)
    replaced = []
    if layers:
        find_rows, attend = _replacements(_found(_FIND_ROWS), _found(_ATTEND), kernel)
        for names in {id(names): names for names in map(_namespace, layers)}.values():
            replaced.append((names, names[_FIND_ROWS[1]], names[_ATTEND[1]]))
            names[_FIND_ROWS[1]], names[_ATTEND[1]] = find_rows, attend
    try:
        for layer in layers:
            vars(layer)[_SLOT] = functools.partial(_forward, layer)
        yield
    finally:
        for layer in layers:
            vars(layer).pop(_SLOT, None)
        for names, find_rows, attend in replaced:
            names[_FIND_ROWS[1]], names[_ATTEND[1]] = find_rows, attend


def _found(place: tuple[str, str]) -> Any:
    module, name = place
    return getattr(sys.modules.get(module), name, None)


def _compiled_layers(model: nn.Module) -> list[Any]:
    """The layers whose forward Unsloth compiles, and whose attention finds packed rows by Unsloth's functions."""
    originals = [_found(place) for place in (_LAYER, _FIND_ROWS, _ATTEND)]
    if any(original is None for original in originals):
        return []
    layer_forward, *functions = originals
    return [
        module
        for module in all_modules(model)
        if inspect.unwrap(getattr(type(module).forward, _UNCOMPILED, _forward)) is layer_forward
        and _SLOT not in vars(module)
        and [_namespace(module).get(name) for _, name in (_FIND_ROWS, _ATTEND)] == functions
    ]


def _namespace(layer: Any) -> dict[str, Any]:
    """The global names of the layer's attention."""
    forward = inspect.unwrap(type(layer.self_attn).forward)
    names: dict[str, Any] = getattr(forward, "__globals__", {})
    return names


def _forward(layer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    forward = type(layer).forward
    if kwargs.get("packed_seq_lengths") is None or not _kernel_takes(hidden_states):
        return forward(layer, hidden_states, *args, **kwargs)
    rows = PackedRows(*_found(_FIND_ROWS)(kwargs, hidden_states.device))
    torch._dynamo.maybe_mark_dynamic(rows.cu_seqlens, 0)
    del kwargs["packed_seq_lengths"]
    # Unsloth compiles a layer in training mode; dropout depends on the modes of the modules within the layer.
    attributes, mode = vars(layer), layer.training
    attributes["training"] = True
    try:
        return forward(layer, hidden_states, *args, packed_rows=rows, **kwargs)
    finally:
        attributes["training"] = mode


def _kernel_takes(hidden_states: Tensor) -> bool:
    return hidden_states.is_cuda and hidden_states.dtype in _HALF


@functools.lru_cache(maxsize=1)  # a compiled layer is compiled again if it meets other functions
def _replacements(
    find_rows: Callable[..., Any], run_attention: Callable[..., Tensor], kernel: Callable[..., Tensor]
) -> tuple[Callable[..., Any], Callable[..., Tensor]]:
    """In the place of the two functions: they know `PackedRows`, and call Unsloth's for all else."""

    def find(kwargs: dict[str, Any], *args: Any, **options: Any) -> Any:
        rows = kwargs.get("packed_rows")
        return find_rows(kwargs, *args, **options) if rows is None else rows

    def attend(*, config: Any, context: Any, Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
        rows = context.seq_info
        is_causal = context.is_causal and context.attention_mask is None and context.prefix_seg_info is None
        is_half = Q.dtype in _HALF and Q.dtype == K.dtype == V.dtype
        if not (isinstance(rows, PackedRows) and is_causal and is_half):
            return run_attention(config=config, context=context, Q=Q, K=K, V=V)
        query, key, value = (each.squeeze(0).transpose(0, 1).contiguous() for each in (Q, K, V))
        starts, longest = rows.cu_seqlens, rows.max_seqlen
        window = max(context.sliding_window or 0, 0)  # 0: none
        output = kernel(
            query, key, value, starts, starts, longest, longest,
            scale=(config.sdpa_kwargs or {}).get("scale"), window_size=(window - 1, 0),
        )  # fmt: skip
        return output.unsqueeze(0)

    return find, attend
