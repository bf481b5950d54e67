"""Prompts that rows have in common, which a packed sequence holds once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from .batch import Sizes, TokenBatch, columns, joined_ranges, row_bounds
from .row_attention import Rows

# A row takes tokens from an earlier one only where these are at least this share of it: its keys and values are
# then copied in every layer.
_WORTHWHILE = 1 / 50


class Prefixes(NamedTuple):
    """The rows of a batch in the order of their prompts, and what neighbours have in common."""

    order: Sequence[int]  # rows
    common: Sequence[int]  # for each place in the order: the prompt tokens in common with the row before


class PackedRows(NamedTuple):
    """The positions of rows in a packed sequence of N tokens."""

    taken: list[int]  # the first tokens of each row, which an earlier row holds
    places: list[torch.Tensor]  # of each row's tokens in the sequence, [n] int64
    rows: Rows


def shared_prefixes(batch: TokenBatch) -> Prefixes:
    """The rows of a batch sorted by their prompts, so that the most similar ones are neighbours.

    Of all earlier rows, the one directly before has the longest prefix in common.
    Reads the prompts from the device if the batch has none on the host.

    Examples:
        >>> ids = torch.tensor([[5, 6, 7, 1], [0, 5, 6, 2], [5, 6, 7, 3]])
        >>> shared_prefixes(TokenBatch(ids, (ids > 0).long(), [(3, 1), (2, 1), (3, 1)]))
        Prefixes(order=[1, 0, 2], common=[0, 2, 3])
    """
    prompts = batch.prompts
    if prompts is None or not all(prompts):
        # An empty prompt has a column of padding.
        width, bounds = columns(batch.sizes)[0], row_bounds(batch.sizes)
        rows = batch.ids[:, :width].tolist()
        prompts = [row[width - before :] for row, (before, _) in zip(rows, bounds, strict=True)]
    order = sorted(range(len(prompts)), key=prompts.__getitem__)
    common = [0, *(_common(prompts[a], prompts[b]) for a, b in pairwise(order))]
    return Prefixes(order, common)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    shorter = min(len(first), len(second))
    if first[:shorter] == second[:shorter]:
        return shorter
    return next(i for i in range(shorter) if first[i] != second[i])


def taken_tokens(sizes: Sizes, prefixes: Prefixes, rows: Sequence[int]) -> list[int]:
    """The first tokens of each row that the row before it holds, for rows in the order of `prefixes`.

    Examples:
        >>> taken_tokens([(3, 1), (2, 1), (3, 1)], Prefixes([1, 0, 2], [0, 2, 3]), [1, 2])
        [0, 2]
    """
    lengths = list(map(sum, row_bounds(sizes)))
    place = {row: i for i, row in enumerate(prefixes.order)}
    taken = [0]
    for before, row in pairwise(rows):
        common = min(prefixes.common[place[before] + 1 : place[row] + 1])
        taken.append(common if common >= _WORTHWHILE * lengths[row] else 0)
    return taken


def packed_tokens(sizes: Sizes, prefixes: Prefixes, rows: Sequence[int]) -> int:
    """Tokens of the packed sequence of these rows, in the order of `prefixes`.

    Examples:
        >>> packed_tokens([(3, 1), (2, 1), (3, 1)], Prefixes([1, 0, 2], [0, 2, 3]), [1, 0, 2])
        6
    """
    lengths = list(map(sum, row_bounds(sizes)))
    return sum(lengths[row] for row in rows) - sum(taken_tokens(sizes, prefixes, rows))


def prefix_rows(sizes: Sizes, prefixes: Prefixes, *, token_limit: float) -> list[list[int]]:
    """Rows for each packed call, within a limit of tokens: neighbours in the order of `prefixes`.

    Args:
        sizes: prompt and completion tokens of each row.
        prefixes: of the rows.
        token_limit: tokens of a call. A single row may exceed it.

    Examples:
        >>> prefix_rows([(3, 1), (2, 1), (3, 1)], Prefixes([1, 0, 2], [0, 2, 3]), token_limit=5)
        [[1, 0], [2]]
    """
    lengths = list(map(sum, row_bounds(sizes)))
    calls: list[list[int]] = []
    load = 0
    # What each row takes from its neighbour; the first of a call takes nothing.
    taken = taken_tokens(sizes, prefixes, prefixes.order)
    for row, count in zip(prefixes.order, taken, strict=True):
        load += lengths[row] - count
        if not calls or load > token_limit:
            calls.append([])
            load = lengths[row]
        calls[-1].append(row)
    return calls


def place_rows(sizes: Sizes, prefixes: Prefixes, rows: Sequence[int]) -> PackedRows:
    """The positions of these rows in a packed sequence, in the order of `prefixes`, each prefix in common once.

    Examples:
        >>> packed = place_rows([(3, 1), (2, 1), (3, 1)], Prefixes([1, 0, 2], [0, 2, 3]), [0, 2])
        >>> [places.tolist() for places in packed.places]
        [[0, 1, 2, 3], [0, 1, 2, 4]]
        >>> packed.rows
        Rows(pieces=[3, 1, 1], members=[[0, 1], [0, 2]], own=[4, 1])
    """
    lengths = list(map(sum, row_bounds(sizes)))
    taken = taken_tokens(sizes, prefixes, rows)
    ranges: list[list[tuple[int, int]]] = []  # of each row, in the sequence
    start = 0
    for row, count in zip(rows, taken, strict=True):
        own = (start, start + lengths[row] - count)
        ranges.append([*_first(ranges[-1] if ranges else [], count), own])
        start = own[1]
    cuts = sorted({bound for each in ranges for pair in each for bound in pair})
    piece = {cut: i for i, cut in enumerate(cuts)}
    places = joined_ranges([pair for each in ranges for pair in each])
    return PackedRows(
        taken,
        list(places.split([lengths[row] for row in rows])),
        Rows(
            [stop - begin for begin, stop in pairwise(cuts)],
            [[i for begin, stop in each for i in range(piece[begin], piece[stop])] for each in ranges],
            [lengths[row] - count for row, count in zip(rows, taken, strict=True)],
        ),
    )


def _first(ranges: Sequence[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """The first tokens of ranges."""
    found = []
    for begin, stop in ranges:
        if count <= 0:
            break
        found.append((begin, min(stop, begin + count)))
        count -= stop - begin
    return found
