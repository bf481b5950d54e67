"""The teacher of a real model: its averages, its forward, when it starts, its memory and its operations.

The oracle writes the averaged weights into the model itself and runs it; the library swaps them in for one
forward. Both must give the same logits, and every averaged parameter must be seen.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback

import sdpo.teacher
from sdpo import frozen, teacher_distance
from sdpo_rl import SDPOConfig
from sdpo_rl.step import forward as step_forward
from sdpo_rl.step import loss as step_loss
from sdpo_rl.teacher import shards
from sdpo_rl.teacher.store import TeacherStore

Weights = dict[str, Tensor]
RATE = 0.3
IDS = torch.tensor([[4, 80, 81, 82, 5, 70, 71], [0, 4, 90, 5, 91, 92, 93]])
MASK = (IDS != 0).long()


# --- models -----------------------------------------------------------------------------------------------


def lora(model: nn.Module | None = None, **changes: Any) -> PeftModel:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    torch.manual_seed(0)
    return get_peft_model(model or tiny.model(), LoraConfig(**{**settings, **changes}))


def warm_started() -> PeftModel:
    """An adapter that was trained before: neither of its factors is zero."""
    return lora(init_lora_weights=False)


def prompt_tuned() -> PeftModel:
    return get_peft_model(tiny.model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


def quantized(bits: int, folder: Path) -> PeftModel:
    tiny.model(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    settings = (
        BitsAndBytesConfig(load_in_8bit=True)
        if bits == 8
        else BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    )
    return lora(AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, device_map="cpu"))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "full, tied embeddings": tiny.model,
    "full, untied head": lambda: tiny.model(tie_word_embeddings=False),
    "full, bfloat16": lambda: tiny.model().bfloat16(),
    "LoRA": lora,
    "LoRA, warm start": warm_started,
    "LoRA, trained biases": lambda: lora(bias="lora_only"),
    "LoRA, all biases": lambda: lora(bias="all"),
    "LoRA, whole head": lambda: lora(
        tiny.model(tie_word_embeddings=False), modules_to_save=["lm_head", "embed_tokens"]
    ),
    "LoRA, tied head": lambda: lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "LoRA, tokens of a tied embedding": lambda: lora(trainable_token_indices=[80, 81]),
    "LoRA, tokens of an untied embedding": lambda: lora(
        tiny.model(tie_word_embeddings=False), trainable_token_indices=[80, 81]
    ),
    "DoRA": lambda: lora(use_dora=True),
    "prompt tuning": prompt_tuned,
}


# --- the expected teacher ---------------------------------------------------------------------------------


def trained(model: nn.Module) -> Weights:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


class Students(TrainerCallback):
    """The trained weights at the start and after every optimizer step."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.seen = [trained(model)]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(trained(self.model))


def average(students: list[Weights]) -> dict[str, Tensor]:
    """The paper's moving average in float64."""
    result = {name: weight.double() for name, weight in students[0].items()}
    for student in students[1:]:
        result = {name: (1 - RATE) * old + RATE * student[name].double() for name, old in result.items()}
    return result


@contextmanager
def overwritten(model: nn.Module, weights: Weights) -> Iterator[None]:
    """The model with other values written into its parameters."""
    parameters = dict(model.named_parameters())
    originals = {name: parameters[name].detach().clone() for name in weights}
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)
    yield
    with torch.no_grad():
        for name, weight in originals.items():
            parameters[name].copy_(weight)


def logits(model: Any, params: Weights | None = None) -> Tensor:
    model.eval()
    arguments = {"input_ids": IDS, "attention_mask": MASK, "use_cache": False}
    with torch.no_grad():
        return step_forward.completion_logits(model, model, arguments, length=4, params=params)


def started(model: nn.Module, **config: Any) -> TeacherStore:
    """A teacher when training begins."""
    store = TeacherStore(model, SDPOConfig(**config), seed=0)
    store.on_train_begin(model)
    return store


