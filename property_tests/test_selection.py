"""Selection of demonstrations: against a naive loop, under permutations, and drawn evenly at random."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from sdpo.reprompt import select_demonstrations

DETERMINISTIC = ["first", "shortest", "longest", "best"]
POLICIES = [*DETERMINISTIC, "random"]
Batch = dict[str, Any]


@st.composite
def batches(draw: st.DrawFn, *, distinct: bool = False) -> Batch:
    rows = draw(st.integers(0, 12))
    numbers = st.sampled_from([0.0, 0.5, 1.0, 1.5, math.inf, math.nan])
    sizes = st.integers(1, 5)
    if distinct:
        numbers, sizes = st.floats(0, 2, width=32), st.integers(1, 10**6)

    def column(values: st.SearchStrategy[Any], unique: bool = False) -> list[Any]:
        return draw(st.lists(values, min_size=rows, max_size=rows, unique=unique))

    return {
        "rewards": column(numbers, distinct),
        "group_ids": column(st.integers(0, 3)),
        "eligible": column(st.booleans()),
        "lengths": column(sizes, distinct),
        "success_threshold": draw(st.sampled_from([0.5, 1.0])),
        "exclude_self": draw(st.booleans()),
        "count": draw(st.integers(1, 3)),
        "seed": draw(st.integers(0, 2**32)),
    }


def select(batch: Batch, policy: str, **changes: Any) -> list[tuple[int, ...]]:
    options = {**batch, **changes}
    return select_demonstrations(options.pop("rewards"), options.pop("group_ids"), policy=policy, **options)


def naive_selection(batch: Batch, policy: str) -> list[tuple[int, ...]]:
    """By repeatedly scanning for the best row that is still free: no sorting, no groups kept."""
    rewards, lengths = batch["rewards"], batch["lengths"]
    result = []
    for i in range(len(rewards)):
        picked: list[int] = []
        while len(picked) < batch["count"]:
            winner = None
            for j in range(len(rewards)):
                usable = batch["group_ids"][j] == batch["group_ids"][i] and batch["eligible"][j]
                success = not math.isnan(rewards[j]) and rewards[j] >= batch["success_threshold"]
                if not (usable and success) or j in picked or (batch["exclude_self"] and i == j):
                    continue
                if (
                    winner is None
                    or (policy == "best" and rewards[j] > rewards[winner])
                    or (policy == "shortest" and lengths[j] < lengths[winner])
                    or (policy == "longest" and lengths[j] > lengths[winner])
                ):
                    winner = j
            if winner is None:
                break
            picked.append(winner)
        result.append(tuple(picked))
    return result


WITNESS: Batch = {
    "rewards": [1.0, 1.0, math.nan, 0.0, 1.5, 1.0, 1.0],
    "group_ids": [0, 1, 0, 0, 0, 1, 0],
    "eligible": [True, True, True, True, True, True, False],
    "lengths": [5, 4, 3, 2, 1, 9, 8],
    "success_threshold": 1.0,
    "exclude_self": True,
    "count": 2,
    "seed": 0,
}
TIES: Batch = {
    **WITNESS,
    "rewards": [1.0] * 5,
    "group_ids": [0] * 5,
    "eligible": [True] * 5,
    "lengths": [2, 3, 2, 3, 2],
}


@given(batches(), st.sampled_from(DETERMINISTIC))
@example(TIES, "first")
@example(TIES, "shortest")
@example(TIES, "longest")
@example(TIES, "best")
def test_selection_equals_the_naive_loop(batch: Batch, policy: str) -> None:
    assert select(batch, policy) == naive_selection(batch, policy)


WRONG_BATCHES: dict[str, Callable[[Batch], Batch]] = {
    "strictly above the threshold": lambda b: {**b, "success_threshold": b["success_threshold"] + 1e-6},
    "NaN succeeds": lambda b: {**b, "rewards": [2.0 if math.isnan(r) else r for r in b["rewards"]]},
    "any group": lambda b: {**b, "group_ids": [0] * len(b["group_ids"])},
    "groups by position": lambda b: {**b, "group_ids": [i // 2 for i in range(len(b["group_ids"]))]},
    "self flag inverted": lambda b: {**b, "exclude_self": not b["exclude_self"]},
    "ineligible rows serve": lambda b: {**b, "eligible": [True] * len(b["eligible"])},
    "always one": lambda b: {**b, "count": 1},
}


@pytest.mark.parametrize("policy", DETERMINISTIC)
@pytest.mark.parametrize("name", WRONG_BATCHES)
def test_the_naive_loop_rejects_wrong_selections(name: str, policy: str) -> None:
    assert select(WITNESS, policy) == naive_selection(WITNESS, policy)
    assert select(WRONG_BATCHES[name](WITNESS), policy) != naive_selection(WITNESS, policy)


def test_every_policy_has_its_own_choice() -> None:
    batch = {**WITNESS, "rewards": [1.0, 1.0, 2.0, 1.0, 0.0], "group_ids": [0] * 5, "eligible": None}
    batch |= {"lengths": [3, 1, 2, 9, 5], "count": 1}
    assert [select(batch, policy)[4] for policy in DETERMINISTIC] == [(0,), (1,), (3,), (2,)]


Choice = Callable[[Batch], list[tuple[int, ...]]]


def are_sets_of_own_successes(choose: Choice, batch: Batch) -> bool:
    pools = naive_selection({**batch, "count": 99}, "first")
    return all(
        len(picked) == len(set(picked)) == min(batch["count"], len(pools[row]))
        and set(picked) <= set(pools[row])
        and not (batch["exclude_self"] and row in picked)
        for row, picked in enumerate(choose(batch))
    )


@given(batches(), st.sampled_from(POLICIES))
def test_selection_is_a_set_of_own_successes(batch: Batch, policy: str) -> None:
    assert are_sets_of_own_successes(lambda b: select(b, policy), batch)


def test_a_set_of_own_successes_rejects_other_draws() -> None:
    def with_replacement(batch: Batch) -> list[tuple[int, ...]]:
        return [picked and (picked[0],) * len(picked) for picked in select(batch, "random")]

    assert are_sets_of_own_successes(lambda b: select(b, "random"), TIES)
    assert not are_sets_of_own_successes(with_replacement, TIES)
    for name in ("any group", "self flag inverted", "ineligible rows serve", "always one"):
        counter_example = WRONG_BATCHES[name]
        assert not are_sets_of_own_successes(
            lambda b, counter_example=counter_example: select(counter_example(b), "random"), WITNESS
        )


def permuted(batch: Batch, order: Sequence[int]) -> Batch:
    columns = ("rewards", "group_ids", "eligible", "lengths")
    return {**batch, **{name: [batch[name][row] for row in order] for name in columns}}


def commutes(choose: Choice, batch: Batch, order: Sequence[int]) -> bool:
    here, there = choose(batch), choose(permuted(batch, order))
    return all(tuple(order[j] for j in there[new]) == here[old] for new, old in enumerate(order))


@given(batches(distinct=True), st.sampled_from(["shortest", "longest", "best"]), st.randoms())
def test_without_ties_selection_commutes_with_any_permutation(
    batch: Batch, policy: str, shuffler: random.Random
) -> None:
    order = list(range(len(batch["rewards"])))
    shuffler.shuffle(order)
    assert commutes(lambda b: select(b, policy), batch, order)


def keep_order_within_groups(groups: Sequence[int], shuffled: Sequence[int]) -> list[int]:
    """The interleaving of `shuffled`, with the rows of each group in their old order."""
    queues = {group: iter([row for row, g in enumerate(groups) if g == group]) for group in groups}
    return [next(queues[groups[row]]) for row in shuffled]


@given(batches(), st.sampled_from(POLICIES), st.randoms())
def test_every_policy_commutes_with_moving_and_renaming_groups(
    batch: Batch, policy: str, shuffler: random.Random
) -> None:
    order = list(range(len(batch["rewards"])))
    shuffler.shuffle(order)
    order = keep_order_within_groups(batch["group_ids"], order)
    assert commutes(lambda b: select(b, policy), batch, order)
    renamed = [("prompt", 7 - group) for group in batch["group_ids"]]
    assert select(batch, policy, group_ids=renamed) == select(batch, policy)


def test_a_draw_by_absolute_row_does_not_commute() -> None:
    def by_absolute_row(batch: Batch) -> list[tuple[int, ...]]:
        pools = naive_selection({**batch, "count": 99}, "first")
        return [tuple(random.Random(row).sample(pool, min(1, len(pool)))) for row, pool in enumerate(pools)]

    batch = {**WITNESS, "rewards": [1.0] * 12, "eligible": [True] * 12, "lengths": [1] * 12, "count": 1}
    batch["group_ids"] = [0] * 6 + [1] * 6
    order = [*range(6, 12), *range(6)]
    assert commutes(lambda b: select(b, "random"), batch, order)
    assert not commutes(by_absolute_row, batch, order)


def ignores_an_added_group(choose: Choice, batch: Batch, at: int) -> bool:
    at = min(at, len(batch["rewards"]))
    rows = [*range(at), None, *range(at, len(batch["rewards"]))]
    added = {"rewards": 1.5, "group_ids": 99, "eligible": True, "lengths": 1}
    larger = {
        **batch,
        **{name: [new if row is None else batch[name][row] for row in rows] for name, new in added.items()},
    }
    old, new = choose(batch), choose(larger)
    return [tuple(rows[j] for j in new[i]) for i, row in enumerate(rows) if row is not None] == old


@given(batches(), st.integers(0, 12))
def test_adding_a_group_changes_no_other_group(batch: Batch, at: int) -> None:
    for policy in POLICIES:
        assert ignores_an_added_group(lambda b, policy=policy: select(b, policy), batch, at)


def test_a_draw_that_knows_the_size_of_the_batch_notices_an_added_group() -> None:
    batch = {**TIES, "count": 1}
    assert ignores_an_added_group(lambda b: select(b, "random"), batch, 2)
    assert not ignores_an_added_group(lambda b: select(b, "random", seed=len(b["rewards"])), batch, 2)


def is_uniform(draws: Counter[Any], outcomes: int) -> bool:
    """Pearson's test at about six standard deviations: derandomised, so it holds or fails for good."""
    total = sum(draws.values())
    expected = total / outcomes
    chi = sum((count - expected) ** 2 / expected for count in draws.values())
    chi += expected * (outcomes - len(draws))
    return abs(chi - (outcomes - 1)) < 6 * math.sqrt(2 * (outcomes - 1)) + 6


