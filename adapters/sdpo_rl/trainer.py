"""`SDPOTrainer`: a `GRPOTrainer` whose loss is self-distillation.

The class is built over whatever `trl.GRPOTrainer` is when this module is first imported, so that a patched
trainer (`PatchFastRL`) is inherited when it was patched before.
"""

from __future__ import annotations

import hashlib
import math
from contextlib import ExitStack, nullcontext
from typing import Any, ClassVar

import torch
import trl
from accelerate.utils import gather_object
from torch import Tensor, nn

from . import _validate
from .compat import peft_lora
from .compat import unsloth as unsloth_compat
from .compat.callbacks import AfterOptimizerStep, BeforeTraining
from .compat.lockstep import Lockstep
from .compat.trl import log_probs_arguments, log_probs_result, plain_log_probs
from .config import SDPOConfig
from .diagnose.advice import memory_advice, warn_if_slow
from .diagnose.warnings import Diagnostics
from .resume.resuming import Resuming
from .rollout.demonstrations import Rollout, teacher_context
from .rollout.feedback import FeedbackCollector, environment_feedback
from .rollout.prompts import Renderer, Reprompter
from .step import forward as step_forward
from .step.batch import left_pad
from .step.denominator import StepWindow
from .step.metrics import MetricSums
from .step.micro_batch import MicroBatchLoss
from .teacher import shards
from .teacher.store import TeacherStore

_BASE: Any = trl.GRPOTrainer
_IS_UNSLOTH = unsloth_compat.is_unsloth(_BASE)