def run(model: nn.Module, folder: Path, **config: Any) -> tuple[Any, Students]:
    trainer = tiny.trainer(
        folder,
        start=model,
        sdpo_config=tiny.config(loss_backend="logits", teacher_update_rate=RATE, **config),
        max_steps=3,
    )
    students = Students(trainer._unwrapped)
    trainer.add_callback(students)
    trainer.train()
    return trainer, students


def check(trainer: Any, students: Students, *, tolerance: float = 1e-6) -> None:
    """The state is the average, and the forward sees all of it."""
    store, model = trainer._teacher, trainer._unwrapped
    expected = average(students.seen)
    assert store.state.params.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(store.state.params[name].double(), weight, rtol=tolerance, atol=tolerance)
    (params,) = store.forwards(model, training=True)
    seen = logits(model, params)
    with overwritten(model, params):
        assert torch.equal(seen, logits(model))
    for name in params:
        others = {other: weight for other, weight in params.items() if other != name}
        same = torch.equal(params[name], students.seen[-1][name])
        assert same or not torch.equal(seen, logits(model, others)), f"the forward does not see {name}"


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
        trainer._unwrapped, SDPOConfig(teacher_update_rate=rate), seed=0
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


# --- how it starts ----------------------------------------------------------------------------------------


def edit(model: nn.Module) -> None:
    """Add the same noise to every trainable parameter each time."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


def evaluated(
    folder: Path, mode: str, *, before: bool = False, after: bool = False, stale: bool = False
) -> float:
    """The loss of `evaluate()` without training, of weights edited before or after construction."""
    model = warm_started()
    if before:
        edit(model)
    trainer = tiny.trainer(folder, start=model, sdpo_config=tiny.config(teacher_mode=mode), **EVALUATION)
    if stale:
        trainer._teacher.on_train_begin(trainer._unwrapped)
    if after:
        edit(model)
    loss: float = trainer.evaluate()["eval_loss"]
    return loss


EVALUATION = {
    "eval_dataset": tiny.conversations(4),
    "num_generations_eval": 4,
    "per_device_eval_batch_size": 4,
}


@pytest.mark.parametrize("mode", ["ema", "frozen", "trust_region", "live"])
def test_an_evaluation_before_training_has_the_present_weights_as_the_teacher(
    tmp_path: Path, mode: str
) -> None:
    expected = evaluated(tmp_path, mode, before=True)
    assert evaluated(tmp_path, mode, after=True) == pytest.approx(expected, rel=1e-6)
    if mode != "live":
        stale = evaluated(tmp_path, mode, after=True, stale=True)
        assert stale != pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("first", ["evaluate", "train"])
def test_training_starts_from_the_weights_when_it_begins(tmp_path: Path, first: str) -> None:
    config = tiny.config(teacher_mode="frozen")
    trainer = tiny.trainer(tmp_path, start=warm_started(), sdpo_config=config, **EVALUATION)
    if first == "evaluate":
        trainer.evaluate()
    edit(trainer._unwrapped)
    begin = trained(trainer._unwrapped)
    trainer.train()
    assert begin.keys() == trainer._teacher.state.params.keys()
    assert all(torch.equal(tensor, begin[name]) for name, tensor in trainer._teacher.state.params.items())
    assert not all(torch.equal(tensor, begin[name]) for name, tensor in trained(trainer._unwrapped).items())


def test_a_training_loss_outside_of_train_starts_the_teacher(tmp_path: Path) -> None:
    """In a custom training loop the teacher does not follow later edits of the student."""
    trainer = tiny.trainer(tmp_path, start=warm_started(), sdpo_config=tiny.config(teacher_mode="frozen"))
    edit(trainer._unwrapped)
    begin = trained(trainer._unwrapped)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = trainer._prepare_inputs([*tiny.conversations()])
    trainer.compute_loss(trainer.model, inputs)
    edit(trainer._unwrapped)
    (params,) = trainer._teacher.forwards(trainer._unwrapped, training=True)
    assert all(torch.equal(tensor, begin[name]) for name, tensor in params.items())


def test_a_second_training_continues_with_the_same_teacher_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer = tiny.trainer(
        tmp_path, start=lora(), sdpo_config=tiny.config(teacher_update_rate=RATE), **settings
    )
    students = Students(trainer._unwrapped)
    trainer.add_callback(students)

    def logged() -> list[str]:
        lines = [record.getMessage() for record in caplog.records if "called again" in record.getMessage()]
        caplog.clear()
        return lines

    trainer.train()
    assert logged() == []
    trainer.train()
    (line,) = logged()
    assert "after 2 updates" in line
    assert trainer._teacher.state.ticks == 4
    for name, weight in average(students.seen).items():
        torch.testing.assert_close(trainer._teacher.state.params[name].double(), weight, rtol=1e-6, atol=1e-6)
    # Resuming asks for it, so it logs nothing.
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert logged() == []
    assert trainer._teacher.state.ticks == 4


@pytest.mark.parametrize("mode", ["ema", "frozen", "trust_region"])
@pytest.mark.parametrize("name", ["full, tied embeddings", "LoRA, warm start"])
def test_it_starts_as_the_student_it_was_given(tmp_path: Path, name: str, mode: str) -> None:
    model = MODELS[name]()
    with torch.no_grad():  # weights that cannot be loaded from anywhere
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.01)
    before = logits(model)
    trainer = tiny.trainer(tmp_path, start=model, sdpo_config=tiny.config(teacher_mode=mode))
    params = trainer._teacher.forwards(trainer._unwrapped, training=True)[0]
    assert torch.equal(logits(trainer._unwrapped, params), before)


def test_the_start_rejects_an_adapter_at_zero() -> None:
    model = warm_started()
    zero = {name: torch.zeros_like(w) if "lora_B" in name else w for name, w in trained(model).items()}
    assert not torch.equal(logits(model, zero), logits(model))


def test_an_adapter_made_from_a_config_is_averaged_too(tmp_path: Path) -> None:
    trainer = tiny.trainer(
        tmp_path, sdpo_config=tiny.config(teacher_mode="lora_ema"), peft_config=LoraConfig(r=4)
    )
    assert trainer._teacher.rule == "ema"
    assert all("lora_" in name for name in trainer._teacher.state.params)


def test_lora_ema_insists_on_adapters(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"teacher_mode='lora_ema'.*peft_config.*teacher_mode='ema'"):
        tiny.trainer(tmp_path, sdpo_config=tiny.config(teacher_mode="lora_ema"))


def test_nothing_trainable_is_refused() -> None:
    with pytest.raises(ValueError, match="requires_grad"):
        TeacherStore(tiny.model().requires_grad_(False), SDPOConfig(), seed=0)


@pytest.mark.parametrize("mode", ["ema", "frozen"])
def test_other_trainable_parameters_than_at_the_start_are_refused_by_name(mode: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    store = started(model, teacher_mode=mode)
    model[0].bias.requires_grad_(False)
    for call in (partial(store.forwards, training=True), store.tick, store.distance):
        with pytest.raises(ValueError, match=r"lost '0\.bias'"):
            call(model)


@pytest.mark.parametrize(
    ("change", "gained"),
    [
        (lambda model: model.append(nn.Linear(2, 2, bias=False)), "1.weight"),
        (lambda model: setattr(model[0], "bias", nn.Parameter(torch.zeros(2))), "0.bias"),
        (lambda model: model[0].frozen.requires_grad_(True), "0.frozen"),
    ],
    ids=["a module", "a parameter", "a frozen one"],
)
def test_a_new_trainable_parameter_is_refused_at_the_next_tick(
    change: Callable[[Any], Any], gained: str
) -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    model[0].frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
    store = started(model)
    store.forwards(model, training=True)
    store.tick(model)
    change(model)
    with pytest.raises(ValueError, match=f"gained '{gained}'"):
        store.tick(model)


def test_a_parameter_that_became_tied_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    store = started(model)
    store.forwards(model, training=True)
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"lost '1\.weight'"):
        store.forwards(model, training=True)


def rate_of(students: list[Weights], teacher: Weights) -> float:
    """The rate r of one update from the first to the second student, θ' = θ_0 + r·(θ_1 − θ_0), by least squares."""
    moved = torch.cat([(students[1][name] - students[0][name]).flatten().double() for name in teacher])
    followed = torch.cat([(teacher[name] - students[0][name]).flatten().double() for name in teacher])
    return (moved @ followed / (moved @ moved)).item()


