"""How the work of the fused loss is divided: the backend, and the number of tokens of a chunk."""

from __future__ import annotations

import torch

from sdpo._validate import check_choice, check_int
from sdpo.fused import _torch
from sdpo.fused import triton as kernels
from sdpo.fused._matmul import autocast_dtype, grad_logits_dtype, operand_dtype, working_dtype
from sdpo.fused._types import ChunkLoss, Objective, Operands, Plan

# Bytes of a chunk's buffers. On a GPU: enough to occupy its tensor cores (768 to 1536 tokens with a vocabulary of
# 150k), and at most this share of its memory. The chunk size follows the shapes and the device, not the free
# memory: the same inputs give the same bits.
_GPU_BYTES, _GPU_SHARE = 1344 * 2**20, 32
_CPU_BYTES = 96 * 2**20
_MAX_TOKENS = 7680
# The tiles of the products are 128, 192 or 256 tokens high: a multiple of 768 leaves no partial tile.
_TILE_MULTIPLES = 768, 128
# Chunks whose logit gradients are collected for one product with the hidden states, if the head is trainable: each
# such product reads and writes the gradient of the whole weight. With a shared buffer the chunks are larger.
_CHUNKS_PER_GRAD_BLOCK, _SHARED_CHUNKS_PER_GRAD_BLOCK = 4, 2
# Tensors [C, V] that the torch backend allocates beside the products; with a full support the categories of its
# divergence are the whole vocabulary.
_TORCH_BUFFERS, _TORCH_BUFFERS_FULL = 1, 8


def make_plan(operands: Operands, objective: Objective, *, chunk_size: int | None, backend: str) -> Plan:
    """Choose the backend and the chunk size."""
    hidden, weight, bias = operands.student
    grad_hidden, grad_weight, grad_bias = (
        tensor is not None and tensor.requires_grad and torch.is_grad_enabled()
        for tensor in (hidden, weight, bias)
    )
    device, autocast = hidden.device, autocast_dtype(hidden.device)
    dtype = operand_dtype(hidden, weight, autocast)
    chunk_loss = _choose_backend(backend, device, working_dtype(dtype), objective)
    gradient = grad_logits_dtype(device, dtype)
    is_torch, is_given = chunk_loss is _torch.chunk_loss, operands.teacher is None
    # There is one model to project if the other's top K are given.
    shared_buffer = is_given or (not is_torch and kernels.can_share_buffer(objective, gradient))
    separate_reference = operands.reference is not None and not _shares_product(operands, objective)
    if chunk_size is None:
        working = working_dtype(dtype).itemsize
        # A gradient in the working dtype overwrites the student's products.
        per_logit = working * (2 - shared_buffer + separate_reference)
        if gradient.itemsize < working:
            per_logit += gradient.itemsize
        if is_torch:
            buffers = _TORCH_BUFFERS_FULL if objective.support == "full" else _TORCH_BUFFERS + is_given
            per_logit += working * buffers
        chunk_size = fitting_chunk_size(per_logit * weight.shape[0], device)
    else:
        meaning = "a number of tokens, or None for a choice"
        chunk_size = check_int("chunk_size", chunk_size, low=1, high=2**31, meaning=meaning)
    chunks_per_block = _SHARED_CHUNKS_PER_GRAD_BLOCK if shared_buffer else _CHUNKS_PER_GRAD_BLOCK
    return Plan(
        chunk_loss=chunk_loss,
        chunk_size=chunk_size,
        grad_block_size=chunk_size * (chunks_per_block if grad_weight else 1),
        shared_buffer=shared_buffer,
        separate_reference=separate_reference,
        autocast_dtype=autocast,
        grad_hidden=grad_hidden,
        grad_weight=grad_weight,
        grad_bias=grad_bias,
    )


def fitting_chunk_size(bytes_per_token: int, device: torch.device) -> int:
    """Tokens of a chunk: as many as the budget allows, in whole tiles where there are enough for one."""
    budget = _CPU_BYTES
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        budget = min(_GPU_BYTES, total // _GPU_SHARE)
    size = max(1, min(budget // bytes_per_token, _MAX_TOKENS))
    return size - size % next((multiple for multiple in _TILE_MULTIPLES if size >= multiple), 1)


def _choose_backend(
    backend: str, device: torch.device, working: torch.dtype, objective: Objective
) -> ChunkLoss:
    check_choice("backend", backend, ("auto", "torch", "triton"))
    missing = kernels.missing(device, working, objective)
    if backend == "triton" and missing is not None:
        raise ValueError(f"backend: expected one that can run here, got 'triton', but {missing}; pass 'auto'")
    if backend == "triton" or (backend == "auto" and missing is None and device.type == "cuda"):
        return kernels.chunk_loss
    return _torch.chunk_loss


def _shares_product(operands: Operands, objective: Objective) -> bool:
    """Whether a trust region's logits are those of its mixed hidden states, as through one linear head."""
    teacher, reference = operands.teacher, operands.reference
    assert teacher is not None
    assert reference is not None
    same_head = reference.weight is teacher.weight and reference.bias is teacher.bias
    return same_head and objective.softcap is None