class SDPOTrainer(MicroBatchLoss, Resuming, Lockstep, _BASE):
    """Train a language model on its own, better informed predictions (SDPO, arXiv 2601.20802).

    Takes everything `trl.GRPOTrainer` takes, by the same names, and `sdpo_config`. Rollouts, rewards,
    logging, checkpoints and evaluation are TRL's; the loss is the divergence between the model and the same
    model that has seen a peer's success or the feedback of its own attempt.

    Reward functions return floats, `(score, feedback)` pairs or `{"score": ..., "feedback": ...}`; they may
    carry `last_feedback`, may be async, and may return `None` for rows they do not judge. An environment
    (`environment_factory`) speaks through its attribute or property `feedback`, read when its episode is scored
    and cleared by its `reset`; a method of that name would be offered to the model as a tool. A dataset column
    `feedback`, or one that a `rollout_func` returns, counts where no live feedback came.

    With `tools` the teacher reads the same turns, tool results included, and only tokens of the model's own have
    a loss. A demonstration is then a transcript: texts, `name(arguments)` for each call, and the results.

    What shapes GRPO's own objective has no part in this one: its clipping (`epsilon`, `epsilon_high`; here
    `SDPOConfig.is_clip`), `loss_type` with the parameters of each type, and the advantages (`scale_rewards`,
    `multi_objective_aggregation`), which are only logged. The loss is a mean over the tokens or rows with a loss,
    by `SDPOConfig.loss_aggregation`. Terms and masks that someone switched on are refused instead. The router loss
    of a Mixture-of-Experts model is added with the coefficient that GRPO uses, `router_aux_loss_coef` or else that
    of the model, as the mean over micro-batches weighted by their tokens (or rows) with a loss; one without any
    adds none.

    `eval_loss` is a mean over all tokens (or rows) of the evaluation, in whatever batches they came.

    Runs under DDP, FSDP 2 and DeepSpeed ZeRO-2 and -3: a step on several ranks has the loss and the gradient of
    the same rows on one, and a group may lie on several. ZeRO-3 computes whole logits.

    Args:
        model: a model, a PEFT model, or a name, as for `GRPOTrainer`.
        args: a `GRPOConfig`.
        sdpo_config: an `SDPOConfig`; `None` means `SDPOConfig()`. With `enabled=False` this is GRPO.
        **kwargs: everything else `GRPOTrainer` takes.

    Raises:
        RuntimeError: `trl.GRPOTrainer` was patched after this class was made; the message has the right order.
        ValueError: an empty dataset, a prompt that does not end with a user turn, no pad token, K beyond the
            vocabulary, a batch that the group does not divide, a term or mask that this loss does not have,
            FSDP 1.
        TypeError: `args`, `sdpo_config` or a reward function of the wrong kind.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "grpo", "sdpo"]
    _name = "SDPO"
    _unwrapped_from: Any = None
    _rest_of_step: ExitStack | None = None

    def __init__(
        self, model: Any = None, args: Any = None, sdpo_config: SDPOConfig | None = None, **kwargs: Any
    ) -> None:
        if trl.GRPOTrainer is not _BASE:
            raise RuntimeError(
                "trl.GRPOTrainer was patched after sdpo_rl.SDPOTrainer was imported, so training would run "
                f"unpatched. Import in this order:\n{unsloth_compat.IMPORT_ORDER}"
            )
        _validate.check_keywords(kwargs, _BASE, own=("sdpo_config",))
        if sdpo_config is not None and not isinstance(sdpo_config, SDPOConfig):
            raise TypeError(f"sdpo_config must be an SDPOConfig, got {type(sdpo_config).__name__}")
        if model is None:
            raise TypeError("model must be a model or a model's name, got None")
        self.sdpo_config = sdpo_config or SDPOConfig()
        if args is None:
            name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "") or "model"
            args = trl.GRPOConfig(f"{name.split('/')[-1]}-SDPO")
        _validate.check_arguments(args)
        if _IS_UNSLOTH:
            unsloth_compat.check_construction(model, args, kwargs.get("peft_config"))
        rewards = kwargs.get("reward_funcs")
        _validate.check_reward_functions(rewards)
        if self.sdpo_config.enabled:
            _validate.check_groups(args)
            _validate.check_objective(args)
            if kwargs.get("environment_factory") is None:  # an environment may bring the prompts itself
                _validate.check_dataset(kwargs.get("train_dataset"), "train_dataset")
                _validate.check_dataset(kwargs.get("eval_dataset"), "eval_dataset")
            _validate.check_tokenizer(kwargs.get("processing_class"))
            if not isinstance(model, str):
                _validate.check_vocabulary(self.sdpo_config, model)
        self._feedback = FeedbackCollector()
        if rewards is not None:
            listed = rewards if isinstance(rewards, list) else [rewards]
            kwargs["reward_funcs"] = [self._feedback.wrap(reward) for reward in listed]
        super().__init__(model=model, args=args, **kwargs)
        if not self.sdpo_config.enabled:
            return
        _validate.check_vocabulary(self.sdpo_config, self._unwrapped)
        shards.check_strategy(
            self.accelerator,
            generate_every=self.args.steps_per_generation * self.num_iterations,
            accumulation_steps=self.args.gradient_accumulation_steps,
        )
        self._teacher = TeacherStore(self._unwrapped, self.sdpo_config, seed=self.args.seed)
        self._window = StepWindow()
        self._window_index = 0
        self._window_loss: Tensor | float = 0.0
        self._counted: Any = None
        self._sums = {"train": MetricSums(), "eval": MetricSums()}
        self._eval_loss = MetricSums()
        self._diagnostics = Diagnostics(self.sdpo_config)
        self._transform = step_forward.head_transform(self._unwrapped.config)
        if self.sdpo_config.loss_backend == "logits":
            self._fused = False
        self._rollout: Rollout | None = None
        self._generations_done = 0
        self.add_callback(BeforeTraining(lambda: self._teacher.on_train_begin(self._unwrapped)))
        self.add_callback(AfterOptimizerStep(self._after_optimizer_step))
        warn_if_slow(self)

    # --- rollout -----------------------------------------------------------------------------------------

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        feedback = self._feedback.take(
            len(prompts),
            [row.get("feedback") for row in inputs],
            environment_feedback(getattr(self, "environments", None) or []),
        )
        # Also a batch without any: the columns of the table must stay of one length.
        if hasattr(self, "_log_completion_extra"):
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
            scores=scores.float().cpu(),
        )
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        if not self.sdpo_config.enabled:
            return super()._generate_and_score_completions(inputs)
        _validate.check_rows(inputs)
        # Nothing here has a gradient. GRPOTrainer would switch checkpointing off and on twice, while the GPU waits.
        with nullcontext() if _IS_UNSLOTH else step_forward.activations_kept(self._unwrapped):
            output = super()._generate_and_score_completions(inputs)
        rollout, self._rollout = self._rollout, None
        if rollout is None:
            raise RuntimeError(
                "GRPOTrainer did not call _calculate_rewards; this TRL release is not supported"
            )
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
        ids, mask = left_pad(context.prompts.ids, pad_id=self._pad_id, device=output["completion_ids"].device)
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
        if self._rest_of_step is not None and self._may_compute_adapters:
            # Not before: generation, which may merge adapters, and rewards belong to the step, too.
            self._rest_of_step.enter_context(peft_lora.fused_lora_forward(self._unwrapped))
        with memory_advice(self), unsloth_compat.logits_not_hidden_states():
            if _IS_UNSLOTH:
                inputs = unsloth_compat.align_old_log_probs(inputs, self._pad_id)
            total = self._distilled_total(model, inputs)
        if self._mode == "train":
            denominator = self._window.denominator(
                step=self._step,
                index=self._window_index,
                length=self.current_gradient_accumulation_steps,
                generate_every=self.args.steps_per_generation * self.num_iterations,
            )
        else:
            count = self._active_count(inputs)
            self._eval_loss.add({"loss": (total, count)})
            return total / count.clamp(min=1)
        # Gradients and logged losses are averaged over ranks, hence the factor.
        return total * self.accelerator.num_processes / denominator

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """The Trainer's, with the loss of all its tokens together in place of a mean over batches and ranks."""
        if self.sdpo_config.enabled:
            self._eval_loss = MetricSums()
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        if self.sdpo_config.enabled:
            means = self._eval_loss.means(lambda totals: self.accelerator.reduce(totals, reduction="sum"))
            output.metrics[f"{metric_key_prefix}_loss"] = means.get("loss", 0.0)
        return output

    # --- training loop -----------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch; keeps the place in the optimizer step and, at its end, its true denominator."""
        with memory_advice(self), ExitStack() as rest:
            rest.callback(setattr, self, "_rest_of_step", None)
            self._rest_of_step = rest
            loss = super().training_step(*args, **kwargs)
        if not self.sdpo_config.enabled:
            return loss
        self._window_index += 1
        self._window_loss = self._window_loss + loss
        if self.accelerator.sync_gradients:
            window_loss, self._window_loss = self._window_loss, 0.0
            self._window_index = 0
            correction = self._window.correction()
            if correction is not None:
                # The earlier micro-batches have been logged with the estimate; this one makes up for them.
                loss = loss + window_loss * (correction - 1.0)
                shards.scale_gradients(self.model, correction)
        return loss

    def _after_optimizer_step(self) -> None:
        per_tick = 1
        if self.sdpo_config.teacher_tick == "generation_batch":
            generate_every = self.args.steps_per_generation * self.num_iterations
            per_tick = self._step // generate_every - self._generations_done
            self._generations_done += per_tick
        for _ in range(per_tick):
            self._teacher.tick(self._unwrapped)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """TRL's logging, with the means of the tensors that were kept since the last time."""
        if self.sdpo_config.enabled:
            mode = self._mode
            means = self._sums[mode].means(lambda totals: self.accelerator.reduce(totals, reduction="sum"))
            if (
                mode == "train"
                and means
                and (distance := self._teacher.distance(self._unwrapped)) is not None
            ):
                means["self_distillation/teacher_distance"] = distance.item()
            self._diagnostics.observe_means(means)
            for name, value in means.items():
                self._metrics[mode][name].append(value)
        super().log(logs, *args, **kwargs)

    # --- GRPO without Triton -----------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        method = super()._get_per_token_logps_and_entropies
        # Unsloth's own version runs on a CPU, and its loss expects its conventions.
        if _IS_UNSLOTH or input_ids.device.type != "cpu":
            return method(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        given = (model, input_ids, attention_mask, logits_to_keep)
        wanted = log_probs_arguments(method, *given, *args, **kwargs)
        return log_probs_result(method, *plain_log_probs(self, *given, **wanted))

    # --- facts about this run ----------------------------------------------------------------------------

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    @property
    def _unwrapped(self) -> Any:
        if self._unwrapped_from is not self.model:
            self._unwrapped_from, self._unwrapped_model = (
                self.model,
                self.accelerator.unwrap_model(self.model),
            )
        return self._unwrapped_model

    @property
    def _may_compute_adapters(self) -> bool:
        """Whether nobody else compiles or rewrites the model, or keeps products of its forward to use again."""
        keeps = (self.args.gradient_checkpointing_kwargs or {}).get("context_fn") is not None
        return not (_IS_UNSLOTH or self.args.torch_compile or keeps)

    @property
    def _pad_id(self) -> int:
        processing: Any = self.processing_class
        return getattr(processing, "tokenizer", processing).pad_token_id

    @property
    def _selection_seed(self) -> int:
        # A function of the run's place, so that a resumed run draws what the uninterrupted one drew.
        place = (self.args.seed, self.state.global_step, self._window_index, self._mode == "eval")
        return int.from_bytes(hashlib.blake2b(repr(place).encode(), digest_size=8).digest(), "big")

    @property
    def _context_length(self) -> float:
        """Tokens that the model can read; reprompt and completion together stay below it."""
        model = self._unwrapped
        limits = (
            getattr(model, "max_seq_length", None),
            getattr(model.config.get_text_config(), "max_position_embeddings", None),
        )
        return min((limit for limit in limits if limit), default=math.inf)

    @property
    def _row_tools(self) -> list[Any] | None:
        """The tools of each row of this batch, where environments bring their own."""
        if getattr(self, "environment_factories", None) is None:
            return None
        return [self._env_tools[name] for name in self._batch_environments]

    def _reprompter(self) -> Reprompter:
        config = self.sdpo_config
        renderer = Renderer(
            tokenizer=self.processing_class,
            tools=getattr(self, "tools", None),
            row_tools=self._row_tools,
            chat_template=getattr(self, "chat_template", None),
            template_kwargs={**self.chat_template_kwargs, **config.template_kwargs},
        )
        return Reprompter(
            renderer,
            config.templates(),
            config.environment_feedback_only_without_solution,
            config.reprompt_truncation,
        )
