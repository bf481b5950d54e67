"""The measurements of examples/benchmarks/rollout.py: parts of a step, and weights on both sides."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from programs import EXAMPLES
from torch import nn


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES / "benchmarks"))
    return importlib.import_module("rollout")


def test_a_part_within_another_is_counted_once(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])
    parts = benchmark.Parts()

    def work(seconds: float) -> None:
        now[0] += seconds

    owner = SimpleNamespace(work=work)
    parts.wrap(owner, "work", "generation")
    owner.work(1.0)  # outside of a step
    parts.on_step_begin()
    work(2.0)
    with parts.part("student"):
        work(4.0)
        owner.work(8.0)
        work(16.0)
    parts.on_pre_optimizer_step()
    work(32.0)
    parts.on_optimizer_step()
    parts.on_step_end()
    work(64.0)
    assert parts.steps == [{"rest": 2.0, "student": 20.0, "generation": 8.0, "optimizer": 32.0}]


class Engine(nn.Module):
    """A layer as vLLM stacks it, and embeddings with more rows."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, embeddings: torch.Tensor) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.cat([embeddings, torch.ones(3, embeddings.shape[1])]))
        self.qkv_proj = nn.Module()
        self.qkv_proj.weight = nn.Parameter(torch.cat([q, k, v]))


class Trained(nn.Module):
    """q with an adapter, k and v without; α/r = 2."""

    def __init__(self) -> None:
        super().__init__()
        self.peft_config = {"default": SimpleNamespace(lora_alpha=4, r=2)}
        self.embed = nn.Parameter(torch.randn(5, 4))
        self.q_proj = nn.Module()
        self.q_proj.base_layer = nn.Linear(4, 6, bias=False)
        self.q_proj.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})
        self.q_proj.lora_B = nn.ModuleDict({"default": nn.Linear(2, 6, bias=False)})
        self.k_proj, self.v_proj = nn.Linear(4, 2, bias=False), nn.Linear(4, 2, bias=False)


def compare(benchmark: Any, model: nn.Module, engine: nn.Module, before: dict[str, Any]) -> dict[str, float]:
    runner = SimpleNamespace(model=engine)
    executor = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
    llm = SimpleNamespace(llm_engine=SimpleNamespace(model_executor=executor))
    trainer: Any = SimpleNamespace(_unwrapped=model, vllm_generation=SimpleNamespace(llm=llm))
    return dict(benchmark.compare_weights(trainer, before))


def merged(model: Any) -> list[torch.Tensor]:
    update = 2 * model.q_proj.lora_B["default"].weight @ model.q_proj.lora_A["default"].weight
    weights = [model.q_proj.base_layer.weight + update, model.k_proj.weight, model.v_proj.weight, model.embed]
    return [weight.detach().clone() for weight in weights]


def test_weights_of_both_sides(benchmark: Any) -> None:
    torch.manual_seed(0)
    model: Any = Trained()
    weights = merged(model)
    assert compare(benchmark, model, Engine(*weights), {})["difference"] < 1e-6
    # Without the adapter, with k and v exchanged, or with one other weight it is seen.
    base = model.q_proj.base_layer.weight.detach()
    for wrong in (
        Engine(base, *weights[1:]),
        Engine(weights[0], weights[2], weights[1], weights[3]),
        Engine(*weights[:3], weights[3] + nn.functional.one_hot(torch.arange(5) % 4, 4) * 0.1),
    ):
        assert compare(benchmark, model, wrong, {})["difference"] > 0.01


def test_a_weight_sync_that_did_not_arrive_is_seen_below_the_rounding(benchmark: Any) -> None:
    torch.manual_seed(0)
    model: Any = Trained()
    old = Engine(*merged(model)).to(torch.bfloat16)
    with torch.no_grad():  # a step as small as a half of the last bit of the largest weights
        for parameter in model.parameters():
            parameter += 1e-3 * parameter.sign()
    new = Engine(*merged(model)).to(torch.bfloat16)

    def two_syncs(second: nn.Module) -> list[dict[str, float]]:
        before: dict[str, Any] = {}
        return [compare(benchmark, model, engine, before) for engine in (old, second)]

    arrived, missing = two_syncs(new), two_syncs(old)
    assert arrived[1]["unequal"] == 0 < arrived[1]["changed"] < 1
    assert missing[1]["changed"] == 0
    assert missing[1]["unequal"] == arrived[1]["changed"]
    benchmark.check_weights("vllm", arrived)
    with pytest.raises(SystemExit, match="the weights before the step"):
        benchmark.check_weights("vllm", missing)
    with pytest.raises(SystemExit, match="are not the trainer's"):
        benchmark.check_weights("vllm", [{"difference": 0.02, "unequal": 1.0, "changed": 0.0}])


def test_a_weight_that_is_nan_in_the_engine_is_a_difference(benchmark: Any) -> None:
    torch.manual_seed(0)
    model: Any = Trained()
    weights = merged(model)
    weights[1][0, 0] = torch.nan
    found = compare(benchmark, model, Engine(*weights), {})
    assert found["difference"] == float("inf")
    assert found["unequal"] == 1 / sum(weight.numel() for weight in weights)
    with pytest.raises(SystemExit, match="are not the trainer's"):
        benchmark.check_weights("vllm", [found])


def test_weights_in_bfloat16_keep_the_frequencies_of_the_rotary_embedding(
    benchmark: Any, tmp_path: Path
) -> None:
    options = SimpleNamespace(shape="tiny", training="full", dtype="bfloat16")
    model, _ = benchmark.prepare(tmp_path, options, "cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
