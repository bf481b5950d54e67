"""One micro-batch: which rows run, the teacher's forward, the student's, and the loss between them."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..teacher import shards
from . import forward as step_forward
from . import loss as step_loss
from .batch import Reading, columns, compact, position_ids
from .row_groups import RowGroup, row_groups, run_groups

logger = logging.getLogger("sdpo_rl")

_Trainer: Any = object
# A teacher's forward of so many tokens fills a device with a model of that width (7B); the activations of more
# would only cost memory. A narrower model takes more tokens to fill it.
_TEACHER_TOKENS, _TEACHER_WIDTH = 8192, 3584


class MicroBatchLoss(_Trainer):
    """The part of the trainer that turns a micro-batch into a sum of divergences."""

    _fused: bool | None = (
        None  # whether hidden states and head suffice; `None` until the model has been asked
    )

    def _distilled_total(self, model: nn.Module, inputs: Any) -> Tensor:
        loss_mask = self._loss_mask(inputs)
        masks = (loss_mask, *(inputs[f"{part}_mask"] for part in ("prompt", "teacher_prompt", "completion")))
        # All that a micro-batch reads from the device, in one go: it waits each time.
        counts = torch.stack([mask.sum(-1) for mask in masks], dim=1).tolist()
        active = [row for row, (tokens, *_) in enumerate(counts) if tokens]
        if not active:
            if self.accelerator.num_processes == 1 and not shards.is_sharded(self._unwrapped):
                return self._zero_loss()
            # Another rank may be active, and its collectives need this one: a row as it is, without a loss.
            active = [0]
            own = {f"teacher_{name}": inputs[name] for name in ("prompt_ids", "prompt_mask")}
            inputs = {**inputs, **own}
            counts = [(0, prompt, prompt, completion) for _, prompt, _, completion in counts]
        places = torch.tensor(active, device=loss_mask.device)
        rows, loss_mask = _row_tensors(inputs, places, len(loss_mask)), loss_mask[places]
        prompts, teacher_prompts, completions = zip(*(counts[row][1:] for row in active), strict=True)
        student, teacher = (
            compact(
                rows[f"{whose}prompt_ids"],
                rows[f"{whose}prompt_mask"],
                rows["completion_ids"],
                rows["completion_mask"],
                list(zip(sizes, completions, strict=True)),
            )
            for whose, sizes in (("", prompts), ("teacher_", teacher_prompts))
        )
        _, length = columns(student.sizes)
        targets = step_loss.Targets(
            tokens=rows["completion_ids"][:, :length],
            loss_mask=loss_mask[:, :length],
            old_log_probs=rows["old_per_token_logps"][:, :length] if "old_per_token_logps" in rows else None,
            weights=self._weights(rows, loss_mask, length),
        )
        router_losses: list[Tensor] | None = [] if self.aux_loss_enabled else None
        output = self._distill(model, student, teacher, targets, router_losses)
        metrics = step_loss.step_metrics(self.sdpo_config, output, targets)
        total = output.total
        if router_losses:
            # Weighted like the divergence it is added to: a step has one router loss, however its rows are split
            # and wherever rows without signal lie.
            count = self._active_count(inputs)
            router_total = torch.stack(router_losses).mean().to(total.device) * count
            total = total + self.router_aux_loss_coef * router_total
            metrics["aux_loss"] = router_total, count
        self._sums[self._mode].add(metrics)
        return total

    def _distill(
        self,
        model: nn.Module,
        student: Reading,
        teacher: Reading,
        targets: step_loss.Targets,
        router_losses: list[Tensor] | None,
    ) -> Any:
        unwrapped, (_, length) = self._unwrapped, columns(student.sizes)
        reads, answers = (
            step_forward.forward_arguments(unwrapped, ids, mask, position_ids(mask), length + 1)
            for ids, mask, _ in (teacher, student)
        )
        if self._fused is None:
            self._fused = self._can_fuse(unwrapped, answers)
        forward: Any = step_forward.completion_states if self._fused else step_forward.completion_logits
        # The teacher runs first: the student's graph is then never touched by other weights. It runs in eval
        # mode: dropout would be noise in the target.
        training = self._mode == "train"  # read before `evaluating` changes it
        with torch.no_grad(), self.accelerator.autocast(), step_forward.evaluating(unwrapped):
            width = getattr(unwrapped.config.get_text_config(), "hidden_size", _TEACHER_WIDTH)
            limit = _TEACHER_TOKENS * _TEACHER_WIDTH // width
            groups = self._row_groups(teacher, token_limit=limit)
            q = [
                run_groups(partial(forward, model, unwrapped, params=params), reads, groups, length=length)
                for params in self._teacher.forwards(unwrapped, training=training)
            ]
        with self.accelerator.autocast():
            groups = self._row_groups(student, token_limit=math.inf)
            answer = partial(forward, model, unwrapped, router_losses=router_losses)
            p = run_groups(answer, answers, groups, length=length)
            if not self._fused:
                return step_loss.from_logits(self.sdpo_config, p, q, targets, temperature=self.temperature)
            return step_loss.fused(
                self.sdpo_config, p, q, targets, temperature=self.temperature, transform=self._transform
            )

    def _row_groups(self, reading: Reading, *, token_limit: float) -> list[RowGroup]:
        if self.accelerator.num_processes > 1 or shards.is_sharded(self._unwrapped):
            # Every rank must call the model equally often.
            token_limit = math.inf
            width = reading.ids.shape[1]
            if width > self._context_length:
                raise ValueError(
                    f"a batch is {width} tokens wide and the model reads {self._context_length}; on "
                    "several ranks its rows cannot run apart: set per_device_train_batch_size=1, or raise "
                    "max_seq_length"
                )
        return row_groups(reading.sizes, width_limit=self._context_length, token_limit=token_limit)

    def _can_fuse(self, unwrapped: nn.Module, arguments: dict[str, Any]) -> bool:
        if shards.is_partitioned(unwrapped):
            logger.warning(
                "Under DeepSpeed ZeRO-3 the LM head exists whole only inside its own forward; falling back to "
                "loss_backend='logits', which holds whole logits in memory."
            )
            return False
        head: Any = unwrapped.get_output_embeddings()  # type: ignore[operator]
        if self.sdpo_config.loss_backend == "auto" and step_forward.plain_head(head) is None:
            logger.warning(
                "The LM head is a %s, not a plain linear layer: an adapter or quantization is in it; falling back "
                "to loss_backend='logits', which holds whole logits in memory.",
                step_forward.kind_of(head),
            )
            return False
        with self.accelerator.autocast(), step_forward.evaluating(unwrapped):
            matches = step_forward.transform_matches(unwrapped, arguments, self._transform)
        if not matches:
            logger.warning(
                "The model changes its logits after the LM head in a way its configuration does not declare; "
                "falling back to loss_backend='logits', which holds whole logits in memory."
            )
        return matches

    def _weights(self, rows: dict[str, Tensor], loss_mask: Tensor, length: int) -> Tensor | None:
        """Rollout weights times, for `sequence-mean`, one over the row's tokens [B, T]; `None`: all ones."""
        weights = None
        if self.sdpo_config.rollout_is_clip is not None:
            weights = step_loss.rollout_weights(rows, clip=self.sdpo_config.rollout_is_clip)
        if weights is not None:
            weights = weights.expand(loss_mask.shape)[:, :length]
        if self.sdpo_config.loss_aggregation == "sequence-mean":
            share = (1.0 / loss_mask.sum(-1, keepdim=True).clamp(min=1)).expand(-1, length)
            weights = share if weights is None else weights * share
        return weights

    def _zero_loss(self) -> Tensor:
        """0 with a gradient of exactly 0 for everything that trains: what the model would give, without a forward.

        An optimizer passes over a parameter that has no gradient, but moves one whose gradient is 0, by momentum
        and weight decay. Where several ranks step, such a step goes through the model.
        """
        zero: Tensor = _Zero.apply(*(p for p in self._unwrapped.parameters() if p.requires_grad))
        return zero

    def _loss_mask(self, inputs: Any) -> Tensor:
        """Tokens with a loss [B, T]: completion, not from a tool, of a row with teacher signal."""
        mask = inputs["completion_mask"].bool() & inputs["row_mask"][:, None]
        return mask & inputs["tool_mask"].bool() if "tool_mask" in inputs else mask

    def _active_count(self, inputs: Any) -> Tensor:
        mask = self._loss_mask(inputs)
        return mask.any(-1).sum() if self.sdpo_config.loss_aggregation == "sequence-mean" else mask.sum()


class _Zero(torch.autograd.Function):
    """0 as a function of its arguments, for parameters that have no gradient yet; to others it adds nothing."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters
        return torch.zeros((), device=parameters[0].device)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return tuple(p.new_zeros(()).expand(p.shape) if p.grad is None else None for p in ctx.parameters)


def _row_tensors(inputs: Mapping[str, Any], rows: Tensor, count: int) -> dict[str, Tensor]:
    """The row-wise tensors among `inputs`, at `rows`."""
    return {
        name: value if len(rows) == count else value[rows]
        for name, value in inputs.items()
        # Unsloth's `max_left_pad` stays on the CPU; it is about columns that are gone after `compact`.
        if isinstance(value, Tensor)
        and value.dim() > 0
        and len(value) == count
        and value.device == rows.device
    }
