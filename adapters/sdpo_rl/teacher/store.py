"""The teacher: a state over the student's trainable parameters, never a second model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

import sdpo

from ..config import SDPOConfig
from . import shards
from .swap import Layout, Weights

Params = dict[str, Tensor]


def trainable_parameters(model: nn.Module) -> Params:
    """The parameters that training moves, by name; a frozen, possibly quantized, base is shared instead.

    Of a sharded model, the parts that this rank holds.
    """
    return shards.held_parameters(model)


class TeacherStore:
    """Holds the core's teacher state for a model and hands out the weights of the teacher's forwards.

    With `teacher_offload="cpu"` the state rests in CPU memory, pinned where there is a GPU. It then travels
    for the forwards alone; making it and moving it hold one parameter at a time on the device.

    What it costs, in bytes of what trains. The state: one copy where its dtype is that of the trainable
    parameters, as it is for `frozen` and `trust_region`; a float32 average of bfloat16 parameters two. A
    forward whose dtype is not the state's, or whose state is offloaded, holds one copy more, in the model's
    dtype, which is gone before the student's forward; a sharded model sets its own part aside instead. With
    adapters that train alone, all of it is megabytes.

    Raises:
        ValueError: `lora_ema` on a model without adapters, a model in which nothing trains, or, later, other
            trainable parameters than at the start.
    """

    def __init__(self, model: nn.Module, config: SDPOConfig, *, seed: int) -> None:
        if config.teacher_mode == "lora_ema" and not getattr(model, "peft_config", None):
            raise ValueError(
                "teacher_mode='lora_ema' averages adapters, and the model has none; pass peft_config, or use "
                "teacher_mode='ema', which averages whatever trains"
            )
        params = trainable_parameters(model)
        if not params:
            raise ValueError(
                "no parameter of the model has requires_grad; there is nothing to train or to average"
            )
        self._mode = config.teacher_mode
        self._offload = config.teacher_offload == "cpu"
        self._teacher = _core_teacher(config, seed)
        self.state: sdpo.TeacherState = self._start(params)
        self._begun = False
        self._layout = Layout()

    @property
    def rule(self) -> str:
        """How the weights move; `lora_ema` is `ema` with a condition, not a rule of its own."""
        return "ema" if self._mode == "lora_ema" else self._mode

    def forwards(self, model: nn.Module) -> list[Params | None]:
        """The weights of each teacher forward: named tensors in place of the student's, or `None` for its own.

        One forward for every mode but `trust_region`, whose logits lie between the first model's and the
        student's: the first model comes first.
        """
        if self._mode == "live":
            return [None]
        own = self._own(model, walk=False)  # a tick, which comes once a step, takes one
        params = self.state.params
        if not shards.is_sharded(model):  # a shard's contents are exchanged, and copying into it casts
            params = Weights(_as(params, own), self._layout.places)
        return [params, None] if self._mode == "trust_region" else [params]

    def tick(self, model: nn.Module) -> None:
        """Move the teacher towards the student, once."""
        own = self._own(model)
        if not self._offload:
            self.state = self._teacher.update(self.state, own)
            return
        moved: Params = {}
        for name, held in self.state.params.items():
            single = sdpo.TeacherState({name: held}, self.state.ticks)
            moved |= self._teacher.update(single, {name: own[name].to(held.device)}).params
        self.state = sdpo.TeacherState(moved, self.state.ticks + 1)

    def distance(self, model: nn.Module) -> Tensor | None:
        """‖θ' − θ‖/‖θ‖ [] over the trainable parameters; `None` for a live teacher."""
        if self._mode == "live":
            return None
        own = self._own(model)
        # An offloaded state is compared where it rests.
        student = {name: own[name].to(held.device) for name, held in self.state.params.items()}
        return shards.global_ratio(sdpo.teacher_distance(self.state, student), own, model)

    def begin(self, model: nn.Module) -> None:
        """Training begins: start as the student that the ranks now share, unless there is something to go on with.

        Until here ranks may have held different weights, or none; DDP, FSDP and DeepSpeed hand out those of the
        first rank when they take the model over.
        """
        self._layout = Layout()  # to be ready for training a model may have been given other modules
        if not self._begun:
            self.restart(model)

    # --- at rest, in checkpoints -------------------------------------------------------------------------

    def layout(self, model: nn.Module) -> dict[str, tuple[tuple[int, ...] | None, torch.dtype]]:
        """Shape and dtype of every tensor of the whole state; no shape where a rank holds only a part of it."""
        whole = not shards.is_sharded(model)
        return {
            name: (tuple(held.shape) if whole else None, held.dtype)
            for name, held in self.state.params.items()
        }

    def whole(self, model: nn.Module, *, keep: bool) -> Params:
        """The whole state in CPU memory, on the ranks that `keep` it; every rank takes part."""
        self._own(model)
        kept: Params = {}
        sharded = shards.is_sharded(model)
        for name, part in self.state.params.items():
            tensor = shards.full_tensors(model, {name: part})[name] if sharded else part
            if keep:
                kept[name] = tensor.detach().cpu().contiguous()
        return kept

    def restore(self, model: nn.Module, tensors: Iterable[tuple[str, Tensor]], *, ticks: int) -> None:
        """Take up a state that `whole` gave, one tensor at a time, into the memory of the present one."""
        self._own(model)
        sharded = shards.is_sharded(model)
        for name, tensor in tensors:
            part = shards.held_parts(model, {name: tensor})[name] if sharded else tensor
            self.state.params[name].copy_(part)
        self.state = self.state._replace(ticks=ticks)
        self._begun = True

    def restart(self, model: nn.Module) -> None:
        """Begin again from the student as it is."""
        self.state = self._start(trainable_parameters(model))
        self._begun = True

    def _start(self, params: Params) -> sdpo.TeacherState:
        if not self._offload:
            return self._teacher.init(params)
        held: Params = {}
        for name, param in params.items():
            held |= self._resting(self._teacher.init({name: param}).params)
        return sdpo.TeacherState(held, 0)

    def _resting(self, params: Params) -> Params:
        if not self._offload:
            return params
        pinned = torch.cuda.is_available()
        return {name: t.cpu().pin_memory() if pinned else t.cpu() for name, t in params.items()}

    def _own(self, model: nn.Module, *, walk: bool = True) -> Params:
        """The model's parameters; the state follows if the model was sharded or moved after this was made."""
        if shards.is_sharded(model):
            own, self._layout = trainable_parameters(model), Layout()  # lest whole parameters stay alive
        else:
            own = self._layout.trainable(model, walk=walk)
        params = self.state.params
        if self._mode != "live" and params.keys() != own.keys():
            lost = [f"lost {name!r}" for name in params if name not in own]
            found = [f"gained {name!r}" for name in own if name not in params]
            raise ValueError(
                f"the model's trainable parameters changed under the teacher: {', '.join(lost + found)}; set "
                "requires_grad before building the trainer"
            )
        if any(held.shape != own[name].shape for name, held in params.items()):
            if not self._begun:
                self.state = self._start(own)
                return own
            params = self._resting(shards.held_parts(model, params))
        if not self._offload and any(held.device != own[name].device for name, held in params.items()):
            params = {name: held.to(own[name].device) for name, held in params.items()}
        self.state = self.state._replace(params=params)
        return own