@pytest.mark.parametrize(
    ("samples", "config", "settings"),
    [
        (8, {}, {}),
        (16, {}, {"steps_per_generation": 2, "gradient_accumulation_steps": 2}),
        (8, {}, {"num_iterations": 2, "max_steps": 2}),
        (8, {"teacher_tick": "optimizer_step"}, {"steps_per_generation": 2}),
        (4, {"teacher_tick": "optimizer_step"}, {"num_iterations": 2}),
    ],
    ids=["a batch", "two micro-batches", "two passes", "a step", "a step of two passes"],
)
def test_the_rate_per_samples_is_that_of_the_completions_of_an_update(
    tmp_path: Path, samples: int, config: dict[str, Any], settings: dict[str, Any]
) -> None:
    config = tiny.config(teacher_update_rate=RATE, teacher_rate_samples=64, **config)
    trainer = tiny.trainer(tmp_path, sdpo_config=config, **{"max_steps": 1, **settings})
    students = Students(trainer._unwrapped)
    trainer.add_callback(students)
    trainer.train()
    assert trainer._teacher.state.ticks == 1
    rate = rate_of([students.seen[0], students.seen[-1]], trainer._teacher.state.params)
    assert rate == pytest.approx(1 - (1 - RATE) ** (samples / 64), rel=1e-4)
    assert rate != pytest.approx(1 - (1 - RATE) ** (2 * samples / 64), rel=1e-2)


