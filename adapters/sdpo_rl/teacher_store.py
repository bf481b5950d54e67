"""The teacher: a state over the student's trainable parameters, never a second model."""

from __future__ import annotations

from torch import Tensor, nn

import sdpo

from . import ranks
from .config import SDPOConfig

Params = dict[str, Tensor]


def trainable_parameters(model: nn.Module) -> Params:
    """The parameters that training moves, by name; a frozen, possibly quantized, base is shared instead.

    Of a sharded model, the parts that this rank holds.
    """
    return ranks.held_parameters(model)


class TeacherStore:
    """Holds the core's teacher state for a model and hands out the weights of the teacher's forwards.

    Raises:
        ValueError: `lora_ema` on a model without adapters, or a model in which nothing trains.
    """

    def __init__(self, model: nn.Module, config: SDPOConfig, *, seed: int) -> None:
        if config.teacher_mode == "lora_ema" and not hasattr(model, "peft_config"):
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
        self._teacher = _core_teacher(config, seed)
        self.state: sdpo.TeacherState = self._teacher.init(params)

    def forwards(self, model: nn.Module) -> list[Params | None]:
        """The weights of each teacher forward: named tensors in place of the student's, or `None` for its own.

        One forward for every mode but `trust_region`, whose logits lie between the first model's and the
        student's: the first model comes first.
        """
        if self._mode == "live":
            return [None]
        own = self._own(model)
        params: Params = {
            name: held.to(device=own[name].device, dtype=own[name].dtype)
            for name, held in self.state.params.items()
        }
        return [params, None] if self._mode == "trust_region" else [params]

    def tick(self, model: nn.Module) -> None:
        """Move the teacher towards the student, once."""
        self.state = self._teacher.update(self.state, self._own(model))

    def distance(self, model: nn.Module) -> Tensor | None:
        """‖θ' − θ‖/‖θ‖ [] over the trainable parameters; `None` for a live teacher."""
        if self._mode == "live":
            return None
        own = self._own(model)
        return ranks.global_ratio(sdpo.teacher_distance(self.state, own), own, model)

    def _own(self, model: nn.Module) -> Params:
        """The model's parameters; the state takes their parts if the model was sharded after this was made."""
        own = trainable_parameters(model)
        if any(held.shape != own[name].shape for name, held in self.state.params.items()):
            # Before the first tick the student is the better source: where only rank 0 loads the weights, the
            # others had none when the state was made.
            params = self.state.params
            self.state = (
                self.state._replace(params=ranks.held_parts(model, params))
                if self.state.ticks
                else self._teacher.init(own)
            )
        return own


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
