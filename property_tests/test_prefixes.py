"""A packed sequence holds the prompts that its rows have in common once, and every row whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora_cases import Operations
from strategies import Claim
from test_packing import batch_of

from sdpo_rl.step import packing, prefixes
from sdpo_rl.step.batch import row_bounds
from sdpo_rl.step.prefixes import Prefixes

# Few tokens, so that prompts often begin alike.
tokens = st.lists(st.integers(3, 4), min_size=1, max_size=6)
batches = st.lists(st.tuples(tokens, tokens), min_size=1, max_size=6)


def common(first: Sequence[int], second: Sequence[int]) -> int:
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count


def property_the_row_before_is_the_most_similar_earlier_one(find: Any, rows: Any) -> None:
    order, found = find(batch_of(rows))
    assert sorted(order) == list(range(len(rows)))
    for place, row in enumerate(order):
        earlier = [common(rows[row][0], rows[other][0]) for other in order[:place]]
        assert found[place] == max(earlier, default=0)


def in_the_given_order(batch: Any) -> Prefixes:
    rows = range(len(batch.sizes))
    return Prefixes(list(rows), [0 for _ in rows])


SIMILAR = Claim(
    property_the_row_before_is_the_most_similar_earlier_one,
    prefixes.shared_prefixes,
    in_the_given_order,
    {"rows": batches},
)


def test_the_row_before_is_the_most_similar_earlier_one() -> None:
    SIMILAR.holds()
    SIMILAR.rejects_counter_example()


def property_a_sequence_holds_every_row(pack: Any, rows: Any, subset: int) -> None:
    batch = batch_of(rows)
    found = prefixes.shared_prefixes(batch)
    chosen = [row for row in found.order if subset >> row & 1] or list(found.order)
    call = pack(batch, chosen, found)
    placed = prefixes.place_rows(batch.sizes, found, chosen)
    length = batch.completion_length
    for row, places in zip(chosen, placed.places, strict=True):
        prompt, completion = rows[row]
        assert call.ids[0, places].tolist() == prompt + completion
        assert call.positions[0, places].tolist() == list(range(len(prompt + completion)))
        mine = (call.targets >= row * length) & (call.targets < (row + 1) * length)
        assert call.targets[mine].tolist() == [row * length + i for i in range(len(completion))]
        assert call.predictors[mine].tolist() == places[len(prompt) - 1 : -1].tolist()
    assert call.tokens == call.ids.numel() == prefixes.packed_tokens(batch.sizes, found, chosen)
    # Each token that starts alike in several prompts is there once.
    prompts = {tuple(rows[row][0][: n + 1]) for row in chosen for n in range(len(rows[row][0]))}
    assert call.tokens == len(prompts) + sum(len(rows[row][1]) for row in chosen)
    # What attention gets is the same.
    pieces = torch.arange(call.tokens).split(list(call.rows.pieces))
    assert [torch.cat([pieces[i] for i in each]).tolist() for each in call.rows.members] == [
        each.tolist() for each in placed.places
    ]
    assert call.rows.lengths == list(map(len, placed.places))
    assert list(call.rows.own) == [len(p) - t for p, t in zip(placed.places, placed.taken, strict=True)]


def positions_restart(batch: Any, rows: Any, found: Any) -> packing.ModelCall:
    call = packing.pack_prefixes(batch, rows, found)
    return call._replace(positions=torch.cat([torch.arange(own) for own in call.rows.own])[None])


WHOLE = Claim(
    property_a_sequence_holds_every_row,
    packing.pack_prefixes,
    positions_restart,
    {"rows": batches, "subset": st.integers(0, 63)},
)


def test_a_sequence_holds_every_row() -> None:
    WHOLE.holds()
    WHOLE.rejects_counter_example()


def property_calls_are_complete_and_within_the_limit(choose: Any, rows: Any, limit: int) -> None:
    batch = batch_of(rows)
    found = prefixes.shared_prefixes(batch)
    calls = choose(batch.sizes, found, token_limit=limit)
    assert sorted(row for call in calls for row in call) == list(range(len(rows)))
    assert [row for call in calls for row in call] == list(found.order)
    loads = [prefixes.packed_tokens(batch.sizes, found, call) for call in calls]
    assert all(len(call) == 1 or load <= limit for call, load in zip(calls, loads, strict=True))
    # No call has room for the next row.
    for call, following in pairwise(calls):
        assert prefixes.packed_tokens(batch.sizes, found, [*call, following[0]]) > limit


def one_row_each(sizes: Any, found: Prefixes, *, token_limit: float) -> list[list[int]]:
    return [[row] for row in found.order]


LIMITED = Claim(
    property_calls_are_complete_and_within_the_limit,
    prefixes.prefix_rows,
    one_row_each,
    {"rows": batches, "limit": st.integers(2, 40)},
)


def test_calls_are_complete_and_within_the_limit() -> None:
    LIMITED.holds()
    LIMITED.rejects_counter_example()


@given(rows=batches, count=st.integers(0, 6))
def test_calls_for_other_processes(rows: Any, count: int) -> None:
    batch = batch_of(rows)
    found = prefixes.shared_prefixes(batch)
    chosen = prefixes.prefix_rows(batch.sizes, found, token_limit=20)
    calls = packing.model_calls(batch, "packed", chosen, count=count, prefixes=found)
    assert len(calls) == max(count, len(chosen))
    used = torch.cat([call.targets for call in calls if not call.repeats])
    assert len(used.unique()) == len(used) == sum(len(completion) for _, completion in rows)


def test_a_short_prefix_of_a_long_row_is_read_again() -> None:
    """Its keys and values would be copied for less than they cost."""
    rows = [([3, 4], [5] * 300), ([3, 5], [6] * 300), ([3, 5], [6] * 30)]
    batch = batch_of(rows)
    found = prefixes.shared_prefixes(batch)
    assert list(found.common) == [0, 1, 2]
    assert prefixes.taken_tokens(batch.sizes, found, [0, 1, 2]) == [0, 0, 2]


def test_rows_are_divided_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each micro-batch, while the GPU waits."""
    batch = batch_of([([3, 4, row % 5 + 5], [6, 7]) for row in range(50)])
    found = prefixes.shared_prefixes(batch)
    calls: list[Any] = []

    def bounds(sizes: Any) -> Any:
        calls.append(sizes)
        return row_bounds(sizes)

    monkeypatch.setattr(prefixes, "row_bounds", bounds)
    prefixes.prefix_rows(batch.sizes, found, token_limit=40)
    assert len(calls) <= 2


def operations(count: int, prompts_once: bool) -> Counter[str]:
    batch = batch_of([([3, 4, row % 5 + 5], [6, 7]) for row in range(count)])
    found = prefixes.shared_prefixes(batch)
    with Operations() as counted:
        if prompts_once:
            packing.pack_prefixes(batch, list(found.order), found)
        else:
            packing.pack(batch, list(found.order))
    del counted.counts["slice"]  # a view of each row's places
    return counted.counts


@pytest.mark.parametrize("prompts_once", [True, False])
def test_more_rows_are_packed_by_as_many_operations(prompts_once: bool) -> None:
    """While the GPU waits."""
    assert operations(60, prompts_once) == operations(6, prompts_once)
