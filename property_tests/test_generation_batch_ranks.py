"""Two ranks draw one generation batch together, each its own rows; their completions table is that of one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import rank_driver as driver
import torch
from checkpoint_runs import same

KINDS = [("ddp", ""), ("ddp", "lora"), ("fsdp2", ""), ("fsdp2", "lora")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("ranks")
    driver.launch(place, "batches")
    return place


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[Any]:
    return [torch.load(folder / f"2-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("kind", KINDS, ids=" ".join)
def test_a_run_with_batches_drawn_around_its_steps_is_the_same(ranks: list[Any], kind: Any) -> None:
    for rank in ranks:
        plain, drawn = rank[kind]["plain"], rank[kind]["drawn"]
        for name in ("student", "optimizer", "prompts", "teacher"):
            assert all(same(a, b) for a, b in zip(plain[name], drawn[name], strict=True)), name
        for mine, other in zip(plain["log"], drawn["log"], strict=True):
            assert mine["loss"] == other["loss"]
            assert mine["num_tokens"] == other["num_tokens"]


@pytest.mark.parametrize("kind", KINDS, ids=" ".join)
def test_every_rank_has_its_rows_and_demonstrations_of_all(ranks: list[Any], kind: Any) -> None:
    for first, second in zip(ranks[0][kind]["batches"], ranks[1][kind]["batches"], strict=True):
        rows = [*first.rows, *second.rows]
        assert [row.row for row in rows] == [*range(8)]
        assert len({str(row.prompt) for row in rows}) == 1
        for row in rows:
            assert row.demonstrations == [rows[i].completion for i in row.demonstration_rows]
            assert all(rows[i].succeeded and i != row.row for i in row.demonstration_rows)
    everything = [row for rank in (0, 1) for batch in ranks[rank][kind]["batches"] for row in batch.rows]
    across = [row for row in everything if any(i // 4 != row.row // 4 for i in row.demonstration_rows)]
    assert across


@pytest.mark.parametrize("kind", KINDS, ids=" ".join)
def test_a_preview_shows_the_rows_of_all_ranks_on_each(ranks: list[Any], kind: Any) -> None:
    first, second = (rank[kind]["preview"] for rank in ranks)
    assert first == second
    assert [f"--- row {row}, prompt 0: " in first for row in range(8)] == [True] * 8


def test_the_completions_table_of_two_ranks_is_that_of_one(folder: Path, ranks: list[Any]) -> None:
    one, two = torch.load(folder / "1-0.pt", weights_only=False)["table"], ranks[0]["table"]
    assert one["demonstration_rows"] == two["demonstration_rows"]
    assert {*map(bool, two["demonstration_rows"])} == {True, False}
    for rows, ours, theirs in zip(
        two["demonstration_rows"], two["divergence"], one["divergence"], strict=True
    ):
        assert ours == (None if rows is None else pytest.approx(theirs, rel=1e-4))