def test_the_rate_per_samples_needs_the_samples() -> None:
    with pytest.raises(ValueError, match=r"samples_per_tick: expected the completions .*=256, got None"):
        TeacherStore(tiny.model(), SDPOConfig(teacher_rate_samples=256), seed=0)


def test_a_frozen_teacher_starts_again_after_every_so_many_batches(tmp_path: Path) -> None:
    """Batches of two optimizer steps; the run that resumes within the fourth continues the count."""
    settings = {
        "per_device_train_batch_size": 4,
        "steps_per_generation": 2,
        "max_steps": 9,
        "save_strategy": "steps",
        "save_steps": 7,
    }
    config = tiny.config(teacher_mode="frozen", teacher_restart_every=2)
    seen: list[Weights] = []

    class Teachers(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append({name: p.clone() for name, p in trainer._teacher.state.params.items()})

    trainer = tiny.trainer(tmp_path, sdpo_config=config, **settings)
    students = Students(trainer._unwrapped)
    trainer.add_callback(students)
    trainer.add_callback(Teachers())
    trainer.train()
    starts = [0, 0, 0, 4, 4, 4, 4, 8, 8]  # the student's step that the teacher of each step equals
    for teacher, start in zip(seen, starts, strict=True):
        assert all(torch.equal(tensor, students.seen[start][name]) for name, tensor in teacher.items())
    assert not torch.equal(next(iter(seen[0].values())), next(iter(seen[3].values())))
    whole, seen = seen, []
    trainer = tiny.trainer(tmp_path / "again", sdpo_config=config, **settings)
    trainer.add_callback(Teachers())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    for ours, theirs in zip(seen, whole[7:], strict=True):
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_a_restart_takes_the_present_student(offload: str) -> None:
    model = tiny.model()
    store = started(model, teacher_mode="frozen", teacher_restart_every=2, teacher_offload=offload)
    first = trained(model)
    for begins_again in (False, True, False, True):
        with torch.no_grad():
            model.model.norm.weight.add_(1.0)
        store.tick(model)
        expected = trained(model) if begins_again else first
        assert all(torch.equal(tensor, expected[name]) for name, tensor in store.state.params.items())
        first = expected


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


# --- offloading -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["ema", "frozen", "trust_region"])
def test_offloading_changes_no_bit(tmp_path: Path, mode: str, dtype: str) -> None:
    states = [
        run(lora(), tmp_path, teacher_mode=mode, teacher_dtype=dtype, teacher_offload=offload)[
            0
        ]._teacher.state
        for offload in ("none", "cpu")
    ]
    assert states[0].ticks == states[1].ticks == 3
    for name, tensor in states[0].params.items():
        assert torch.equal(tensor, states[1].params[name])
        assert tensor.dtype == (torch.bfloat16 if (mode, dtype) == ("ema", "bfloat16") else torch.float32)


def test_an_offloaded_state_rounds_by_name(tmp_path: Path) -> None:
    """The counter-example, the same noise for every parameter, would pass with one parameter."""
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    model[1].load_state_dict(model[0].state_dict())
    store = started(model, teacher_dtype="bfloat16", teacher_offload="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01)
    store.tick(model)
    first, second = store.state.params.values()
    assert not torch.equal(first, second)


def test_an_offloaded_state_travels_to_the_parameters() -> None:
    model = nn.Linear(2, 2).bfloat16()
    store = started(model, teacher_offload="cpu")
    (params,) = store.forwards(model.to("meta"), training=True)
    assert {(p.dtype, p.device.type) for p in params.values()} == {(torch.bfloat16, "meta")}
    assert all((p.dtype, p.device.type) == (torch.float32, "cpu") for p in store.state.params.values())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_offloaded_state_is_pinned_and_the_device_holds_one_parameter(
    dtype: torch.dtype,
) -> None:
    model = stack().to("cuda", dtype)
    largest = max(p.numel() * 4 for p in model.parameters())

    def extra(action: Callable[[], Any]) -> int:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        return torch.cuda.max_memory_allocated() - before

    made: list[TeacherStore] = []
    offload = SDPOConfig(teacher_offload="cpu")
    assert extra(lambda: made.append(TeacherStore(model, offload, seed=0))) <= 2 * largest
    store = made[0]
    assert extra(lambda: store.on_train_begin(model)) <= 2 * largest
    assert all(t.device.type == "cpu" and t.is_pinned() for t in store.state.params.values())
    assert extra(lambda: store.tick(model)) <= 2 * largest
    assert all(t.device.type == "cpu" and t.is_pinned() for t in store.state.params.values())
    assert extra(lambda: store.distance(model)) <= 8 * largest
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    assert extra(lambda: store.forwards(model, training=True)) <= whole + 2 * largest
    before = torch.cuda.memory_allocated()
    params = store.forwards(model, training=True)
    assert all(t.device.type == "cuda" and t.dtype == dtype for t in params[0].values())
    del params
    assert torch.cuda.memory_allocated() == before
    assert extra(lambda: made.append(started(model))) > 20 * largest


# --- memory and operations --------------------------------------------------------------------------------


def stack(parameters: int = 40) -> nn.Sequential:
    """Many parameters of one size, so that one is much smaller than all."""
    return nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(parameters)))


