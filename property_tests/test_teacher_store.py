"""The teacher of a real model: its averages and its forward.

The oracle writes the averaged weights into the model itself and runs it; the library swaps them in for one
forward. Both must give the same logits, and every averaged parameter must be seen.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from teacher_cases import IDS, MODELS, check, logits, lora, overwritten, quantized, run
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.func import functional_call
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from sdpo_rl import SDPOConfig
from sdpo_rl.step import forward as step_forward
from sdpo_rl.step import loss as step_loss
from sdpo_rl.step.modules import replaced_parameters
from sdpo_rl.teacher import shards
from sdpo_rl.teacher.store import TeacherStore

# --- averages and forwards --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.parametrize("name", MODELS)
def test_the_teacher_is_the_average_and_every_parameter_of_it_is_seen(tmp_path: Path, name: str) -> None:
    check(*run(MODELS[name](), tmp_path))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base_is_shared_and_never_averaged(tmp_path: Path, bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    model = quantized(bits, tmp_path / "base")
    frozen_before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainer, students = run(model, tmp_path)
    assert all("lora_" in name for name in trainer._teacher.state.params)
    assert not torch.equal(students.seen[0][moved := next(iter(students.seen[0]))], students.seen[-1][moved])
    for name, p in model.named_parameters():
        assert name not in frozen_before or torch.equal(p, frozen_before[name]), name
    check(trainer, students)


class BrokenError(Exception):
    """Raised within a teacher forward."""


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.parametrize("name", MODELS)
def test_a_failed_teacher_forward_leaves_the_student_its_parameter_objects(tmp_path: Path, name: str) -> None:
    def fail_without_grad(*_: Any) -> None:
        if not torch.is_grad_enabled():
            raise BrokenError

    trainer, _ = run(MODELS[name](), tmp_path)
    model = trainer._unwrapped
    head = model.get_output_embeddings()
    before = {n: (p, p.detach().clone()) for n, p in model.named_parameters(remove_duplicate=False)}
    modes = [module.training for module in model.modules()]
    inputs = trainer._prepare_inputs([*tiny.conversations()])
    head.register_forward_pre_hook(fail_without_grad)
    with pytest.raises(BrokenError):
        trainer.compute_loss(trainer.model, inputs)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert after.keys() == before.keys()
    for n, (p, bits) in before.items():
        assert after[n] is p, n
        assert torch.equal(p.detach().view(torch.uint8), bits.view(torch.uint8)), n
    assert modes == [module.training for module in model.modules()]
    assert torch.is_grad_enabled()


def test_the_comparison_rejects_a_teacher_that_leaves_something_out(tmp_path: Path) -> None:
    trainer, students = run(MODELS["LoRA, whole head"](), tmp_path)
    state = trainer._teacher.state
    factors = {name: weight for name, weight in state.params.items() if "modules_to_save" not in name}
    assert len(factors) < len(state.params)
    trainer._teacher.state = state._replace(params=factors)
    trainer._teacher._student = lambda model: dict(model.named_parameters())
    with pytest.raises(AssertionError):
        check(trainer, students)


@pytest.mark.parametrize("rate", [0.2, 0.4])
def test_the_comparison_rejects_another_rate(tmp_path: Path, rate: float) -> None:
    trainer, students = run(lora(), tmp_path)
    trainer._teacher.state = TeacherStore(
        trainer._unwrapped, SDPOConfig(teacher_update_rate=rate, teacher_rate_samples=None), seed=0
    ).state
    with pytest.raises(AssertionError):
        check(trainer, students)


class Tied(nn.Module):
    """One weight in two modules, one module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.again = self.first
        self.last = nn.Linear(3, 3, bias=False)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.last(self.again(self.first(x)))
        return output


def test_a_tied_weight_is_replaced_in_every_module_and_restored() -> None:
    model, x = Tied(), torch.randn(2, 3)
    tensors = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    weight, bias = tensors["first.weight"], tensors["first.bias"]
    expected = ((x @ weight.T + bias) @ weight.T + bias) @ weight.T
    before = dict(model.named_parameters(remove_duplicate=False))
    torch.testing.assert_close(step_forward._run(model, model, {"x": x}, tensors), expected)
    assert all(p is before[name] for name, p in model.named_parameters(remove_duplicate=False))
    # A counter-example: the first module alone.
    first_alone = functional_call(model, tensors, (x,), tie_weights=False)
    assert not torch.allclose(first_alone, expected)


def test_the_parameters_are_back_after_an_error() -> None:
    def fail(*_: Any) -> None:
        raise BrokenError

    model = Tied()
    model.last.register_forward_pre_hook(fail)
    before = dict(model.named_parameters(remove_duplicate=False))
    with pytest.raises(BrokenError):
        step_forward._run(model, model, {"x": torch.randn(2, 3)}, {"first.weight": torch.zeros(3, 3)})
    assert all(p is before[name] for name, p in model.named_parameters(remove_duplicate=False))


# --- the modes --------------------------------------------------------------------------------------------


