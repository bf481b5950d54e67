"""The measurements of examples/benchmarks/rollout.py: parts of a step, and weights on both sides."""

from __future__ import annotations

import importlib
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


def difference(benchmark: Any, model: nn.Module, engine: nn.Module) -> float:
    runner = SimpleNamespace(model=engine)
    executor = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
    llm = SimpleNamespace(llm_engine=SimpleNamespace(model_executor=executor))
    trainer = SimpleNamespace(_unwrapped=model, vllm_generation=SimpleNamespace(llm=llm))
    return float(benchmark.weight_difference(trainer))


def test_weights_of_both_sides(benchmark: Any) -> None:
    torch.manual_seed(0)
    model: Any = Trained()
    update = 2 * model.q_proj.lora_B["default"].weight @ model.q_proj.lora_A["default"].weight
    q = (model.q_proj.base_layer.weight + update).detach()
    weights = [q, model.k_proj.weight.detach(), model.v_proj.weight.detach(), model.embed.detach()]
    assert difference(benchmark, model, Engine(*weights)) < 1e-6
    # Without the adapter, with k and v exchanged, or with one other weight it is seen.
    base = model.q_proj.base_layer.weight.detach()
    for wrong in (
        Engine(base, *weights[1:]),
        Engine(q, weights[2], weights[1], weights[3]),
        Engine(*weights[:3], weights[3] + nn.functional.one_hot(torch.arange(5) % 4, 4) * 0.1),
    ):
        assert difference(benchmark, model, wrong) > 0.01
