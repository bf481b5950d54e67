"""DeepSpeed's engine gathers the weights that were written last, by module or layer; a benchmark frees it.

Skipped where DeepSpeed is not installed.
"""

from __future__ import annotations

from typing import Any

import pytest
import rank_driver as driver
import rank_engine_observations as engine
import rank_server_observations as server
import torch

pytest.importorskip("deepspeed")

RANKS = ("2-0", "2-1")


@pytest.fixture(scope="session")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("engine")
    driver.launch(folder, "deepspeed", "rank_engine_observations.py")
    return {name: torch.load(folder / f"{name}.pt", weights_only=False) for name in RANKS}


def test_the_teacher_s_forward_waits_for_the_copies_of_its_weights(seen: dict[str, Any]) -> None:
    """Otherwise it may gather what was in their memory before."""
    for rank in RANKS:
        late, plain = seen[rank]["late writes"], seen[rank]["plain"]
        assert late["loss"] == plain["loss"]
        for model in ("student", "teacher"):
            assert any(shard.numel() for shard in plain[model].values())
            assert all(torch.equal(late[model][name], shard) for name, shard in plain[model].items())


def test_small_parameters_stay_gathered(seen: dict[str, Any]) -> None:
    """A released one would be gathered again, alone, in each forward."""
    assert [seen[rank]["steps"]["released"] for rank in RANKS] == [[0] * 6] * 2


def test_every_step_drops_the_trace_of_both_forwards(seen: dict[str, Any]) -> None:
    """What docs/many-gpus.md and DEBT.md say."""
    for rank in RANKS:
        assert min(seen[rank]["steps"]["dropped"][-3:]) > 0


@pytest.mark.parametrize("module", engine.FAILING)
def test_the_student_is_back_after_an_error_in_the_teacher_s_forward(
    seen: dict[str, Any], module: str
) -> None:
    for rank in RANKS:
        run = seen[rank]["error", module]
        assert module in run["error"]
        assert run["before"].keys() == run["after"].keys()
        assert all(torch.equal(run["after"][name], shard) for name, shard in run["before"].items())
        assert run["active"] == []


@pytest.mark.parametrize("name", engine.WHOLE_LAYER_RUNS)
def test_whole_layers_change_no_result(seen: dict[str, Any], name: str) -> None:
    for rank in RANKS:
        whole, parts = (seen[rank][name, at_once] for at_once in (True, False))
        assert whole["modules"] < parts["modules"] / 2
        assert whole["loss"] == pytest.approx(parts["loss"], rel=1e-4, abs=1e-8)
        for model in ("student", "teacher"):
            for parameter, shard in parts[model].items():
                torch.testing.assert_close(whole[model][parameter], shard, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stage", driver.DEEPSPEED)
def test_a_run_of_the_benchmark_leaves_nothing_of_the_engine(seen: dict[str, Any], stage: str) -> None:
    """By itself DeepSpeed leaves all of it but the teacher, which is not its own."""
    for rank in RANKS:
        assert seen[rank]["freed", stage] == {"kept": {"engine", "optimizer", "weight"}, "freed": set()}


@pytest.fixture(scope="session")
def sent(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("server")
    driver.launch(folder, "deepspeed", "rank_server_observations.py")
    return {name: torch.load(folder / f"{name}.pt", weights_only=False) for name in RANKS}


@pytest.mark.parametrize("name", server.NAMES)
def test_a_server_gets_the_gathered_weights_with_the_adapter(sent: dict[str, Any], name: str) -> None:
    main, other = (sent[rank]["zero3", name] for rank in RANKS)
    assert (main["sends"], other["sends"]) == (True, False)
    assert main["syncs"] == 2
    assert main["changed"] > 1e-3
    assert main["difference"] < 1e-6
    for rank in (main, other):
        for parameter, weight in rank["before"].items():
            torch.testing.assert_close(rank["after"][parameter], weight, rtol=1e-6, atol=1e-6)