class Peak(TorchDispatchMode):
    """The peak of bytes held by the results of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.now = 0
        self._owners: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        old = {_address(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (
                _address(tensor) in self._owners or _address(tensor) not in old
            ):
                self._hold(_address(tensor), tensor.untyped_storage().nbytes(), tensor)
        return result

    def _hold(self, address: int, size: int, tensor: Tensor) -> None:
        if not self._owners.get(address):
            self.now += size
            self.bytes = max(self.bytes, self.now)
        self._owners[address] = self._owners.get(address, 0) + 1
        weakref.finalize(tensor, self._release, address, size)

    def _release(self, address: int, size: int) -> None:
        self._owners[address] -= 1
        if not self._owners[address]:
            del self._owners[address]
            self.now -= size


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def peak(action: Callable[[], Any]) -> int:
    with Peak() as counter:
        action()
    return counter.bytes


@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tick_and_a_distance_hold_a_few_parameters_at_a_time(
    dtype: torch.dtype, offload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A tick updates many parameters in one operation; here two.
    monkeypatch.setattr(sdpo.teacher, "_TOGETHER", 2 * 64 * 64)
    model = stack().to(dtype)
    one = 64 * 64 * 4
    store = started(model, teacher_offload=offload)
    assert peak(lambda: store.tick(model)) <= 2 * one
    assert peak(lambda: store.distance(model)) <= 4 * one
    rounded = started(model, teacher_dtype="bfloat16", teacher_offload=offload)
    assert peak(lambda: rounded.tick(model)) <= 6 * one


def test_the_peak_rejects_copies_of_the_model() -> None:
    model, one = stack().bfloat16(), 64 * 64 * 4
    state = started(model).state
    params = dict(model.named_parameters())

    def distance_over_a_float_copy() -> Tensor:
        student = {name: p.detach().float() for name, p in params.items()}
        return sum((state.params[name] - p).square().sum() for name, p in student.items()).sqrt()

    def tick_out_of_place() -> Weights:
        return {name: torch.lerp(w, params[name].detach().float(), RATE) for name, w in state.params.items()}

    for wrong in (distance_over_a_float_copy, tick_out_of_place):
        assert peak(wrong) >= 40 * one


class Operations(TorchDispatchMode):
    """Counts operations, without those that only allocate memory."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is not torch.ops.aten.empty_like.default
        return function(*args, **(kwargs or {}))