def _as(params: Params, own: Params) -> Params:
    """The tensors on the devices and in the dtypes of the parameters of the same names."""
    params = {name: _there(held, own[name]) for name, held in params.items()}
    others = [name for name, held in params.items() if held.dtype != own[name].dtype]
    # At once: adapters are hundreds of tensors, too small to keep a GPU busy one by one.
    cast = [torch.empty_like(own[name]) for name in others]
    if others:
        torch._foreach_copy_(cast, [params[name] for name in others])
    return params | dict(zip(others, cast, strict=True))


def _there(held: Tensor, own: Tensor) -> Tensor:
    """`held` on the device of `own`; what must travel is cast one by one, not to be there twice all together."""
    if held.device == own.device:
        return held
    # The dtype changes on the device: only there is that fast, and only so is pinned memory of use.
    return held.to(own.device, non_blocking=True).to(own.dtype)


def _core_teacher(config: SDPOConfig, seed: int) -> sdpo.Teacher:
    if config.teacher_mode == "frozen":
        return sdpo.frozen()
    if config.teacher_mode == "live":
        return sdpo.live()
    if config.teacher_mode == "trust_region":
        return sdpo.trust_region(coef=config.trust_region_coef)
    return sdpo.ema(
        update_rate=config.teacher_update_rate,
        dtype="bfloat16" if config.teacher_dtype == "bfloat16" else "float32",
        seed=seed,
        inplace=True,
    )
