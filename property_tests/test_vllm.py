"""vLLM itself, in the process of the trainer; `make test-vllm` installs its build for a CPU and runs this file.

On a GPU it is vLLM as it is. On a CPU one flag of vLLM is changed: its linear layers are those of torch. Those of
oneDNN keep the weights in another layout and no parameter that new ones could be loaded into. Engine, scheduler,
attention, sampler and the loading of weights are vLLM's, and TRL's code is unchanged.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from programs import EXAMPLES
from reference_step import Method, Row, compare
from torch import Tensor
from transformers import AutoModelForCausalLM
from trl.generation.vllm_client import VLLMClient

from sdpo_rl import SDPOTrainer, probe

vllm = pytest.importorskip("vllm")

ON_GPU = torch.cuda.is_available()
pytestmark = [pytest.mark.filterwarnings("default"), *([pytest.mark.gpu] if ON_GPU else [])]
TOLERANCE = 3e-5
# vLLM has attention kernels for heads of 32 and more.
SHAPE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, "task_type": "CAUSAL_LM"}
STACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny.model(**SHAPE).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def engine() -> Iterator[None]:
    """Settings of vLLM. Its process group and the variables that TRL sets for it are removed afterwards."""
    with mock.patch.dict(os.environ):
        if not ON_GPU:
            # One GiB for keys and values; the threads of this process stay where they are.
            os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind")
        yield
        vllm.distributed.cleanup_dist_env_and_memory()


@pytest.fixture
def loadable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear layers that keep their weights."""
    if not ON_GPU:
        monkeypatch.setattr("vllm._custom_ops._supports_onednn", False)


def make(
    output: Path, folder: Path, *, lora: bool = False, rollout_is_clip: float | None = 1.5, **changes: Any
) -> Any:
    settings: dict[str, Any] = {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_importance_sampling_mode": "token_truncate",
        "vllm_max_model_length": 64,
        "max_steps": 3,
        "use_cpu": not ON_GPU,
        **changes,
    }
    return tiny.trainer(
        output,
        start=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        sdpo_config=tiny.config(rollout_is_clip=rollout_is_clip),
        peft_config=LoraConfig(**LORA) if lora else None,
        **settings,
    )


def blank(lora: bool) -> Any:
    model = tiny.model(**SHAPE)
    return get_peft_model(model, LoraConfig(**LORA)) if lora else model


# --- both sides -------------------------------------------------------------------------------------------


def trained_weights(trainer: SDPOTrainer) -> dict[str, Tensor]:
    """By the names of a model without adapters: W, or W + (α/r)·B·A."""
    found = {
        name.removeprefix("base_model.model."): p.detach() for name, p in trainer.model.named_parameters()
    }
    merged = {}
    for name, weight in found.items():
        if ".lora_" in name:
            continue
        layer = name.removesuffix(".base_layer.weight")
        if layer != name:
            a, b = (found[f"{layer}.lora_{half}.default.weight"] for half in "AB")
            weight = weight + LORA["lora_alpha"] / LORA["r"] * b @ a
        merged[name.replace(".base_layer", "")] = weight
    return merged


def check_equal_weights(trainer: SDPOTrainer) -> None:
    """Each parameter of the engine is that of the trainer, rounded to bfloat16, though the folder says float32."""
    executor = trainer.vllm_generation.llm.llm_engine.model_executor
    theirs = dict(executor.driver_worker.model_runner.model.named_parameters())
    ours = trained_weights(trainer)
    assert {parameter.dtype for parameter in theirs.values()} == {torch.bfloat16}
    for name, parameter in theirs.items():
        stack = next((stack for stack in STACKED if stack in name), None)
        names = [name] if stack is None else [name.replace(stack, part) for part in STACKED[stack]]
        expected = torch.cat([ours.pop(each) for each in names])
        # vLLM's embeddings may have more rows than the vocabulary. A merge may round the last bit otherwise.
        found = parameter.detach()[: len(expected)].float()
        torch.testing.assert_close(found, expected, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-6)
    assert not ours


class Watch:
    """Records what the engine reports, and checks the weights whenever it got new ones."""

    def __init__(self, trainer: SDPOTrainer) -> None:
        self.calls: list[str] = []
        self.gaps: list[Tensor] = []
        self._trainer, self._engine = trainer, trainer.vllm_generation
        self._sync, self._generate = self._engine.sync_weights, self._engine.generate
        self._engine.sync_weights, self._engine.generate = self.sync, self.generate

    def sync(self) -> None:
        self._sync()
        check_equal_weights(self._trainer)
        self.calls.append("sync")

    def generate(self, **arguments: Any) -> Any:
        result = self._generate(**arguments)
        _, self.completions, log_probs, _ = result
        self.log_probs = [[first for first, *_ in row] for row in log_probs]
        self.calls.append("generate")
        return result

    @torch.no_grad()
    def note(self, output: dict[str, Any], batch: list[Row]) -> None:
        """The gap of each token, from a forward of its row alone and from what the engine reported."""
        model = self._trainer.model
        for row, completion, theirs in zip(batch, self.completions, self.log_probs, strict=True):
            assert row.completion == list(completion)
            ids = torch.tensor([row.prompt_ids + row.completion], device=model.device)
            logits = model(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1].float().cpu()
            ours = logits.log_softmax(-1).gather(-1, torch.tensor(row.completion)[:, None]).squeeze(-1)
            row.engine_gap = (ours - torch.tensor(theirs)).tolist()
        self.gaps.append(torch.tensor([gap for row in batch for gap in row.engine_gap or []]))

    def forget(self, output: dict[str, Any], batch: list[Row]) -> None:
        self.note(output, batch)
        for row in batch:
            row.engine_gap = None


