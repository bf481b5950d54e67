"""The weights that a vLLM server receives, also from an adapter that TRL merges only while it sends.

TRL's code is unchanged. A stand-in takes the place of its client (vllm_server_client.py): nothing here needs vLLM.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import rank_driver as driver
import tiny
import torch
from peft import LoraConfig, get_peft_model
from reference_step import Method, Row, compare
from test_rollouts import TOLERANCE, Engine
from torch import Tensor
from trl.generation import vllm_generation
from vllm_server_client import GIB, Client, expected_weights, largest_difference, replaced

from sdpo_rl import SDPOTrainer
from sdpo_rl.compat import upgrade_check
from sdpo_rl.compat.vllm_server import safe_to_keep

# Two buckets hold the 88 KB of the tiny model's weights: embeddings with the first layer, then the second layer.
BUCKETS = {"one bucket": GIB, "two buckets": 50_000}
LORA = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "task_type": "CAUSAL_LM",
}
ADAPTERS: dict[str, Any] = {
    "full": None,
    "lora": LORA,
    "lora with a trained head": LORA | {"modules_to_save": ["lm_head"]},
}
SCALE = LORA["lora_alpha"] / LORA["r"]
MERGED = 1e-6  # of weights around 0.2, and a merge in float32


def blank(adapter: str, seed: int = 0) -> Any:
    return tiny.model(seed, tie_word_embeddings=adapter != "lora with a trained head")


def make(output: Path, adapter: str, client: type = Client, **changes: Any) -> SDPOTrainer:
    settings: dict[str, Any] = {
        "use_vllm": True,
        "vllm_mode": "server",
        "vllm_importance_sampling_mode": "token_truncate",
        "vllm_importance_sampling_clip_max": 100.0,
        "max_steps": 3,
        "sdpo_config": tiny.config(rollout_is_clip=1.5),
        **changes,
    }
    lora = ADAPTERS[adapter]
    with replaced(client):
        trainer = tiny.trainer(
            output, start=blank(adapter), peft_config=None if lora is None else LoraConfig(**lora), **settings
        )
    if settings["vllm_mode"] == "server":
        engine = Engine(trainer.model, trainer.args.max_completion_length)
        engine.own = blank(adapter, seed=7)
        trainer.vllm_generation.vllm_client.engine = engine
    return trainer


def expected(trainer: SDPOTrainer) -> dict[str, Tensor]:
    return expected_weights(dict(trainer.model.named_parameters()), SCALE)


def watch_syncs(trainer: SDPOTrainer) -> list[float]:
    """After each sync: the largest difference between a weight that arrived and the one that it should be."""
    engine = trainer.vllm_generation
    sync, found = engine.sync_weights, []

    def watched() -> None:
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        sync()
        found.append(largest_difference(engine.vllm_client.received, expected(trainer)))
        for name, p in trainer.model.named_parameters():
            torch.testing.assert_close(p.detach(), before[name], rtol=MERGED, atol=MERGED)

    engine.sync_weights = watched
    return found


def difference_of_training(trainer: SDPOTrainer, adapter: str) -> float:
    """From the reference of a step, whose ratios are those of a server with the trainer's weights."""

    def note(output: dict[str, Any], batch: list[Row]) -> None:
        gaps = trainer.vllm_generation.vllm_client.engine.gaps
        for row, gap in zip(batch, gaps, strict=True):
            row.engine_gap = gap[: len(row.completion)]

    model = blank(adapter)
    model = model if ADAPTERS[adapter] is None else get_peft_model(model, LoraConfig(**ADAPTERS[adapter]))
    difference = compare(trainer, model, Method(engine_clip=1.5), alter=note)
    return max(difference.gradient, difference.loss)


@pytest.mark.parametrize("bucket", BUCKETS.values(), ids=BUCKETS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_server_samples_with_the_weights_of_the_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: str, bucket: int
) -> None:
    monkeypatch.setattr(Client, "bucket", bucket)
    trainer = make(tmp_path, adapter)
    differences, client = watch_syncs(trainer), trainer.vllm_generation.vllm_client
    assert difference_of_training(trainer, adapter) < 10 * TOLERANCE
    assert len(differences) == 3
    assert max(differences) < MERGED
    # The last step changed weights that the server has from the one before.
    assert largest_difference(client.received, expected(trainer)) > 1000 * MERGED
    assert client.calls == ["start", *["sync", "reset", "generate"] * 3]


