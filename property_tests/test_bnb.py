"""Quantized bases without Unsloth: bitsandbytes NF4 and 8-bit under LoRA, trained by plain TRL on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from reference_step import Method, Recorder, ReferenceStep, trainable
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from sdpo_rl.diagnose.report import base_precision
from sdpo_rl.teacher.store import TeacherStore

bitsandbytes = pytest.importorskip("bitsandbytes")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
QUANTIZATIONS = {
    "nf4": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    ),
    "nf4, twice": BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    ),
    "8-bit": BitsAndBytesConfig(load_in_8bit=True),
}
RATE = 0.3
TOLERANCE = 5e-6
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR, task_type="CAUSAL_LM", **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    tiny.model(hidden_size=64, intermediate_size=128, tie_word_embeddings=False).save_pretrained(path)
    return path


def quantized(folder: Path, kind: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=QUANTIZATIONS[kind], dtype=torch.float32, device_map="cpu"
    )


def storage(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the base, quantized ones byte for byte."""
    return {
        name: parameter.data.clone() for name, parameter in model.named_parameters() if "lora_" not in name
    }


def quantized_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.is_floating_point()}


def train(folder: Path, kind: str, output: Path, *, exact: bool = False, **changes: Any) -> dict[str, Any]:
    """A short training, with the average computed by hand beside the teacher's.

    TRL holds the adapters of a quantized base in bfloat16; `exact` converts them to float32. It also begins with
    adapters that change the model, so that both of their factors have a gradient.
    """
    model = get_peft_model(quantized(folder, kind), lora(init_lora_weights=not exact))
    settings = {"max_steps": 3, "learning_rate": 0.02, "optim": "adamw_torch"}
    trainer = tiny.trainer(output, start=model, sdpo_config=tiny.config(**changes), **settings)
    for parameter in model.parameters():
        if exact and parameter.requires_grad:
            parameter.data = parameter.data.float()
    before, start = storage(model), trainable(model)
    average = {name: tensor.float() for name, tensor in start.items()}
    tick = trainer._teacher.tick

    def averaged(unwrapped: nn.Module) -> None:
        tick(unwrapped)
        for name, tensor in trainable(unwrapped).items():
            average[name] = (1 - RATE) * average[name] + RATE * tensor.float()

    trainer._teacher.tick = averaged
    recorder = Recorder(trainer)
    trainer.train()
    return {"trainer": trainer, "model": model, "before": before, "start": start, "average": average,
            "recorder": recorder}  # fmt: skip


@pytest.fixture(scope="module", params=QUANTIZATIONS)
def run(
    request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    return train(folder, request.param, tmp_path_factory.mktemp("run"))


def test_the_adapters_train_and_nothing_quantized_changes(run: dict[str, Any]) -> None:
    model = run["model"]
    quantized = quantized_names(model)
    assert len(quantized) == 2 * len(LINEAR)
    assert base_precision(model) in ("4-bit", "8-bit")
    moved = [float((tensor - run["start"][name]).abs().max()) for name, tensor in trainable(model).items()]
    assert max(moved) > 1e-3
    for name, tensor in storage(model).items():
        assert torch.equal(tensor, run["before"][name]), name


def test_the_teacher_is_the_average_of_the_students(run: dict[str, Any]) -> None:
    averaged = run["trainer"]._teacher.state.params
    assert set(averaged) == set(run["start"])
    assert all("lora_" in name for name in averaged)
    assert not set(averaged) & quantized_names(run["model"])
    for name, tensor in averaged.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, run["average"][name], rtol=1e-5, atol=1e-7)
    distance = max(
        float((averaged[name] - tensor).abs().max()) for name, tensor in trainable(run["model"]).items()
    )
    assert distance > 1e-3, "the student itself would pass as its average"


def test_the_head_is_not_quantized_and_the_loss_is_fused(run: dict[str, Any]) -> None:
    head = run["model"].get_output_embeddings()
    assert type(head) is nn.Linear
    assert head.weight.is_floating_point()
    assert run["trainer"]._forward_mode.fused is True


def test_losses_are_finite_and_logged(run: dict[str, Any]) -> None:
    losses = [entry["loss"] for entry in run["trainer"].state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert all(0.0 < loss < 10.0 for loss in losses)


@pytest.mark.parametrize("layout", ["packed", "groups", "padded"])
@pytest.mark.parametrize("kind", ["nf4", "nf4, twice"])
def test_a_step_equals_the_hand_written_one(folder: Path, tmp_path: Path, kind: str, layout: str) -> None:
    """The first step over NF4: rows alone, without padding, the divergence from its definition.

    Each layout within half of 1e-5 of that, so that packed rows are within 1e-5 of padded ones.
    """
    run = train(folder, kind, tmp_path, exact=True, packing=layout)
    assert run["trainer"]._forward_mode.layout.layout == layout
    step = run["recorder"].steps[0]
    reference_step = ReferenceStep.__new__(ReferenceStep)
    student = get_peft_model(quantized(folder, kind), lora())
    # In evaluation mode bitsandbytes repacks a 4-bit layer on a CPU, and it passes no gradient then.
    student.train()
    for name, parameter in student.named_parameters():
        if "lora_" in name:
            parameter.data = step.before[name].clone()
    reference_step.student = reference_step.teacher = reference_step.sampler = student
    reference_step.method = Method(rate=RATE)
    loss, gradients = reference_step.step(step.rows, stale=False)
    assert run["trainer"].state.log_history[0]["loss"] == pytest.approx(loss, rel=TOLERANCE)
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    gap = torch.stack(
        [(gradient - step.gradients[name]).norm() for name, gradient in gradients.items()]
    ).norm()
    assert gap / norm < TOLERANCE
    assert all(gradient.norm() > 1e-3 * norm for gradient in gradients.values())


@pytest.mark.parametrize("mode", ["trust_region", "frozen", "live", "lora_ema"])
def test_every_teacher_runs_over_a_quantized_base(folder: Path, tmp_path: Path, mode: str) -> None:
    run = train(folder, "nf4", tmp_path, teacher_mode=mode)
    assert run["trainer"].state.log_history[-2]["loss"] >= 0.0
    for name, tensor in storage(run["model"]).items():
        assert torch.equal(tensor, run["before"][name]), name


def test_a_quantized_head_falls_back_or_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    """`lm_head` quantized on purpose: named in the error, and trained with whole logits where asked."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=["none"]
    )
    base = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=torch.float32, device_map="cpu"
    )
    if not hasattr(base.lm_head.weight, "quant_state"):
        pytest.skip("this transformers release never quantizes the head")
    model = get_peft_model(base, lora())
    with pytest.raises(ValueError, match="loss_backend='logits'"):
        tiny.trainer(tmp_path, start=model, sdpo_config=tiny.config(), max_steps=1).train()
    trainer = tiny.trainer(tmp_path, start=model, sdpo_config=tiny.config(loss_backend="logits"), max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0.0


def test_training_a_quantized_weight_is_refused_by_name(folder: Path) -> None:
    model = quantized(folder, "nf4")
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.__class__ = _Trainable
    try:
        with pytest.raises(TypeError, match=r"q_proj\.weight"):
            TeacherStore(model, tiny.config(), seed=0)
    finally:
        weight.__class__ = bitsandbytes.nn.Params4bit


class _Trainable(bitsandbytes.nn.Params4bit):
    """A quantized weight with requires_grad, which autograd itself refuses for integers."""

    requires_grad = True  # type: ignore[assignment]