def statistics(gap: Tensor) -> dict[str, float]:
    """What TRL logs of the gaps of all tokens."""
    ratio, size = gap.exp(), gap.abs()
    of_ratio = {"min": ratio.min(), "mean": ratio.mean(), "max": ratio.max()}
    of_size = {"mean": size.mean(), "max": size.max()}
    return {
        **{f"sampling/importance_sampling_ratio/{name}": value.item() for name, value in of_ratio.items()},
        **{f"sampling/sampling_logp_difference/{name}": value.item() for name, value in of_size.items()},
    }


# --- a run ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("loadable")
@pytest.mark.parametrize("by_trl", [True, False], ids=["TRL's ratio", "the student's own"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_weights_arrive_before_every_batch_and_the_gap_is_corrected(
    tmp_path: Path, folder: Path, lora: bool, by_trl: bool
) -> None:
    trainer = make(tmp_path, folder, lora=lora, vllm_importance_sampling_correction=by_trl)
    watch = Watch(trainer)
    difference = compare(trainer, blank(lora), Method(engine_clip=1.5), alter=watch.note)
    assert max(difference.gradient, difference.loss) < TOLERANCE
    assert watch.calls == ["sync", "generate"] * 3
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for gap, entry in zip(watch.gaps, logs, strict=True):
        assert 0 < gap.abs().mean() < 0.2
        logged = {name: value for name, value in entry.items() if name.startswith("sampling/")}
        assert logged == (pytest.approx(statistics(gap), rel=1e-3) if by_trl else {})
    # The engine still has the weights before the last optimizer step.
    with pytest.raises(AssertionError, match="not close"):
        check_equal_weights(trainer)


@pytest.mark.usefixtures("loadable")
def test_without_the_correction_the_loss_is_that_of_any_completions(tmp_path: Path, folder: Path) -> None:
    trainer = make(tmp_path, folder, rollout_is_clip=None)
    watch = Watch(trainer)
    difference = compare(trainer, blank(False), alter=watch.forget)
    assert max(difference.gradient, difference.loss) < TOLERANCE


@pytest.mark.usefixtures("loadable")
def test_a_missing_correction_is_detected(tmp_path: Path, folder: Path) -> None:
    trainer = make(tmp_path, folder)
    watch = Watch(trainer)
    assert compare(trainer, blank(False), alter=watch.forget).gradient > 30 * TOLERANCE


@pytest.mark.usefixtures("loadable")
@pytest.mark.parametrize("training", ["lora", "full"])
def test_the_benchmark_of_the_rollout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, training: str) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES / "benchmarks"))
    benchmark = importlib.import_module("rollout")
    record = tmp_path / "record.json"
    arguments = f"--training {training} --engines vllm --rows 2 --completion 8 --steps 2 --warmup 1 --output"
    monkeypatch.setattr("sys.argv", ["rollout.py", *arguments.split(), str(record)])
    benchmark.main()
    result = json.loads(record.read_text())["results"]["vllm"]
    assert result["parts"].keys() >= {"generation", "weight sync", "sampled log-probs", "teacher", "student"}
    # Both weight syncs were compared: rounding to bfloat16, and no more. A new adapter changes no weight.
    first, second = result["weight_differences"]
    assert 0 <= first < 0.01
    assert 0 < second < 0.01
    (changed,) = result["weights_changed"]
    assert max(result["weights_unequal"]) < changed / 2 < 0.5
    gaps = result["logged"]["sampling/sampling_logp_difference/mean"]
    assert len(gaps) == 2
    assert all(0 < gap < 0.2 for gap in gaps)


# --- limits -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("loadable")
@pytest.mark.parametrize(("length", "fits"), [(512, True), (64, False)])
def test_the_probe_retries_where_a_reprompt_fits(
    tmp_path: Path, folder: Path, length: int, fits: bool
) -> None:
    trainer = make(tmp_path, folder, vllm_max_model_length=length)
    success = probe(trainer, batches=1).success
    assert (success.retry is not None) == fits
    assert fits or success.not_measured.endswith("vllm_max_model_length is 64")
    if not fits:  # what vLLM would do
        generate = partial(trainer.vllm_generation.generate, images=None, num_generations=1)
        with pytest.raises(vllm.exceptions.VLLMValidationError, match="length is 64 tokens"):
            generate(prompts=[[9] * 65])
        _, completions, *_ = generate(prompts=[[9] * 60] * 16)
        assert max(map(len, completions)) == 4 < trainer.args.max_completion_length


@pytest.mark.skipif(ON_GPU, reason="of vLLM's layers for a CPU")
def test_packed_layers_of_a_cpu_take_no_weights(tmp_path: Path, folder: Path) -> None:
    trainer = make(tmp_path, folder)
    with pytest.raises(AttributeError, match="'Parameter' object has no attribute 'weight_loader'"):
        trainer.train()


@pytest.mark.skipif(ON_GPU, reason="of a trainer on a CPU")
def test_a_server_gets_no_weights_from_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VLLMClient, "get_world_size", lambda self: 1)
    client = VLLMClient.__new__(VLLMClient)
    client.group_port = 0
    with pytest.raises(NotImplementedError, match="needs a CUDA device"):
        client.init_communicator(device="cpu")