def operations(action: Callable[[], Any]) -> int:
    with Operations() as counter:
        action()
    return counter.count


@pytest.mark.parametrize("mode", ["ema", "frozen", "trust_region"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tick_and_a_forward_take_the_same_few_operations_for_any_number_of_parameters(
    dtype: torch.dtype, mode: str
) -> None:
    def counts(parameters: int) -> list[int]:
        model = stack(parameters).to(dtype)
        store = started(model, teacher_mode=mode)
        return [
            operations(lambda: store.tick(model)),
            operations(lambda: store.forwards(model, training=True)),
        ]

    assert counts(40) == counts(2)
    assert max(counts(40)) <= 2


def test_the_count_rejects_one_parameter_after_the_other() -> None:
    def one_by_one(parameters: int) -> int:
        model = stack(parameters).bfloat16()
        state = started(model).state
        with torch.no_grad():
            return operations(
                lambda: [state.params[n].lerp_(p.float(), RATE) for n, p in model.named_parameters()]
            )

    assert one_by_one(40) == 20 * one_by_one(2)


def storage_bytes(tensors: dict[str, Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors.values())


@pytest.mark.parametrize(
    ("name", "dtype", "bytes_per_number"),
    [
        ("full, tied embeddings", "float32", 4),
        ("full, untied head", "float32", 4),
        ("full, bfloat16", "float32", 4),
        ("full, bfloat16", "bfloat16", 2),
        ("LoRA", "float32", 4),
        ("DoRA", "bfloat16", 2),
    ],
)
def test_the_state_is_one_copy_of_what_trains(name: str, dtype: str, bytes_per_number: int) -> None:
    model = MODELS[name]()
    store = started(model, teacher_dtype=dtype)
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert storage_bytes(store.state.params) == numbers * bytes_per_number
    if name.endswith("RA"):
        everything = sum(p.numel() * p.element_size() for p in model.parameters())
        assert storage_bytes(store.state.params) < everything / 10


COSTS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], int, int]] = {
    # Model, configuration, and copies of the trainable parameters: in the state, and more during a forward.
    "float32": (tiny.model, {}, 1, 0),
    "bfloat16": (MODELS["full, bfloat16"], {}, 2, 1),
    "bfloat16, averaged in bfloat16": (MODELS["full, bfloat16"], {"teacher_dtype": "bfloat16"}, 1, 0),
    "bfloat16, frozen": (MODELS["full, bfloat16"], {"teacher_mode": "frozen"}, 1, 0),
    "LoRA": (lora, {}, 1, 0),
    "LoRA in bfloat16": (lambda: lora().bfloat16(), {}, 2, 1),
}