def test_random_is_uniform_over_ordered_choices_and_independent_between_rows() -> None:
    batch = {**WITNESS, "rewards": [1.0] * 5, "group_ids": [0] * 5, "eligible": None, "lengths": None}
    results = [select(batch, "random", seed=seed) for seed in range(3000)]
    for row in range(5):
        peers = [peer for peer in range(5) if peer != row]
        draws = Counter(result[row] for result in results)
        assert set(draws) == set(itertools.permutations(peers, 2))
        assert is_uniform(draws, 12)
    pairs = Counter((result[0][0], result[1][0]) for result in results)
    assert is_uniform(pairs, 16)
    # A counter-example with one draw for the whole group: uniform in every row, but the rows move together.
    wheel = Counter(((0 + turn) % 4 + 1, (turn + 1) % 4) for turn in (r[0][0] for r in results))
    assert not is_uniform(wheel, 16)


def test_random_neither_reads_nor_moves_the_global_generators() -> None:
    random.seed(1), torch.manual_seed(1)
    states = random.getstate(), torch.get_rng_state()
    first = select(WITNESS, "random")
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    random.seed(2), torch.manual_seed(2)
    assert select(WITNESS, "random") == first
    assert len({tuple(select(WITNESS, "random", seed=seed)) for seed in range(20)}) > 1


