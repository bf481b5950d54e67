"""Forwards whose cost follows the tokens: the rows of a batch packed into one sequence, or grouped by length.

A batch of rows of different lengths is mostly padding. `model_calls` divides it into calls of the model without
padding (`packed`) or with little of it (`groups`); `run_calls` runs them and puts what they return back into the
[B, T] shape of the completions, so that a loss does not depend on the layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import sdpo

from .batch import Sizes, TokenBatch, columns, joined_ranges, position_ids, row_bounds
from .prefixes import Prefixes, place_rows
from .row_attention import Rows

Layout = Literal["packed", "groups", "padded"]

# The mask of a packed sequence of N tokens has N² entries where attention takes a dense one, and attention computes
# all of them: two sequences of N/2 tokens cost half of that.
_DENSE_MASK_TOKENS = 8192
_DENSE_ATTENTION = ("sdpa", "eager")


class ModelCall(NamedTuple):
    """Rows that run in one call of the model."""

    ids: Tensor  # [b, L] int64; [1, N] for packed rows
    mask: Tensor | None  # [b, L] int64; None for packed rows
    positions: Tensor  # [b, L] int64, from 0 in every row
    predictors: Tensor  # [A] int64, the entries of b·L whose hidden states predict the completions' tokens
    targets: Tensor  # [A] int64, those tokens among the B·T of the batch
    tokens: int  # attended ones
    repeats: bool = False  # whether another call has the same rows, so that this result is not used
    rows: Rows | None = None  # of a packed sequence whose attention gets them; see `row_attention`


def fill(sizes: Sizes, tokens: int | None = None) -> float:
    """The share of a padded batch that must be computed.

    Args:
        sizes: prompt and completion tokens of each row.
        tokens: those that must be computed; `None`: all of the rows.

    Examples:
        >>> fill([(2, 2), (2, 6)]), fill([(2, 2), (2, 6)], 10)
        (0.75, 0.625)
    """
    tokens = sum(map(sum, row_bounds(sizes))) if tokens is None else tokens
    return tokens / (len(sizes) * sum(columns(sizes)))


def pack(batch: TokenBatch, rows: Sequence[int]) -> ModelCall:
    """These rows of a batch one after another in one sequence [1, N], without padding.

    Positions start from 0 in every row, by which attention keeps rows apart; see `model_check`.

    Examples:
        >>> ids = torch.tensor([[0, 5, 6, 7], [3, 4, 8, 0]])
        >>> batch = TokenBatch(ids, (ids > 0).long(), [(1, 2), (2, 1)])
        >>> call = pack(batch, [0, 1])
        >>> call.ids.tolist(), call.positions.tolist()
        ([[5, 6, 7, 3, 4, 8]], [[0, 1, 2, 0, 1, 2]])
        >>> call.predictors.tolist(), call.targets.tolist()
        ([0, 1, 4], [0, 1, 2])
    """
    bounds = _bounds_of(batch.sizes, rows)
    lengths = [before + after for _, (before, after) in bounds]
    return _packed_call(batch, bounds, [0] * len(rows), torch.arange(sum(lengths)).split(lengths), None)


def pack_prefixes(batch: TokenBatch, rows: Sequence[int], prefixes: Prefixes) -> ModelCall:
    """These rows of a batch in one sequence [1, N] that holds a prefix of several prompts once.

    Args:
        batch: B rows.
        rows: in the order of `prefixes`.
        prefixes: of the batch.

    Examples:
        >>> ids = torch.tensor([[3, 4, 6, 7], [3, 4, 8, 0]])
        >>> batch = TokenBatch(ids, (ids > 0).long(), [(2, 2), (2, 1)])
        >>> call = pack_prefixes(batch, [0, 1], Prefixes(order=[0, 1], common=[0, 2]))
        >>> call.ids.tolist(), call.positions.tolist()
        ([[3, 4, 6, 7, 8]], [[0, 1, 2, 3, 2]])
        >>> call.predictors.tolist(), call.targets.tolist()
        ([1, 2, 1], [0, 1, 2])
    """
    bounds = _bounds_of(batch.sizes, rows)
    packed = place_rows(batch.sizes, prefixes, rows)
    return _packed_call(batch, bounds, packed.taken, packed.places, packed.rows)


def _packed_call(
    batch: TokenBatch,
    bounds: Sequence[tuple[int, tuple[int, int]]],
    taken: Sequence[int],
    places: Sequence[Tensor],
    rows: Rows | None,
) -> ModelCall:
    """A call of rows whose tokens are at these places; earlier rows hold the first ones, `taken`."""
    prompt, length = columns(batch.sizes)
    source, positions, predictors, targets = [], [], [], []
    for (row, (before, after)), count, place in zip(bounds, taken, places, strict=True):
        first = row * (prompt + length) + prompt - before
        source.append((first + count, first + before + after))
        positions.append((count, before + after))
        predictors.append(place[before - 1 : before - 1 + after])
        targets.append((row * length, row * length + after))
    device = batch.ids.device
    # Made on the host, whose sizes are known: sizes read from the device would wait for it.
    columns_, positions_ = torch.stack([joined_ranges(source), joined_ranges(positions)]).to(device)
    predictors_, targets_ = torch.stack([torch.cat(predictors), joined_ranges(targets)]).to(device)
    ids = batch.ids.flatten()[columns_][None]
    return ModelCall(ids, None, positions_[None], predictors_, targets_, ids.numel(), rows=rows)


def group(batch: TokenBatch, rows: Sequence[int]) -> ModelCall:
    """These rows of a batch, padded, with the columns that any of them attends.

    Examples:
        >>> ids = torch.tensor([[0, 5, 6, 7], [3, 4, 8, 0]])
        >>> batch = TokenBatch(ids, (ids > 0).long(), [(1, 2), (2, 1)])
        >>> call = group(batch, [1])
        >>> call.ids.tolist(), call.predictors.tolist(), call.targets.tolist()
        ([[3, 4, 8]], [1], [2])
    """
    prompt, length = columns(batch.sizes)
    own = _bounds_of(batch.sizes, rows)
    left, right = max(before for _, (before, _) in own), max(after for _, (_, after) in own)
    predictors, targets = [], []
    for place, (row, (_, after)) in enumerate(own):
        first = place * (left + right) + left - 1
        predictors.append(torch.arange(first, first + after))
        targets.append(torch.arange(row * length, row * length + after))
    device = batch.ids.device
    predictors_, targets_ = torch.stack([torch.cat(predictors), torch.cat(targets)]).to(device)
    chosen = torch.tensor(rows).to(device)
    ids, mask = (part[chosen, prompt - left : prompt + right] for part in (batch.ids, batch.mask))
    tokens = sum(before + after for _, (before, after) in own)
    return ModelCall(ids, mask, position_ids(mask), predictors_, targets_, tokens)


def _bounds_of(sizes: Sizes, rows: Sequence[int]) -> list[tuple[int, tuple[int, int]]]:
    each = row_bounds(sizes)
    return [(row, each[row]) for row in rows]


# --- which rows share a call ------------------------------------------------------------------------------


def packed_rows(sizes: Sizes, *, token_limit: float) -> list[list[int]]:
    """Rows for each packed call, within a limit of tokens; the longest first, each where it fits first.

    Args:
        sizes: prompt and completion tokens of each row.
        token_limit: tokens of a call. A single row may exceed it.

    Examples:
        >>> packed_rows([(1, 1), (2, 4), (2, 2)], token_limit=8)
        [[0, 1], [2]]
    """
    lengths = list(map(sum, row_bounds(sizes)))
    calls: list[list[int]] = []
    loads: list[int] = []
    for row in sorted(range(len(sizes)), key=lambda row: (-lengths[row], row)):
        place = next((i for i, load in enumerate(loads) if load + lengths[row] <= token_limit), None)
        if place is None:
            calls.append([])
            loads.append(0)
            place = -1
        calls[place].append(row)
        loads[place] += lengths[row]
    return [sorted(rows) for rows in calls]


class CallLimits(NamedTuple):
    """What bounds a padded call, and what it costs (see `call_cost`). A single row may exceed both bounds."""

    width: float  # columns
    tokens: float  # rows times columns
    overhead_tokens: float  # cost of a call besides its tokens, in tokens
    min_tokens: float = 0.0  # least cost of a call


def alike_rows(sizes: Sizes, limits: CallLimits) -> list[list[int]]:
    """Rows for each padded call: those of similar length, so that all calls together cost the least.

    A call costs max(rows · columns + `overhead_tokens`, `min_tokens`). Rows are sorted by their length, and every
    division of the sorted rows is considered.

    Examples:
        >>> alike_rows([(2, 9), (2, 2), (2, 8), (2, 1)], CallLimits(width=20, tokens=100, overhead_tokens=1))
        [[0, 2], [1, 3]]
        >>> limits = CallLimits(width=20, tokens=100, overhead_tokens=1, min_tokens=30)
        >>> alike_rows([(2, 9), (2, 2), (2, 8), (2, 1)], limits)
        [[0, 1, 2, 3]]
    """
    each = row_bounds(sizes)
    order = sorted(range(len(sizes)), key=lambda row: (-sum(each[row]), row))
    # The least cost of the first n rows, and where their last call starts.
    best: list[tuple[float, int]] = [(0.0, 0)]
    for end in range(1, len(order) + 1):
        left = right = 0
        options = []
        for start in range(end - 1, -1, -1):
            before, after = each[order[start]]
            left, right = max(left, before), max(right, after)
            cost = (end - start) * (left + right)
            if end - start > 1 and (left + right > limits.width or cost > limits.tokens):
                break
            options.append((best[start][0] + max(cost + limits.overhead_tokens, limits.min_tokens), start))
        best.append(min(options))
    calls = []
    end = len(order)
    while end:
        start = best[end][1]
        calls.append(sorted(order[start:end]))
        end = start
    return calls[::-1]


def equal_rows(sizes: Sizes, *, token_limit: float) -> list[list[int]]:
    """Rows for each call without padding: those of equal prompt and completion lengths.

    Args:
        sizes: prompt and completion tokens of each row.
        token_limit: tokens of a call. A single row may exceed it.

    Examples:
        >>> equal_rows([(2, 1), (1, 2), (2, 1), (2, 1)], token_limit=6)
        [[0, 2], [1], [3]]
    """
    calls: list[list[int]] = []
    latest: dict[tuple[int, int], list[int]] = {}  # call for rows of a size
    for row, size in enumerate(row_bounds(sizes)):
        if size not in latest or (len(latest[size]) + 1) * sum(size) > token_limit:
            latest[size] = []
            calls.append(latest[size])
        latest[size].append(row)
    return calls


def divided(calls: list[list[int]], sizes: Sizes, count: int) -> list[list[int]]:
    """At least `count` calls where there are as many rows: the largest call is halved until there are.

    Examples:
        >>> divided([[0, 1, 2]], [(1, 1), (1, 1), (1, 5)], 2)
        [[0, 1], [2]]
    """
    lengths = list(map(sum, row_bounds(sizes)))

    def tokens(rows: Sequence[int]) -> int:
        return sum(lengths[row] for row in rows)

    calls = [list(rows) for rows in calls]
    while len(calls) < min(count, len(sizes)):
        rows = calls.pop(max(range(len(calls)), key=lambda i: (len(calls[i]) > 1, tokens(calls[i]))))
        middle = min(range(1, len(rows)), key=lambda i: abs(tokens(rows[:i]) - tokens(rows[i:])))
        calls += [rows[:middle], rows[middle:]]
    return calls


def model_calls(
    batch: TokenBatch,
    layout: Layout,
    calls: list[list[int]],
    *,
    count: int = 0,
    prefixes: Prefixes | None = None,
) -> list[ModelCall]:
    """The calls of the model over a batch.

    Args:
        batch: B rows.
        layout: `packed` or `groups`.
        calls: rows of each call.
        count: number of calls, where more than these; calls are divided, and then repeated without a use for their
            results.
        prefixes: of the batch; packed rows then hold a prefix in common once, and attention gets the rows.
    """
    build: Any = pack if layout == "packed" else group
    if prefixes is not None:
        build = partial(pack_prefixes, prefixes=prefixes)
    built = [build(batch, rows) for rows in divided(calls, batch.sizes, count)]
    return built + [built[0]._replace(repeats=True)] * (count - len(built))


def run_calls(
    forward: Callable[..., Any],
    calls: Sequence[ModelCall],
    *,
    arguments: Sequence[Any],
    rows: int,
    length: int,
) -> Any:
    """`forward(arguments, index=call.predictors)` for every call: an `LMHead` or logits of all tokens.

    Args:
        forward: returns an `LMHead` with hidden states [A, D], or logits [A, V].
        calls: of the model.
        arguments: of each call's forward, by name.
        rows: B.
        length: T.

    Returns:
        An `LMHead` with hidden states [B, T, D], or logits [B, T, V]; zeros where a row has no token. The gradient
        reaches every call, with zeros for repeated ones.
    """
    outputs = [forward(each, index=call.predictors) for call, each in zip(calls, arguments, strict=True)]
    states = [output.hidden if isinstance(output, sdpo.LMHead) else output for output in outputs]
    used = torch.cat([each for each, call in zip(states, calls, strict=True) if not call.repeats])
    targets = torch.cat([call.targets for call in calls if not call.repeats])
    for each, call in zip(states, calls, strict=True):
        if call.repeats:
            # Other processes need its backward, too.
            used = used + (each * 0.0).sum()
    whole = used.new_zeros(rows * length, used.shape[-1]).index_copy(0, targets, used)
    whole = whole.unflatten(0, (rows, length))
    # The last: what a sharded model gathered for an earlier call may be gone.
    return outputs[-1]._replace(hidden=whole) if isinstance(outputs[-1], sdpo.LMHead) else whole


def default_token_limit(config: Any) -> float:
    """Tokens of a packed call where attention makes a mask of all pairs of tokens; infinity elsewhere."""
    return (
        _DENSE_MASK_TOKENS if getattr(config, "_attn_implementation", None) in _DENSE_ATTENTION else math.inf
    )
