"""`SDPOTrainer`: a `GRPOTrainer` whose loss is self-distillation.

The class is built over whatever `trl.GRPOTrainer` is when this module is first imported, so that a patched
trainer (`PatchFastRL`) is inherited when it was patched before.
"""

from __future__ import annotations

from typing import Any

import torch
import trl
from accelerate.utils import gather_object
from torch import Tensor, nn

from . import checks, distillation, hidden_states
from .alignment import compact, left_pad, position_ids
from .callbacks import TeacherTicks
from .config import SDPOConfig
from .diagnostics import Diagnostics
from .feedback import FeedbackCollector
from .metrics import MetricSums
from .normalization import StepWindow
from .prompts import Renderer, Reprompter
from .rollout import Rollout, teacher_context
from .teacher_store import TeacherStore
from .trl_compat import log_probs_result, plain_log_probs

_BASE: Any = trl.GRPOTrainer


class SDPOTrainer(_BASE):
    """Train a language model on its own, better informed predictions (SDPO, arXiv 2601.20802).

    Takes everything `trl.GRPOTrainer` takes, by the same names, and `sdpo_config`. Rollouts, rewards,
    logging, checkpoints and evaluation are TRL's; the loss is the divergence between the model and the same
    model that has seen a peer's success or the feedback of its own attempt.

    Reward functions return floats, `(score, feedback)` pairs or `{"score": ..., "feedback": ...}`; they may
    carry `last_feedback`, may be async, and may return `None` for rows they do not judge. A dataset column
    `feedback` counts where no live feedback came.

    Args:
        model: a model, a PEFT model, or a name, as for `GRPOTrainer`.
        args: a `GRPOConfig`.
        sdpo_config: an `SDPOConfig`; `None` means `SDPOConfig()`. With `enabled=False` this is GRPO.
        **kwargs: everything else `GRPOTrainer` takes.

    Raises:
        RuntimeError: `trl.GRPOTrainer` was patched after this class was made; the message has the right order.
        ValueError: an empty dataset, a prompt that does not end with a user turn, no pad token, K beyond the
            vocabulary, a batch that the group does not divide.
        TypeError: a `sdpo_config` or reward function of the wrong kind.
    """

    _tag_names = ["trl", "grpo", "sdpo"]
    _name = "SDPO"

    def __init__(
        self, model: Any = None, args: Any = None, sdpo_config: SDPOConfig | None = None, **kwargs: Any
    ) -> None:
        if trl.GRPOTrainer is not _BASE:
            raise RuntimeError(
                "trl.GRPOTrainer was patched after sdpo_rl.SDPOTrainer was imported, so training would run "
                "unpatched. Import in this order:\n"
                "    from unsloth import FastLanguageModel, PatchFastRL\n"
                '    PatchFastRL("GRPO", FastLanguageModel)\n'
                "    from sdpo_rl import SDPOTrainer, SDPOConfig"
            )
        if sdpo_config is not None and not isinstance(sdpo_config, SDPOConfig):
            raise TypeError(f"sdpo_config must be an SDPOConfig, got {type(sdpo_config).__name__}")
        self.sdpo_config = sdpo_config or SDPOConfig()
        if args is None:
            name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "") or "model"
            args = trl.GRPOConfig(f"{name.split('/')[-1]}-SDPO")
        rewards = kwargs.get("reward_funcs")
        checks.check_reward_functions(rewards)
        if self.sdpo_config.enabled:
            checks.check_groups(args)
            checks.check_dataset(kwargs.get("train_dataset"), "train_dataset")
            checks.check_dataset(kwargs.get("eval_dataset"), "eval_dataset")
            checks.check_tokenizer(kwargs.get("processing_class"))
            if not isinstance(model, str):
                checks.check_vocabulary(self.sdpo_config, model)
        self._feedback = FeedbackCollector()
        if rewards is not None:
            listed = rewards if isinstance(rewards, list) else [rewards]
            kwargs["reward_funcs"] = [self._feedback.wrap(reward) for reward in listed]
        super().__init__(model=model, args=args, **kwargs)
        if not self.sdpo_config.enabled:
            return
        checks.check_vocabulary(self.sdpo_config, self._unwrapped)
        self._teacher = TeacherStore(self._unwrapped, self.sdpo_config, seed=self.args.seed)
        self._window = StepWindow()
        self._window_index = 0
        self._counted: Any = None
        self._sums = {"train": MetricSums(), "eval": MetricSums()}
        self._diagnostics = Diagnostics(self.sdpo_config)
        self._transform = hidden_states.head_transform(self._unwrapped.config)
        self._fused: bool | None = False if self.sdpo_config.loss_backend == "logits" else None
        self._rollout: Rollout | None = None
        self.add_callback(TeacherTicks(self))

    # --- rollout -----------------------------------------------------------------------------------------

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        feedback = self._feedback.take(len(prompts), [row.get("feedback") for row in inputs])
        if any(feedback) and hasattr(self, "_log_completion_extra"):
            self._log_completion_extra("feedback", feedback)
        if not self.sdpo_config.enabled:
            return rewards
        weights = self.reward_weights.to(rewards.device)
        scores = (rewards * weights).nansum(dim=1).masked_fill(rewards.isnan().all(dim=1), float("nan"))
        self._rollout = Rollout(
            prompts=list(prompts),
            completions=list(completions),
            completion_lengths=[len(ids) for ids in completion_ids_list],
            feedback=feedback,
            scores=scores.tolist(),
        )
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        if not self.sdpo_config.enabled:
            return super()._generate_and_score_completions(inputs)
        checks.check_rows(inputs)
        output = super()._generate_and_score_completions(inputs)
        rollout, self._rollout = self._rollout, None
        if rollout is None:
            raise RuntimeError("GRPOTrainer did not call _calculate_rewards; this TRL release is not supported")
        mode = self._mode
        context = teacher_context(
            rollout,
            self.sdpo_config,
            self._reprompter(),
            group_size=self.num_generations if mode == "train" else self.num_generations_eval,
            context_length=self._context_length,
            rank=self.accelerator.process_index,
            seed=self._selection_seed,
            gather=gather_object if self.accelerator.num_processes > 1 else list,
        )
        for name, value in context.metrics.items():
            self._metrics[mode][name].append(value)
        if mode == "train":
            self._diagnostics.observe_batch(context.metrics, rollout.completion_lengths)
        ids, mask = left_pad(
            context.prompts.ids, pad_id=self._pad_id, device=output["completion_ids"].device
        )
        output["teacher_prompt_ids"], output["teacher_prompt_mask"] = ids, mask
        output["row_mask"] = torch.tensor(context.prompts.row_mask, device=ids.device)
        return output

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        inputs = super()._prepare_inputs(generation_batch)
        if self.sdpo_config.enabled and self._mode == "train" and self._buffered_inputs is not self._counted:
            self._counted = self._buffered_inputs
            counts = torch.stack([self._active_count(batch) for batch in self._buffered_inputs])
            self._window.set_counts(self.accelerator.reduce(counts, reduction="sum"))
        return inputs

    # --- loss --------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The self-distillation loss of a micro-batch, over the count of its whole optimizer step."""
        if not self.sdpo_config.enabled:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if return_outputs:
            raise ValueError("SDPOTrainer does not return outputs from compute_loss")
        total = self._distilled_total(model, inputs)
        if self._mode == "train":
            denominator = self._window.denominator(
                step=self._step,
                index=self._window_index,
                length=self.current_gradient_accumulation_steps,
                generate_every=self.args.steps_per_generation * self.num_iterations,
            )
        else:
            denominator = self.accelerator.reduce(self._active_count(inputs), reduction="sum").clamp(min=1)
        # Gradients and logged losses are averaged over ranks, hence the factor.
        return total * self.accelerator.num_processes / denominator

    def _distilled_total(self, model: nn.Module, inputs: Any) -> Tensor:
        loss_mask = self._loss_mask(inputs)
        active = (loss_mask.any(-1)).nonzero().squeeze(-1)
        if len(active) == 0:
            if self.accelerator.num_processes == 1:
                return self._zero_loss()
            # Another rank may be active, and its collectives need this one.
            active = torch.zeros(1, dtype=torch.long, device=loss_mask.device)
        rows = {name: value[active] for name, value in inputs.items() if self._is_row_tensor(value, loss_mask)}
        student = compact(
            rows["prompt_ids"], rows["prompt_mask"], rows["completion_ids"], rows["completion_mask"]
        )
        teacher = compact(
            rows["teacher_prompt_ids"], rows["teacher_prompt_mask"], rows["completion_ids"], rows["completion_mask"]
        )
        length = student[2]
        targets = distillation.Targets(
            tokens=rows["completion_ids"][:, :length],
            loss_mask=loss_mask[active, :length],
            old_log_probs=_columns(rows.get("old_per_token_logps"), length),
            weights=self._weights(rows, loss_mask[active], length),
        )
        output = self._distill(model, student, teacher, targets)
        self._sums[self._mode].add(distillation.step_metrics(self.sdpo_config, output, targets))
        return output.total

    def _distill(self, model: nn.Module, student: Any, teacher: Any, targets: distillation.Targets) -> Any:
        unwrapped, length = self._unwrapped, student[2]
        arguments = [
            hidden_states.forward_arguments(unwrapped, ids, mask, position_ids(mask), length + 1)
            for ids, mask, _ in (student, teacher)
        ]
        if self._fused is None:
            self._fused = self._can_fuse(unwrapped, arguments[0])
        params = self._teacher.params(unwrapped)
        # The teacher runs first: the student's graph is then never touched by other weights.
        if self._fused:
            with torch.no_grad(), self._autocast():
                q = hidden_states.completion_states(
                    model, unwrapped, arguments[1], length=length, params=params
                )
            with self._autocast():
                p = hidden_states.completion_states(model, unwrapped, arguments[0], length=length)
            with torch.autocast(p.hidden.device.type, enabled=False):
                return distillation.fused(
                    self.sdpo_config,
                    p,
                    q,
                    targets,
                    temperature=self.temperature,
                    transform=self._transform,
                    compute_dtype=self._compute_dtype,
                )
        with torch.no_grad(), self._autocast():
            q_logits = hidden_states.completion_logits(model, unwrapped, arguments[1], length=length, params=params)
        with self._autocast():
            p_logits = hidden_states.completion_logits(model, unwrapped, arguments[0], length=length)
        return distillation.from_logits(
            self.sdpo_config, p_logits, q_logits, targets, temperature=self.temperature
        )

    def _weights(self, rows: dict[str, Tensor], loss_mask: Tensor, length: int) -> Tensor | None:
        """Rollout weights times, for `sequence-mean`, one over the row's tokens; `None` means all ones."""
        weights = None
        if self.sdpo_config.rollout_is_clip is not None:
            weights = distillation.rollout_weights(rows, clip=self.sdpo_config.rollout_is_clip)
        if weights is not None:
            weights = weights.expand(-1, loss_mask.shape[1])[:, :length]
        if self.sdpo_config.loss_aggregation == "sequence-mean":
            share = 1.0 / loss_mask.sum(-1, keepdim=True).clamp(min=1)
            share = share.expand(-1, length)
            weights = share if weights is None else weights * share
        return weights
