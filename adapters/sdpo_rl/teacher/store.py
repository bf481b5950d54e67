"""The teacher of a model: a state over its trainable parameters, never a second model."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import Tensor, nn

import sdpo

from ..config import SDPOConfig
from . import shards
from .shards import Tensors

logger = logging.getLogger("sdpo_rl")


class TeacherStore:
    """Holds the core's teacher state of one model and gives the weights of the teacher forwards.

    The state covers the trainable parameters only; a frozen, possibly quantized, base is shared with the student.
    Of a sharded model it covers this rank's shards.

    The teacher starts from the student's weights when it is first used for training, not when it is constructed:
    until then weights may be edited, and an evaluation takes the student itself as its teacher. A later `train()`
    continues with the same teacher; so does one that resumes from a checkpoint, with the checkpoint's.

    With `teacher_offload="cpu"` the state is stored in CPU memory, pinned if there is a GPU, and copied to the
    device for the forwards only. Starting and updating it hold one parameter at a time on the device.

    Memory, in copies of the trainable parameters: the state takes one in their own dtype (`frozen`, `trust_region`,
    or an average of the same dtype), two as a float32 average of bfloat16 parameters. A teacher forward takes one
    more copy, in the model's dtype, if the state has another dtype or is offloaded; it is freed before the student
    forward. Of a sharded model this copy is always made: of the teacher's shards under ZeRO-3, of the student's
    under FSDP2. With LoRA all of this is megabytes.

    Attributes:
        state: the core's `TeacherState`.

    Args:
        model: the unwrapped model.
        config: the run's configuration; its `teacher_*` fields and `trust_region_coef` are used.
        seed: of the stochastic rounding of a bfloat16 average.
        samples_per_tick: completions from one tick to the next, over all processes; needed by a moving average
            unless `teacher_rate_samples` is `None`.

    Raises:
        TypeError: a trainable parameter is not a floating tensor.
        ValueError: `lora_ema` on a model without adapters; a moving average that needs `samples_per_tick`
            without it; no trainable parameter; later, trainable parameters that changed during training.
    """

    def __init__(
        self, model: nn.Module, config: SDPOConfig, *, seed: int, samples_per_tick: float | None = None
    ) -> None:
        if config.teacher_mode == "lora_ema" and not getattr(model, "peft_config", None):
            raise ValueError(
                "teacher_mode='lora_ema': expected a model with adapters, got none; pass peft_config, or set "
                "teacher_mode='ema', which averages all trainable parameters"
            )
        params = shards.local_shards(model)
        if not params:
            raise ValueError(
                "model: expected trainable parameters, got none with requires_grad; unfreeze some, or pass a "
                "peft_config"
            )
        self._mode = config.teacher_mode
        self._offload = config.teacher_offload == "cpu"
        self._restart_every = config.teacher_restart_every
        self._teacher = _core_teacher(config, seed, samples_per_tick)
        self._started = False  # the state is more than the weights at construction
        self._trained = False  # a train() has used the state since it was started or loaded
        self.state: sdpo.TeacherState = self._start(params)

    @property
    def rule(self) -> str:
        """The update rule; `lora_ema` is `ema` on a model with adapters, not a rule of its own."""
        return "ema" if self._mode == "lora_ema" else self._mode

    def forwards(self, model: nn.Module, *, training: bool) -> list[Tensors | None]:
        """The weights of each teacher forward: tensors by name that replace the student's, or `None` for its own.

        One forward, but two for `trust_region`, whose logits lie between the start's and the student's: the start
        comes first. `training=False` is an evaluation, which does not start a teacher.
        """
        count = 2 if self._mode == "trust_region" else 1
        if self._mode == "live" or not (training or self._started):
            return [None] * count
        student = self._student(model)
        params = self.state.params
        if not shards.is_sharded(model):  # `swap_shards` casts
            params = _cast_like(params, student)
        return [params, None][:count]

    def tick(self, model: nn.Module) -> None:
        """Move the teacher towards the student, once; or start it again, with `teacher_restart_every`."""
        student = self._student(model)
        if self._restart_every is not None and self.state.ticks + 1 >= self._restart_every:
            self._start_again(model)
            return
        if not self._offload:
            self.state = self._teacher.update(self.state, student)
            return
        updated: Tensors = {}
        for name, tensor in self.state.params.items():
            single = sdpo.TeacherState({name: tensor}, self.state.ticks)
            updated |= self._teacher.update(single, {name: student[name].to(tensor.device)}).params
        self.state = sdpo.TeacherState(updated, self.state.ticks + 1)

    def distance(self, model: nn.Module) -> Tensor | None:
        """‖θ' − θ‖/‖θ‖ [] over the trainable parameters of all ranks; `None` for `live`."""
        if self._mode == "live":
            return None
        student = self._student(model)
        # An offloaded state is compared on the CPU.
        compared = {name: student[name].to(tensor.device) for name, tensor in self.state.params.items()}
        return shards.global_ratio(sdpo.teacher_distance(self.state, compared), student, model)

    def on_train_begin(self, model: nn.Module) -> None:
        """Start from the student's weights, or continue with the teacher of a checkpoint or an earlier `train()`.

        Call it after the model was prepared: only then do all ranks hold the weights of the first.
        """
        if not self._started:
            self.restart(model)
        elif self._trained and self._mode != "live":
            logger.warning(
                "train() was called again and continues with the earlier teacher, after %d updates; build a new "
                "trainer for a teacher that starts from the present weights.",
                self.state.ticks,
            )
        self._trained = True

    def restart(self, model: nn.Module) -> None:
        """Start again from the student's present weights."""
        self._start_again(model)
        self._started, self._trained = True, False

    # --- checkpoints -------------------------------------------------------------------------------------

    def layout(self, model: nn.Module) -> dict[str, tuple[tuple[int, ...] | None, torch.dtype]]:
        """Shape and dtype of every tensor of the full state of a start; the shape is `None` for a sharded model.

        They are those of the model as it is now: the state may be of the model before it was prepared.
        """
        sharded = shards.is_sharded(model)
        params = shards.local_shards(model)
        empty = self._teacher.init({name: tensor.new_empty(0) for name, tensor in params.items()}).params
        return {
            name: (None if sharded else tuple(params[name].shape), tensor.dtype)
            for name, tensor in empty.items()
        }

    def full_state(self, model: nn.Module, *, keep: bool) -> Tensors:
        """The full tensors in CPU memory on the ranks with `keep`, {} on the others; every rank must call it."""
        self._student(model)
        full: Tensors = {}
        sharded = shards.is_sharded(model)
        for name, shard in self.state.params.items():
            tensor = shards.full_tensors(model, {name: shard})[name] if sharded else shard
            if keep:
                full[name] = tensor.detach().cpu().contiguous()
        return full

    def load(self, model: nn.Module, tensors: Iterable[tuple[str, Tensor]], *, ticks: int) -> None:
        """Load what `full_state` returned, one tensor at a time."""
        self.restart(model)
        sharded = shards.is_sharded(model)
        for name, tensor in tensors:
            shard = shards.shard_tensors(model, {name: tensor})[name] if sharded else tensor
            self.state.params[name].copy_(shard)
        self.state = self.state._replace(ticks=ticks)

    # --- the state and its student -----------------------------------------------------------------------

    def _start_again(self, model: nn.Module) -> None:
        self.state = sdpo.TeacherState({}, 0)  # frees its memory first
        self.state = self._start(shards.local_shards(model))

    def _start(self, params: Tensors) -> sdpo.TeacherState:
        """A state equal to the parameters, where it is stored."""
        if not self._offload:
            return self._teacher.init(params)
        pin = torch.cuda.is_available()
        stored: Tensors = {}
        for name, param in params.items():
            for key, tensor in self._teacher.init({name: param}).params.items():
                stored[key] = tensor.cpu().pin_memory() if pin else tensor.cpu()
        return sdpo.TeacherState(stored, 0)

    def _student(self, model: nn.Module) -> Tensors:
        """The model's trainable parameters, of which the state has the names and, unless offloaded, the devices."""
        if not self._started:
            self.restart(model)
        student = shards.local_shards(model)
        params = self.state.params
        if self._mode == "live":
            return student
        if params.keys() != student.keys():
            lost = [f"lost {name!r}" for name in params if name not in student]
            gained = [f"gained {name!r}" for name in student if name not in params]
            raise ValueError(
                f"model: expected the trainable parameters that training began with, got others: "
                f"{', '.join(lost + gained)}; set requires_grad before train()"
            )
        if not self._offload:
            # A model may move to another device between two calls of train().
            params = {name: tensor.to(student[name].device) for name, tensor in params.items()}
            self.state = self.state._replace(params=params)
        return student