def test_frozen_keeps_the_start_and_live_keeps_nothing(tmp_path: Path) -> None:
    trainer, students = run(lora(), tmp_path, teacher_mode="frozen")
    assert all(torch.equal(w, students.seen[0][name]) for name, w in trainer._teacher.state.params.items())
    trainer, students = run(lora(), tmp_path, teacher_mode="live")
    assert trainer._teacher.state.params == {}
    assert trainer._teacher.forwards(trainer._unwrapped, training=True) == [None]
    assert trainer._teacher.distance(trainer._unwrapped) is None


def geometric(first: Tensor, student: Tensor, coef: float) -> Tensor:
    """log of q_0^(1−c) · q_θ^c, normalized, token by token."""
    out = torch.empty_like(first, dtype=torch.float64)
    for row in range(out.shape[0]):
        for t in range(out.shape[1]):
            q0, q1 = (z[row, t].double().softmax(-1) for z in (first, student))
            q = q0 ** (1 - coef) * q1**coef
            out[row, t] = (q / q.sum()).log()
    return out


@pytest.mark.parametrize("coef", [0.25, 0.7])
def test_the_trust_region_lies_between_the_start_and_the_student(tmp_path: Path, coef: float) -> None:
    trainer, students = run(tiny.model(), tmp_path, teacher_mode="trust_region", trust_region_coef=coef)
    model = trainer._unwrapped
    start, live = trainer._teacher.forwards(model, training=True)
    assert live is None
    assert all(torch.equal(w, students.seen[0][name]) for name, w in start.items())
    with overwritten(model, students.seen[0]):
        first = logits(model)
    now = logits(model)
    assert torch.equal(logits(model, start), first)

    p = torch.randn(now.shape, generator=torch.Generator().manual_seed(0))
    options = {"alpha": 1.0, "support": "full", "trust_region_coef": coef, "is_clip": None}
    tokens = IDS[:, -4:]
    targets = step_loss.Targets(tokens, torch.ones_like(tokens, dtype=torch.bool), None, None)

    def value(teachers: list[Tensor]) -> Tensor:
        return step_loss.from_logits(SDPOConfig(**options), p, teachers, targets, temperature=1.0).total

    def expected(log_q: Tensor) -> Tensor:
        log_p = p.double().log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum()

    torch.testing.assert_close(
        value([first, now]).double(), expected(geometric(first, now, coef)), rtol=1e-5, atol=0
    )
    arithmetic = ((1 - coef) * first.double().softmax(-1) + coef * now.double().softmax(-1)).log()
    for wrong in (arithmetic, geometric(now, first, coef)):
        assert abs(value([first, now]) - expected(wrong)) > 1e-3


def check_names(found: dict[str, nn.Parameter], model: nn.Module) -> None:
    expected = dict(model.named_parameters())
    assert list(found) == list(expected)
    assert all(found[name] is parameter for name, parameter in expected.items())


def nested() -> nn.Module:
    """A model with tied parameters, modules that have several names, and empty places."""
    shared, tied = nn.Linear(2, 2), nn.Linear(2, 2)
    tied.weight = shared.weight
    inner = nn.ModuleDict({"a": nn.ModuleList([shared, nn.ReLU()]), "b": tied, "empty": nn.ModuleList()})
    model = nn.Sequential(nn.Linear(2, 2, bias=False), inner, shared, inner, nn.Linear(2, 1))
    model.register_module("none", None)
    model.register_parameter("last", nn.Parameter(torch.zeros(1)))
    return model


@pytest.mark.parametrize("make", [nested, lambda: lora(tiny.model())], ids=["nested", "adapters"])
def test_names_of_parameters_are_those_of_torch_in_their_order(make: Callable[[], nn.Module]) -> None:
    model = make()
    found = shards.parameters_by_name(model)
    check_names(found, model)
    with pytest.raises(AssertionError):
        check_names(dict(reversed(found.items())), model)


def test_the_check_of_names_detects_a_second_name_of_a_tied_parameter() -> None:
    model = nested()
    with pytest.raises(AssertionError):
        check_names(dict(model.named_parameters(remove_duplicate=False)), model)


def test_wrappers_of_activation_checkpointing_keep_the_weights_of_the_teacher() -> None:
    """They change the names of the parameters; the teacher has those without them."""
    model = tiny.model().eval()
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Qwen2DecoderLayer))
    assert any("_checkpoint_wrapped_module" in name for name, _ in model.named_parameters())
    store = TeacherStore(model, tiny.config(teacher_mode="frozen"), seed=0)
    store.on_train_begin(model)
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        start = model(tokens).logits
        for name, parameter in model.named_parameters():
            if "layers" in name:
                parameter.add_(1.0)
        assert not torch.equal(model(tokens).logits, start)
        (params,) = store.forwards(model, training=True)
        assert params is not None
        with replaced_parameters(model, params):
            assert torch.equal(model(tokens).logits, start)
        with (
            pytest.raises(KeyError, match="unknown"),
            replaced_parameters(model, {**params, "unknown": tokens}),
        ):
            pass