@pytest.mark.parametrize("bucket", BUCKETS.values(), ids=BUCKETS)
def test_the_tensors_of_trl_alone_lose_the_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: int
) -> None:
    """The counter-example, and why there are copies; docs/vllm.md says so of TRL 1.15."""
    monkeypatch.setattr(Client, "bucket", bucket)
    monkeypatch.setattr("sdpo_rl.trainer.keep_sent_weights", lambda trainer: None)
    trainer = make(tmp_path, "lora")
    differences = watch_syncs(trainer)
    assert difference_of_training(trainer, "lora") > 1000 * TOLERANCE
    first, *later = differences
    assert first == 0  # a new adapter changes no weight
    assert min(later) > 1000 * MERGED
    received, weights = trainer.vllm_generation.vllm_client.received, dict(trainer.model.named_parameters())
    last = "model.layers.1.mlp.down_proj"
    base = weights[f"base_model.model.{last}.base_layer.weight"]
    torch.testing.assert_close(received[f"{last}.weight"], base.detach(), rtol=MERGED, atol=MERGED)


@pytest.mark.parametrize("enabled", [True, False], ids=["SDPO", "GRPO"])
@pytest.mark.parametrize(("adapter", "copied"), [("full", False), ("lora", True)])
def test_a_server_gets_copies_where_an_adapter_is_merged(
    tmp_path: Path, adapter: str, copied: bool, enabled: bool
) -> None:
    trainer = make(tmp_path, adapter, sdpo_config=tiny.config(enabled=enabled))
    trainer.vllm_generation.sync_weights()
    own = {parameter.data_ptr() for parameter in trainer.model.parameters()}
    sent = trainer.vllm_generation.vllm_client.places
    assert sent
    assert sent.isdisjoint(own) if copied else sent <= own


def test_an_engine_in_the_process_of_the_trainer_gets_the_parameters_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: set[int] = set()
    received: dict[str, Tensor] = {}

    def load_weights(pairs: list[tuple[str, Tensor]]) -> None:
        for name, tensor in pairs:
            places.add(tensor.data_ptr())
            received[name] = tensor.clone()

    model = SimpleNamespace(load_weights=load_weights)
    worker = SimpleNamespace(model_runner=SimpleNamespace(model=model))
    executor = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))
    llm = SimpleNamespace(llm_engine=executor, reset_prefix_cache=lambda: None)
    monkeypatch.setattr(vllm_generation, "LLM", lambda **_: llm, raising=False)
    with mock.patch.dict(os.environ):  # TRL sets variables for vLLM
        trainer = make(tmp_path, "lora", vllm_mode="colocate")
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    trainer.vllm_generation.sync_weights()
    assert places <= {parameter.data_ptr() for parameter in trainer.model.parameters()}
    assert largest_difference(received, expected(trainer)) < MERGED


def test_no_copy_outlives_its_reader() -> None:
    """A reader that keeps none has one at a time: what it keeps is all that there is."""
    alive: list[weakref.ref[Tensor]] = []
    base = torch.zeros(3)

    def changing() -> Iterator[tuple[str, Tensor]]:
        for step in range(5):
            base.fill_(step)
            yield str(step), base
        base.fill_(-1)

    for name, tensor in safe_to_keep(changing(), copied=True):
        alive.append(weakref.ref(tensor))
        assert tensor.tolist() == [float(name)] * 3
        del tensor
        assert sum(each() is not None for each in alive) <= 1
    assert len(alive) == 5
    kept = dict(safe_to_keep(changing(), copied=True))
    assert [tensor.tolist() for tensor in kept.values()] == [[float(step)] * 3 for step in range(5)]
    assert {tuple(tensor.tolist()) for _, tensor in safe_to_keep(changing(), copied=False)} == {
        (float(step),) * 3 for step in range(5)
    }