@pytest.mark.parametrize("name", COSTS)
def test_a_forward_holds_the_copies_that_are_documented_and_no_more(name: str) -> None:
    make, config, stored, during = COSTS[name]
    model = make()
    size = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    store = started(model, **config)
    assert storage_bytes(store.state.params) == stored * size
    alone = peak(lambda: logits(model))
    with Peak() as counter:
        for params in store.forwards(model, training=True):
            logits(model, params)
        del params
    assert counter.bytes - alone == during * size
    assert counter.now == 0, "the copy outlives the teacher's forward"
    if name.startswith("LoRA"):
        assert (stored + during) * size < sum(p.numel() * p.element_size() for p in model.parameters()) / 2


def test_the_peak_of_a_forward_rejects_a_detour_through_float32() -> None:
    model = MODELS["full, bfloat16"]()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    alone = peak(lambda: logits(model))

    def detour() -> Tensor:
        moved = {name: p.detach().float() for name, p in model.named_parameters()}
        return logits(model, {name: weight.bfloat16() for name, weight in moved.items()})

    assert peak(detour) - alone == 3 * size


def alive() -> int:
    """Bytes of all tensors in the process, every storage counted once."""
    gc.collect()
    # Fake tensors of the compiler, which another test may have left, have no storage.
    tensors = [
        o
        for o in gc.get_objects()
        if issubclass(type(o), Tensor) and not type(o).__module__.startswith("torch._subclasses")
    ]
    return sum({_address(t): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("name", ["full, untied head", "LoRA"])
def test_nothing_else_of_the_models_size_stays_alive(tmp_path: Path, name: str) -> None:
    def grown(mode: str) -> tuple[int, Any]:
        before = alive()
        config = tiny.config(loss_backend="logits", teacher_mode=mode)
        trainer = tiny.trainer(tmp_path, start=MODELS[name](), sdpo_config=config, max_steps=2)
        trainer.train()
        return alive() - before, trainer

    without, trainer = grown("live")
    model_bytes = sum(p.numel() * 4 for p in trainer._unwrapped.parameters())
    del trainer
    with_teacher, trainer = grown("ema")
    unexplained = with_teacher - without - storage_bytes(trainer._teacher.state.params)
    assert abs(unexplained) < model_bytes / 50


def test_the_count_rejects_a_second_model() -> None:
    model = MODELS["full, untied head"]()
    before = alive()
    second = trained(model)
    assert alive() - before >= storage_bytes(second) > 0


def test_the_distance_meets_a_state_that_rests_elsewhere() -> None:
    state = frozen().init({"w": torch.ones(3)})
    assert teacher_distance(state, {"w": torch.ones(3, device="meta")}).device.type == "meta"


def test_on_one_process_the_local_shards_are_the_trainable_parameters() -> None:
    model = lora()
    parameters = dict(model.named_parameters())
    local = shards.local_shards(model)
    assert local.keys() == trained(model).keys()
    assert all(tensor.data_ptr() == parameters[name].data_ptr() for name, tensor in local.items())