def _cast_like(params: Tensors, student: Tensors) -> Tensors:
    """The tensors on the devices and in the dtypes of the student's parameters."""
    params = {name: _move_like(tensor, student[name]) for name, tensor in params.items()}
    others = [name for name, tensor in params.items() if tensor.dtype != student[name].dtype]
    # In one operation: adapters are hundreds of tensors, each too small to keep a GPU busy.
    cast = [torch.empty_like(student[name]) for name in others]
    if others:
        torch._foreach_copy_(cast, [params[name] for name in others])
    return params | dict(zip(others, cast, strict=True))


def _move_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The tensor on the parameter's device; a moved one is cast at once, so that two copies of all never exist."""
    if tensor.device == parameter.device:
        return tensor
    # Moved before it is cast: only a plain copy from pinned memory is asynchronous.
    return tensor.to(parameter.device, non_blocking=True).to(parameter.dtype)


def _core_teacher(config: SDPOConfig, seed: int, samples_per_tick: float | None) -> sdpo.Teacher:
    if config.teacher_mode in ("frozen", "trust_region"):
        return sdpo.frozen()
    if config.teacher_mode == "live":
        return sdpo.live()
    rate = config.teacher_update_rate
    if config.teacher_rate_samples is not None:
        if samples_per_tick is None:
            raise ValueError(
                "samples_per_tick: expected the completions between two ticks with teacher_rate_samples="
                f"{config.teacher_rate_samples}, got None; pass them"
            )
        rate = sdpo.rate_per_tick(rate, samples=samples_per_tick, per_samples=config.teacher_rate_samples)
    return sdpo.ema(
        update_rate=rate,
        dtype="bfloat16" if config.teacher_dtype == "bfloat16" else "float32",
        seed=seed,
        inplace=True,
    )