def test_merge_and_copy_are_in_the_trainers_stream_and_the_reader_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[str] = []

    class Stream:
        device = "cuda:0"

        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            events.append(f"{self.name} waits for {other.name}")

    trainers, readers = Stream("trainer"), Stream("reader")
    present = [readers]

    @contextmanager
    def entered(stream: Stream) -> Iterator[None]:
        present.append(stream)
        yield
        present.pop()

    class Weight(Tensor):
        def clone(self) -> Any:  # type: ignore[override]
            events.append(f"{present[-1].name} copies")
            return super().clone()

    def merged() -> Iterator[tuple[str, Tensor]]:
        events.append(f"{present[-1].name} merges")
        yield "weight", torch.zeros(2).as_subclass(Weight)
        events.append(f"{present[-1].name} subtracts")

    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: present[-1])
    for _ in safe_to_keep(merged(), copied=True, stream=trainers):
        events.append(f"{present[-1].name} reads")
    order = [
        "trainer merges",
        "trainer copies",
        "reader waits for trainer",
        "reader reads",
        "trainer subtracts",
    ]
    assert events == order
    assert present == [readers]


@pytest.mark.gpu
@pytest.mark.parametrize("copied", [True, False], ids=["merged while they are sent", "trained before"])
def test_readers_in_other_streams_get_what_the_trainers_stream_computes(copied: bool) -> None:
    """Two streams read in turn and wait for nothing, as in vLLM; the computation before is late."""
    trainers = torch.cuda.current_stream()

    def read(stream: Any) -> bool:
        weights = [torch.zeros(2**20, device="cuda") for _ in range(6)]
        torch.cuda.synchronize()

        def change(by: int) -> None:
            for weight in weights:
                weight.add_(by)

        def sent() -> Iterator[tuple[str, Tensor]]:
            if copied:
                torch.cuda._sleep(10**8)
                change(1)
            yield from ((str(i), weight) for i, weight in enumerate(weights))
            if copied:
                change(-1)

        if not copied:
            torch.cuda._sleep(10**8)
            change(1)
        streams, buckets = [torch.cuda.Stream() for _ in range(2)], []
        named = safe_to_keep(sent(), copied=copied, stream=stream)
        for turn in range(3):
            with torch.cuda.stream(streams[turn % 2]):
                buckets.append(torch.cat([tensor for _, tensor in islice(named, 2)]))
        assert next(named, None) is None
        torch.cuda.synchronize()
        assert {float(weight.mean()) for weight in weights} == {0.0 if copied else 1.0}
        return all(bool((bucket == 1).all()) for bucket in buckets)

    assert read(trainers)
    assert not read(None), "the counter-example: each in the stream of its reader"


def test_a_client_that_sends_otherwise_is_refused(tmp_path: Path) -> None:
    class Other(Client):
        update_named_params = None  # type: ignore[assignment]

    with pytest.raises(
        RuntimeError, match=r"have `update_named_params`, got none in.*install 'trl>=1\.15,<1\.17'"
    ):
        make(tmp_path, "lora", client=Other)


def test_the_upgrade_check_names_what_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [finding.problem for finding in upgrade_check.check_server()] == ["", ""]
    monkeypatch.setattr(
        "trl.generation.vllm_client.VLLMClient.update_named_params", lambda self, params: None
    )
    monkeypatch.setattr(vllm_generation.VLLMGeneration, "sync_weights", lambda self: None)
    assert [finding.problem for finding in upgrade_check.check_server()] == [
        "no parameter metadata, named_params",
        "no longer mentions self.vllm_client.update_named_params(",
    ]


# --- several processes ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("server")
    driver.launch(folder, "torch", "rank_server_observations.py")
    return [torch.load(folder / f"2-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("run", ["untied", "lora with a trained head"])
def test_the_main_process_sends_what_all_gather(ranks: list[dict[Any, Any]], strategy: str, run: str) -> None:
    main, other = (rank[strategy, run] for rank in ranks)
    assert main["syncs"] == 2
    assert main["changed"] > 1000 * MERGED  # by the step before
    assert main["difference"] < MERGED
    assert (main["sends"], other["sends"]) == (True, False)
    for rank in (main, other):
        for name, weight in rank["before"].items():
            torch.testing.assert_close(rank["after"][name], weight, rtol=MERGED, atol=MERGED)
