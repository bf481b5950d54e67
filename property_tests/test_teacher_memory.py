"""The memory of a teacher, also outside of the device, and the operations of its updates."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from teacher_cases import MODELS, RATE, Weights, logits, lora, run, started, trained
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sdpo.teacher
from sdpo import frozen, teacher_distance
from sdpo_rl import SDPOConfig
from sdpo_rl.teacher import shards
from sdpo_rl.teacher.store import TeacherStore

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
    offload = SDPOConfig(teacher_offload="cpu", teacher_rate_samples=None)
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
