"""Sequences packed into one dimension of tokens [N]: which token belongs to which, and means over each.

``token_sum`` and ``self_distillation_loss`` take packed tokens as they are. What needs the borders of the sequences
is here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo._numerics import upcast
from sdpo._validate import check_ids, check_int, check_shape, check_tensor, is_readable
from sdpo.aggregate import MaskedSum


def packed_segment_ids(cu_seqlens: Tensor, *, num_tokens: int) -> Tensor:
    """Index of each token's sequence, from the cumulative lengths that attention kernels for packed sequences take.

    Naively: ``torch.repeat_interleave(torch.arange(S), cu_seqlens.diff())``.

    Args:
        cu_seqlens: [S+1] integer, 0 and then the end of each sequence, never falling.
        num_tokens: N, the number of packed tokens. Tokens behind the last sequence (padding of the pack) get S.

    Returns:
        [N] int64.

    Raises:
        TypeError: cu_seqlens is not an integer tensor, or num_tokens not an int.
        ValueError: cu_seqlens has no entry or more than one dimension, num_tokens is negative, or, checked on a
            CPU, cu_seqlens do not begin with 0, fall, or end behind num_tokens.

    Gradient: none.

    Source: the ``cu_seqlens`` of FlashAttention's variable-length functions.

    Examples:
        >>> import torch
        >>> packed_segment_ids(torch.tensor([0, 2, 5]), num_tokens=6).tolist()
        [0, 0, 1, 1, 1, 2]
    """
    check_tensor("cu_seqlens", cu_seqlens, "integer", min_ndim=1)
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(
            f"cu_seqlens: expected shape [S+1] with S >= 0, got {tuple(cu_seqlens.shape)}; pass 0 and then the end "
            "of each sequence"
        )
    num_tokens = check_int("num_tokens", num_tokens, low=0, high=2**62, meaning="the number of packed tokens")
    _check_ends(cu_seqlens, num_tokens)
    positions = torch.arange(num_tokens, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].long().contiguous(), positions, right=True)


def packed_sequence_sum(
    per_token: Tensor, mask: Tensor, *, segment_ids: Tensor, num_segments: int
) -> MaskedSum:
    """``sequence_sum`` of packed tokens: the sum of the means over each sequence's active tokens, and a count.

    Formula: ``Σ_s mean(per_token[mask & (segment_ids == s)])`` over the sequences with an active token, and
    the number of these. Values at inactive positions, even NaN or inf, reach neither the sum nor the gradient.

    Args:
        per_token: [N] floating, a loss per packed token, in any unit.
        mask: [N] bool, tokens with loss.
        segment_ids: [N] integer in [0, num_segments), the sequence of each token, in any order. Inactive tokens,
            such as the padding of the pack, may have any id.
        num_segments: S, the number of sequences.

    Returns:
        MaskedSum with total [] float32 (float64 for float64 input) and count [] int64.

    Raises:
        TypeError: per_token is not floating, mask not bool, segment_ids not integer, num_segments not an int.
        ValueError: the shapes differ, num_segments is not positive, or, checked on a CPU, the id of an active token
            is outside [0, num_segments).

    Gradient: to per_token.

    Source: the packed form of ``sequence_sum``; SDPO's ``sequence-mean``.

    Examples:
        >>> import torch
        >>> loss, mask = torch.tensor([1.0, 3.0, 5.0, float("nan")]), torch.tensor([True, True, True, False])
        >>> packed_sequence_sum(loss, mask, segment_ids=torch.tensor([0, 0, 1, 1]), num_segments=2)
        MaskedSum(total=tensor(7.), count=tensor(2))
    """
    check_tensor("per_token", per_token, "floating", min_ndim=1)
    check_tensor("mask", mask, "bool")
    check_shape("mask", mask, per_token.shape, like="the shape of per_token")
    check_tensor("segment_ids", segment_ids, "integer")
    check_shape("segment_ids", segment_ids, per_token.shape, like="the shape of per_token")
    if per_token.ndim != 1:
        raise ValueError(
            f"per_token: expected packed tokens [N], got shape {tuple(per_token.shape)}; "
            "use sequence_sum for [B, T]"
        )
    num_segments = check_int(
        "num_segments", num_segments, low=1, high=2**62, meaning="the number of sequences"
    )
    ids = segment_ids.long().masked_fill(~mask, 0)
    check_ids(
        "segment_ids", ids, num_segments, fix="pass packed_segment_ids, and mask the padding of the pack"
    )
    values = upcast(per_token).masked_fill(~mask, 0.0)
    lengths = torch.zeros(num_segments, dtype=torch.int64, device=ids.device).index_add(0, ids, mask.long())
    sums = values.new_zeros(num_segments).index_add(0, ids, values)
    return MaskedSum(total=(sums / lengths.clamp(min=1)).sum(), count=(lengths > 0).sum())


def _check_ends(cu_seqlens: Tensor, num_tokens: int) -> None:
    """Demand 0 and then ends that never fall, within the pack, where the values are readable."""
    if not is_readable(cu_seqlens):
        return
    if cu_seqlens[0] != 0 or (cu_seqlens.diff() < 0).any() or cu_seqlens[-1] > num_tokens:
        raise ValueError(
            f"cu_seqlens: expected 0 and then ends that never fall, at most num_tokens={num_tokens}, got "
            f"{cu_seqlens.tolist()}; pass the cumulative lengths of the sequences"
        )
