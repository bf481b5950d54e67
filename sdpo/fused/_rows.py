"""Chunks of whole rows, for factors of the divergence that depend on the statistics of a row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sdpo.fused._types import RowFactors, TokenStats
from sdpo.metrics import TokenStatistics
from sdpo.token_factors import kept_at_most, token_factors


class RowChunk(NamedTuple):
    """Rows whose tokens are in one chunk."""

    tokens: slice  # of the active tokens
    rows: slice
    kept: int  # tokens whose factor is not 0, at most


def row_chunks(lengths: tuple[int, ...], size: int, fraction: float | None) -> list[RowChunk]:
    """Chunks of at most ``size`` tokens of rows with these numbers of active tokens; a longer row is one chunk."""
    chunks: list[RowChunk] = []
    first, start, stop = 0, 0, 0
    for row, length in enumerate(lengths):
        if stop > start and stop + length - start > size:
            kept = kept_at_most(fraction, lengths[first:row])
            chunks.append(RowChunk(slice(start, stop), slice(first, row), kept))
            first, start = row, stop
        stop += length
    if stop > start:
        rows = slice(first, len(lengths))
        chunks.append(RowChunk(slice(start, stop), rows, kept_at_most(fraction, lengths[first:])))
    return chunks


def factors_of_rows(factors: RowFactors, active: Tensor | None, rows: slice, stats: Tensor) -> Tensor:
    """``token_factors`` [n] of the active tokens of whole rows.

    Args:
        factors: what they depend on.
        active: [n] positions of the active tokens in the batch; None if all tokens of the rows are active.
        rows: of the batch.
        stats: [len(TokenStats), n]. Tokens whose weight is 0 have no divergence.
    """
    shape = (rows.stop - rows.start, factors.length)
    if active is None:
        table = stats.unflatten(-1, shape)
    else:
        active = active - rows.start * factors.length
        zeros = stats.new_zeros(stats.shape[0], shape[0] * shape[1])
        table = zeros.index_copy(-1, active, stats).unflatten(-1, shape)
    fields = TokenStats(*table.unbind())
    statistics = TokenStatistics(**{name: getattr(fields, name) for name in TokenStatistics._fields})
    result = token_factors(
        statistics, fields.per_token, fields.weights != 0.0, fraction=factors.fraction, weigh=factors.weigh
    ).flatten()
    return (result if active is None else result.index_select(0, active)).to(stats.dtype)


def kept_tokens(stats: Tensor, count: int) -> Tensor:
    """``count`` positions in stats [len(TokenStats), C], in order, with all whose weight is not 0 among them.

    The number is known without waiting for the device.
    """
    is_zero = TokenStats(*stats.unbind()).weights == 0.0
    return torch.sort(is_zero.to(torch.uint8), stable=True).indices[:count].sort().values