@pytest.mark.parametrize(
    ("array", "dtypes"),
    [
        (torch.tensor, (torch.bfloat16, torch.float16, torch.float32, torch.float64)),
        (np.array, (np.float16, np.float32, np.float64)),
    ],
    ids=["torch", "numpy"],
)
def test_arrays_are_taken_like_lists_and_compared_in_their_own_dtype(
    array: Callable[..., Any], dtypes: tuple[Any, ...]
) -> None:
    columns = {name: array(WITNESS[name]) for name in ("rewards", "group_ids", "eligible", "lengths")}
    for policy in POLICIES:
        assert select({**WITNESS, **columns}, policy) == select(WITNESS, policy)
    for dtype in dtypes:
        rewards = array([0.7, 0.7], dtype=dtype)
        for threshold in (0.7, np.float64(0.7)):
            assert select_demonstrations(
                rewards, [0, 0], success_threshold=threshold, exclude_self=True, policy="first", seed=0
            ) == [(1,), (0,)]
    # The counter-example that goes through Python floats loses every 0.7 of a float32 reward.
    assert not any(value >= 0.7 for value in torch.tensor([0.7, 0.7]).tolist())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"group_ids": [0]}, ValueError, "rewards: expected 1 entries"),
        ({"group_ids": [torch.tensor(0)] * 7}, TypeError, r"group_ids\[0\]: .* got torch.Tensor"),
        ({"group_ids": [[0]] * 7}, TypeError, r"group_ids\[0\]: expected Hashable, got list"),
        ({"rewards": torch.zeros(7, 1)}, ValueError, r"rewards: expected shape \[B\], got \(7, 1\)"),
        ({"rewards": [None] * 7}, TypeError, r"rewards\[0\]: expected number, got NoneType"),
        ({"eligible": [1] * 7}, TypeError, r"eligible\[0\]: expected bool, got int"),
        ({"eligible": [np.True_] * 7}, TypeError, r"eligible\[0\]: expected bool, got numpy\.bool"),
        ({"rewards": np.zeros((7, 1))}, ValueError, r"rewards: expected shape \[B\], got \(7, 1\)"),
        ({"rewards": np.float64(1.0)}, ValueError, r"rewards: expected shape \[B\], got \(\)"),
        ({"rewards": np.array(["1"] * 7)}, TypeError, r"rewards\[0\]: expected number, got str"),
        ({"exclude_self": np.True_}, TypeError, r"exclude_self: expected a bool, got .*\(numpy\.bool"),
        (
            {"lengths": None, "policy": "shortest"},
            ValueError,
            "lengths: expected a number for each row with policy='shortest', got None",
        ),
        (
            {"lengths": [math.nan] * 7, "policy": "longest"},
            ValueError,
            "lengths: expected a number for each row with policy='longest', got",
        ),
        ({"policy": "worst"}, ValueError, "policy: expected one of .*'random'.* got 'worst'"),
        ({"success_threshold": math.nan}, ValueError, "success_threshold"),
        ({"exclude_self": 1}, TypeError, "exclude_self: expected a bool"),
        ({"count": 0}, ValueError, "count: expected an int in .*, got 0"),
        ({"seed": 0.5}, TypeError, "seed: expected an int"),
    ],
)
def test_selection_refuses_bad_arguments_by_name(changes: Batch, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        select(WITNESS, changes.get("policy", "first"), **{k: v for k, v in changes.items() if k != "policy"})
