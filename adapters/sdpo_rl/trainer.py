"""`SDPOTrainer`: a `GRPOTrainer` whose loss is self-distillation.

The methods that save a run and resume it are those of the class below it, in `resume.resumable`.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import trl
from accelerate.utils import gather_object
from torch import Tensor, nn

from . import __version__, _validate
from .compat import checkpointing, completions_table, model_card, peft_lora, trackers, unsloth_lora
from .compat import unsloth as unsloth_compat
from .compat.adapters import trainable_preserved
from .compat.generation import GenerationCalls
from .compat.multimodal import freeze_unreached_by_text
from .compat.training_hooks import TrainingHooks, is_log_of_trainer, log_alone
from .compat.trl import default_arguments, parsed_response, reference, torch_kernel
from .compat.vllm_server import keep_sent_weights
from .compat.vocabulary import check_vocabulary
from .config import SDPOConfig
from .credit.tokens import LogitSettings
from .diagnose.advice import memory_advice, warn_if_slow
from .diagnose.preview import Preview, preview
from .diagnose.settings import (
    warn_of_best_loss,
    warn_of_fast_teacher,
    warn_of_grpo_options,
    warn_of_teacher_prompt_column,
)
from .diagnose.warnings import Diagnostics, warn_of_padding
from .records import Records
from .resume import checkpoint
from .resume.resumable import BASE, ResumableTrainer
from .rollout import rewards as reward_rules
from .rollout import without_rewards
from .rollout.checks import check_generation_batch, check_scored_batch
from .rollout.control import ControlStrings
from .rollout.demonstrations import Rollout, TeacherContext, selection_seed, teacher_context
from .rollout.feedback import (
    FEEDBACK_COLUMNS,
    FeedbackCollector,
    column_texts,
    environment_feedback,
)
from .rollout.prompts import Renderer
from .rollout.rendered import rendered_prompts
from .rollout.reprompts import Reprompter, make_reprompter
from .rollout.scored import sample, scored
from .rollout.written import TEACHER_PROMPT_COLUMN, TeacherPromptFunc
from .step import entropy as step_entropy
from .step import forward as step_forward
from .step import head as step_head
from .step import micro_batch
from .step import policy as step_policy
from .step.batch import TokenBatch, select_rows, teacher_inputs
from .step.denominator import StepWindow, batch_counts, loss_count
from .step.forward_mode import ForwardMode, find_forward_mode
from .step.metrics import EvaluationLoss, MetricSums
from .step.optimizer import drop_gradients
from .step.row_attention import grouped_heads
from .step.schedule import Schedule, schedule_of
from .teacher import shards
from .teacher.reference import start_of_training
from .teacher.store import TeacherStore
from .teacher.ticks import TickSchedule

_IS_UNSLOTH = unsloth_compat.is_unsloth(BASE)
# Of `_get_per_token_logps_and_entropies`, those that ask for log-probabilities of texts alone.
_LOG_PROB_ARGUMENTS = {"model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"}
# One value per optimizer step: 1 if it changed nothing.
_STEP_WITHOUT_SIGNAL = "self_distillation/step_without_signal"


class SDPOTrainer(ResumableTrainer):
    """Train a language model on its own, better informed predictions.

    Takes the arguments of `trl.GRPOTrainer`, in its order up to `optimizers`, and two of its own, `sdpo_config` and
    `teacher_prompt_func`. Rollouts, rewards, logging, checkpoints and evaluation are TRL's. The loss of a token
    of a completion is

        divergence(model(token | prompt), teacher(token | prompt, a peer's success or feedback on the attempt))

    and the loss of a step its mean by `SDPOConfig.loss_aggregation`: over the tokens or rows with a loss, or over
    all completion tokens. `row_weights` and `token_weights` weigh its rows and tokens.

    **Feedback.** Reward functions return floats, `(score, feedback)` pairs or `{"score": ..., "feedback": ...}`.
    They may have an attribute `last_feedback`, may be async, and may return `None` for rows they do not judge. An
    environment (`environment_factory`) has an attribute or property `feedback`, read when its episode is scored and
    cleared by its `reset`; a method of that name would be offered to the model as a tool. A dataset column
    `feedback` (or `privileged_context`, its name in TRL's SDPO), or one that a `rollout_func` returns, is used for
    rows without live feedback.

    **Tools.** The teacher gets the same turns, tool results included, and only tokens of the model have a loss. A
    demonstration is then a transcript: texts, `name(arguments)` for each call, and the results.

    **GRPO's objective.** Its clipping (`epsilon`, `epsilon_high`; here `SDPOConfig.is_clip`), `loss_type` with
    its parameters, and the advantages (`scale_rewards`, `multi_objective_aggregation`), which are logged, do
    not affect this loss, unless `SDPOConfig.grpo_weight` or `routing` makes a part of it GRPO's. That part is
    TRL's loss for each `loss_type`, with `beta`, `delta`, `importance_sampling_level`, `entropy_coef`,
    `use_adaptive_entropy`, `top_entropy_quantile` and `off_policy_mask_threshold`, which are refused without it.
    With one of these, or with `vespo`, it takes a second product with the LM head. The load-balancing loss of a
    Mixture-of-Experts model is added with GRPO's coefficient (`router_aux_loss_coef`, or else the model's), as the
    mean over micro-batches weighted by their tokens (or rows) with a loss; with a GRPO part, as their plain mean.

    **Evaluation.** `eval_loss` is a mean over all tokens (or rows) of the evaluation, in any batches.

    **Multimodal models** are trained on text: encoders and projectors outside of the language model are frozen, and
    so are adapters on them.

    **Several processes.** DDP, FSDP 2 and DeepSpeed ZeRO-2 and -3: a step has the loss and the gradient of the same
    rows on one process, and a group may be on several.

    Args:
        model: a model, a PEFT model, or a name or path.
        reward_funcs: as for `GRPOTrainer`; functions may also return feedback. `None`: nothing judges a completion,
            and each row has a text for the teacher, from the dataset, its environment or a `rollout_func`.
        args: a `GRPOConfig`; `None` means its defaults.
        train_dataset: as for `GRPOTrainer`; a column `feedback` or `privileged_context` is optional.
        eval_dataset: as for `GRPOTrainer`.
        processing_class: as for `GRPOTrainer`.
        reward_processing_classes: as for `GRPOTrainer`.
        callbacks: as for `GRPOTrainer`.
        optimizers: as for `GRPOTrainer`.
        sdpo_config: an `SDPOConfig`; `None` means its defaults. With `enabled=False` this is GRPO.
        teacher_prompt_func: writes the teacher's prompt in place of the templates: a function from an `Attempt` to
            a prompt, or to `None` for a row without a teacher signal.
        **kwargs: everything else that `GRPOTrainer` takes.

    Raises:
        RuntimeError: `trl.GRPOTrainer` was patched after this class was made; the message has the right order. Or
            TRL's client of a vLLM server has no `update_named_params`.
        ValueError: an empty dataset or prompt, fewer prompts than a batch has, a prompt that does not end
            with a user or tool turn, two columns of feedback, neither rewards nor texts for the teacher, neither a
            pad token nor an end-of-sequence token, K beyond the vocabulary, a batch size that is no multiple of the
            group size, more demonstrations than a group can have, a temperature that is 0 or not finite, a term or
            mask that this loss does not have, a loss backend that cannot run on the device, a model that
            `torch.compile` returned, no trainable parameters that text reaches, FSDP 1, a template beside a
            `teacher_prompt_func`.
        TypeError: `args`, `sdpo_config`, `teacher_prompt_func` or a reward function of the wrong type, or an
            unknown keyword.

    Source: SDPO, arXiv 2601.20802.

    Examples:
        A run of two steps, with a reward function that returns feedback::

            trainer = SDPOTrainer(model, judge, GRPOConfig(max_steps=2), dataset, sdpo_config=SDPOConfig(alpha=1.0))
            trainer.train()

        >>> import inspect
        >>> list(inspect.signature(SDPOTrainer).parameters)[:4]
        ['model', 'reward_funcs', 'args', 'train_dataset']
    """

    def __init__(
        self,
        model: Any = None,
        reward_funcs: Any = None,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: Any = None,
        optimizers: Any = None,
        *,
        sdpo_config: SDPOConfig | None = None,
        teacher_prompt_func: TeacherPromptFunc | None = None,
        **kwargs: Any,
    ) -> None:
        unsloth_compat.check_unpatched(BASE, trl.GRPOTrainer)
        datasets = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        named = datasets | {
            "processing_class": processing_class,
            "reward_processing_classes": reward_processing_classes,
            "callbacks": callbacks,
            "optimizers": optimizers,
        }
        kwargs |= {name: value for name, value in named.items() if value is not None}
        _validate.check_model(model)
        # Before the rest: a config in their position is a common mistake.
        _validate.check_reward_functions(reward_funcs)
        args = default_arguments(model) if args is None else args
        # A copy, so that a later change of its mappings changes nothing here.
        self._sdpo_config = SDPOConfig() if sdpo_config is None else copy.deepcopy(sdpo_config)
        _validate.check_construction(args, self.sdpo_config, kwargs, trainer=BASE)
        _validate.check_teacher_prompt_func(teacher_prompt_func, self.sdpo_config)
        self._teacher_prompt_func = teacher_prompt_func
        if self.sdpo_config.enabled:
            # What TRL's model card says.
            self._name, self._tag_names, self._paper = "SDPO", ["trl", "grpo", "sdpo"], model_card.PAPER
        if self.sdpo_config.enabled and not args.remove_unused_columns:
            reward_rules.check_columns(reward_funcs, kwargs)
        if _IS_UNSLOTH:
            unsloth_compat.check_construction(model, args, kwargs.get("peft_config"))
        if self.sdpo_config.enabled:
            if _IS_UNSLOTH:  # Unsloth's GRPO packs rows, too, and stays as it is
                unsloth_compat.use_varlen_kernel()
            k = self.sdpo_config.k if self.sdpo_config.uses_topk else None
            _validate.check_not_compiled(model)
            _validate.check_prefixes(args, model, kwargs.get("peft_config"))
            check_vocabulary(k, model, args.model_init_kwargs)
        self._feedback = FeedbackCollector()
        if reward_funcs in (None, []):
            kwargs["reward_funcs"] = without_rewards.reward_functions(
                args, self.sdpo_config, kwargs, writes_prompts=teacher_prompt_func is not None
            )
        else:
            kwargs["reward_funcs"] = self._feedback.wrap_all(reward_funcs)
        self._extra_columns: set[str] = set()  # of the completions table, by the reward functions
        self._unwrapped_cache: tuple[Any, Any] = (None, None)
        self._step_stack: ExitStack | None = None
        super().__init__(model=model, args=args, **kwargs)
        without_rewards.remove_placeholder(self)
        keep_sent_weights(self)
        self._generation_calls = GenerationCalls(
            self.accelerator.device,
            context_length=step_forward.context_length(self._unwrapped),
            max_completion_length=args.max_completion_length,
        )
        if self.sdpo_config.enabled:
            self._set_state(datasets)
            self._join_trainer()

    def _set_state(self, datasets: Mapping[str, Any]) -> None:
        """The state of a run, and what can be checked once TRL has loaded model and tokenizer."""
        config, accelerator, model = self.sdpo_config, self.accelerator, self._unwrapped
        reward_rules.check_success_functions(config, self.reward_func_names)
        _validate.check_backend(config, accelerator.device)
        schedule = self._schedule
        shards.check_strategy(
            accelerator,
            generate_every=schedule.generate_every,
            accumulation_steps=schedule.gradient_accumulation_steps,
        )
        # Before the teacher's store, the optimizer and DDP have a list of what is trained.
        self._frozen = [] if _IS_UNSLOTH else freeze_unreached_by_text(model)
        self._control = ControlStrings(self.processing_class, getattr(self, "chat_template", None))
        self._renderer = Renderer(
            tokenizer=self.processing_class,
            chat_template=getattr(self, "chat_template", None),
            template_kwargs=self.chat_template_kwargs,
        )
        self._rendered = rendered_prompts(self._renderer, self._control)
        for name, dataset in datasets.items():
            _validate.check_rendered_dataset(dataset, name, self._rendered, config)
        if self._teacher_prompt_func is None:
            warn_of_teacher_prompt_column(datasets.values())
        self._rollout: Rollout | None = None
        samples_per_tick = schedule.samples_per_tick(config.teacher_tick)
        self._teacher = TeacherStore(model, config, seed=self.args.seed, samples_per_tick=samples_per_tick)
        self._ticks = TickSchedule(per_generation_batch=config.teacher_tick == "generation_batch")
        self._start = start_of_training(model, config, self.ref_model, beta=self.beta, seed=self.args.seed)
        if config.teacher_mode != "live" or self._start is not None:
            shards.check_zero3_options(accelerator)
        self._stores = checkpoint.stores(self._teacher, self._start)
        self._transform = step_head.head_transform(model.config)
        self._forward_mode: ForwardMode | None = None  # unknown until the first forward
        self._policy_term = step_policy.policy_term(self.args) if config.has_policy_loss else None
        self._window = StepWindow()
        self._counted: Any = None  # the generation batch whose counts the window has
        self._sums = {"train": MetricSums(), "eval": MetricSums()}
        self._eval_loss = EvaluationLoss()
        self._diagnostics = Diagnostics(config, writes_prompts=self._teacher_prompt_func is not None)
        self._records = Records(
            config,
            self.args,
            self.processing_class,
            LogitSettings(self._transform, self.temperature, config.trust_region_coef),
            has_table=self.log_completions and hasattr(self, "_log_completion_extra"),
            writes=accelerator.is_main_process,
            gather=self._gather,
        )
        self._optimizer_hook: Any = None

    def _join_trainer(self) -> None:
        """What happens beside the Trainer's own: its events, its trackers, and warnings."""
        hooks = TrainingHooks(
            begin=self._begin_training,
            step_end=self._update_teacher,
            epoch_end=lambda: _validate.check_batches_seen(
                "train_dataset", self._step or self.state.global_step
            ),
        )
        self.add_callback(hooks)
        logged = {f"sdpo_{name}": value for name, value in self._options.items()}
        trackers.log_options(self.callback_handler, {"sdpo_rl_version": __version__, **logged})
        if self.args.cast_lm_head_to_fp32 and not _IS_UNSLOTH:
            for one in filter(None, (self._unwrapped, self.ref_model)):
                step_head.never_autocast(one.get_output_embeddings(), self.accelerator.device)
        warn_if_slow(self)
        if self._policy_term is None:
            warn_of_grpo_options(self.args)
        warn_of_best_loss(self.args, has_rewards=bool(self.reward_funcs))
        samples_per_tick = self._schedule.samples_per_tick(self.sdpo_config.teacher_tick)
        warn_of_fast_teacher(self.sdpo_config, samples_per_tick=samples_per_tick)

    # --- rollout -----------------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.sdpo_config.enabled:  # `remove_unused_columns` keeps these
            of_function = () if self._teacher_prompt_func is None else (TEACHER_PROMPT_COLUMN,)
            self._signature_columns.extend({*FEEDBACK_COLUMNS, *of_function} - set(self._signature_columns))

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> Tensor:
        config, enabled = self.sdpo_config, self.sdpo_config.enabled
        if enabled:  # before reward functions, which may change what they are given
            sampled = sample(
                prompts,
                completions,
                completion_ids_list,
                config,
                self.processing_class,
                parsed_response,
                rows=() if self._teacher_prompt_func is None else inputs,
            )
        if self.reward_funcs:
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        else:  # TRL would warn of each batch
            rows = len(prompts) * self.accelerator.num_processes
            rewards = torch.empty(rows, 0, device=self.accelerator.device)
        feedback = self._feedback.take(
            len(inputs),
            column_texts(inputs) if enabled else None,
            environment_feedback(getattr(self, "environments", None) or []),
        )
        self._log_feedback(feedback)
        if enabled:
            names, weights = self.reward_func_names, self.reward_weights
            self._rollout = scored(sampled, feedback, rewards, config, names=names, weights=weights)
        return rewards

    def _log_feedback(self, feedback: list[str | None]) -> None:
        if hasattr(self, "_log_completion_extra"):
            self._extra_columns.update(self._gather([*self._pending_extra_logs]))
            completions_table.add_feedback(
                self._logs["extra"],
                feedback,
                self._taken_columns,
                rows=len(self._logs["prompt"]),
                log=self._log_completion_extra,
                gather=self._gather,
            )

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        if not self.sdpo_config.enabled:
            return super()._generate_and_score_completions(inputs)
        rollout, context, output = self._scored_rollout(inputs)
        rows = len(rollout.prompts)
        columns, first_row = self._logs["extra"], self.accelerator.process_index * rows
        if self._records.begin_batch(
            rollout, context, columns, self._taken_columns, mode=self._mode, first_row=first_row
        ):
            output["rollout_row"] = torch.arange(rows, device=output["completion_ids"].device)[:, None]
        return output

    def _scored_rollout(self, inputs: Any) -> tuple[Rollout, TeacherContext, dict[str, Any]]:
        """A generation batch: what was sampled and scored, what the teacher reads, and the inputs of the loss."""
        check_generation_batch(
            inputs,
            self.sdpo_config,
            self._rendered,
            self.reward_funcs,
            # An environment may return the prompts itself.
            prompts=getattr(self, "environment_factories", None) is None,
            has_environments=getattr(self, "environments", None) is not None,
        )
        # Nothing here has a gradient. TRL would disable checkpointing twice, a slow traversal while the GPU waits.
        toggle = self.sdpo_config.fast_checkpointing_toggle and not _IS_UNSLOTH
        with (
            step_forward.checkpointing_disabled(self._unwrapped) if toggle else nullcontext(),
            # PEFT makes all adapters trainable where TRL switches them.
            trainable_preserved(self._unwrapped),
        ):
            output = super()._generate_and_score_completions(inputs)
        rollout, self._rollout = check_scored_batch(output, self._rollout), None
        mode = self._mode
        if not self.reward_funcs:
            without_rewards.drop_metrics(self._metrics[mode])
        context = teacher_context(
            rollout,
            self.sdpo_config,
            self._reprompter(),
            has_loss=output["completion_mask"].any(dim=1).tolist(),
            group_size=self.num_generations if mode == "train" else self.num_generations_eval,
            context_length=step_forward.context_length(self._unwrapped),
            rank=self.accelerator.process_index,
            seed=selection_seed(self.args.seed, self.state.global_step, self._window.index, mode == "eval"),
            gather=self._gather,
            teacher_prompt_func=self._teacher_prompt_func,
        )
        for name, value in context.metrics.items():
            self._metrics[mode][name].append(value)
        if mode == "train":
            self._diagnostics.observe_prompts(rollout.prompts, self._renderer)
            self._diagnostics.observe_batch(context.metrics, rollout.completion_lengths)
        prompt_ids, distilled, weights = context.prompts.ids, context.distilled, context.row_weights
        further = teacher_inputs(output, prompt_ids, distilled, row_weights=weights, pad_id=self._pad_id)
        return rollout, context, output | further

    def preview(self, n: int = 4) -> Preview:
        """What student and teacher read in rows of the first generation batch of the data; trains nothing.

        The rows show what a run has: some with a signal from the teacher and some without, with the reason. The
        trainer is left as it was (see `generation_batch` for what reward functions must undo themselves), so a run
        afterwards is the same, bit for bit.

        Args:
            n: how many rows, 1 to the size of a generation batch.

        Returns:
            A `Preview`, whose text `print` shows. With several processes all of them call it and get the same.

        Raises:
            TypeError: `n` is no integer.
            ValueError: `n` is out of range, `enabled=False`, or a model that FSDP or DeepSpeed moves to its device
                when training begins.

        Examples:
            Before the first step::

                print(trainer.preview())
                trainer.train()

            >>> import inspect
            >>> inspect.signature(SDPOTrainer.preview).parameters["n"].default
            4
        """
        return preview(self, n)

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        inputs = super()._prepare_inputs(generation_batch)
        if self.sdpo_config.enabled and self._mode == "train" and self._buffered_inputs is not self._counted:
            self._counted = self._buffered_inputs
            self._window.set_counts(
                *batch_counts(self._counted, self.sdpo_config, self._policy_term, total=self._sum)
            )
        return inputs

    def _reprompter(self) -> Reprompter:
        row_tools = None
        if getattr(self, "environment_factories", None) is not None:  # each environment has its own tools
            row_tools = [self._env_tools[name] for name in self._batch_environments]
        renderer = dataclasses.replace(self._renderer, tools=getattr(self, "tools", None))
        return make_reprompter(self.sdpo_config, renderer, self._control, self._rendered, row_tools=row_tools)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        return self._generation_calls.call(super()._generate_single_turn, *args, **kwargs)

    def _tool_call_loop(self, *args: Any, **kwargs: Any) -> Any:
        is_parallel = not self.use_vllm and self.accelerator.num_processes > 1
        return self._generation_calls.tool_loop(
            super()._tool_call_loop,
            self._generate_single_turn,
            *args,
            in_lockstep=is_parallel and shards.is_sharded(self._unwrapped),
            **kwargs,
        )

    # --- loss --------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The loss of a micro-batch, over the count of its whole optimizer step; in an evaluation, over its own."""
        if not self.sdpo_config.enabled:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if return_outputs:
            raise ValueError(
                "SDPOTrainer.compute_loss: expected return_outputs=False, got True; it has no outputs"
            )
        if self._step_stack is not None:
            # Until backward has run; not during the rollout and its rewards, which may merge adapters.
            if self._may_fuse_lora:
                fused_lora = unsloth_lora.fused_attention if _IS_UNSLOTH else peft_lora.fused_lora_forward
                self._step_stack.enter_context(fused_lora(self._unwrapped))
            if self._may_be_reentrant:
                self._step_stack.enter_context(checkpointing.reentrant_checkpointing(self._unwrapped))
            self._step_stack.enter_context(grouped_heads())
        with memory_advice(self), unsloth_compat.logits_not_hidden_states():
            if _IS_UNSLOTH:
                inputs = unsloth_compat.align_old_log_probs(inputs, self._pad_id)
            count = loss_count(inputs, self.sdpo_config.loss_aggregation)
            denominator, processes = count.clamp(min=1), 1
            if self._mode == "train":
                denominator = self._window.denominator(
                    step=self._step,
                    length=self.current_gradient_accumulation_steps,
                    generate_every=self._schedule.generate_every,
                    part_weights=self._part_weights,
                )
                # Gradients and logged losses are averaged over processes, hence the factor.
                processes = self.accelerator.num_processes
            output = self._micro_batch_output(model, inputs, count, unit=denominator / processes)
        self._sums[self._mode].add(output.metrics)
        if self._mode == "eval":
            self._eval_loss.add(
                output.total, output.policy_total, count=output.count, denominator=denominator
            )
        elif self._policy_term is not None and self._policy_term.has_entropy_bonus:
            step_entropy.update_bonus(self, output.metrics, ends_step=self.accelerator.sync_gradients)
        return output.total * processes / denominator

    def _micro_batch_output(
        self, model: nn.Module, inputs: Any, count: Tensor, *, unit: Tensor
    ) -> micro_batch.MicroBatchOutput:
        """The output of a micro-batch; `unit` is what its total is divided by on this process, []."""
        router_weight = count
        policy_weight, distillation_weight = self._part_weights
        if self._policy_term is not None:
            steps = self.current_gradient_accumulation_steps if self._mode == "train" else 1
            share = steps / self.args.steps_per_generation if self._mode == "train" else 1.0
            router_weight = unit / steps
            inputs = inputs | step_policy.policy_inputs(
                self.sdpo_config,
                self._policy_term,
                inputs,
                weight=unit * policy_weight,
                entropy_coef=step_entropy.bonus_coef(self),
                accumulation_steps=steps,
                step_tokens=inputs["num_items_in_batch"] / self.accelerator.num_processes * share,
            )
        observers = self._records.observers(self.args, self.state, inputs, mode=self._mode)
        context = self._step_context(model, distillation_weight, observers)
        by_row = self._forward_mode is not None and self._forward_mode.layout.by_row
        batch = select_rows(inputs, at_least_one=context.in_lockstep, read_prompts=by_row)
        if batch is None:
            return micro_batch.zero_loss(self._unwrapped)._replace(count=count)
        context, fused = self._check_model(context, batch.student)
        return micro_batch.micro_batch_loss(context, batch, count, router_weight=router_weight, fused=fused)

    def _step_context(
        self,
        model: nn.Module,
        distillation_weight: float = 1.0,
        observers: Sequence[Callable[[micro_batch.Observation], None]] = (),
    ) -> micro_batch.StepContext:
        anchor = partial(
            reference,
            self.model,
            self._unwrapped,
            self.ref_model,
            self._start,
            accelerator=self.accelerator,
            training=self._mode == "train",
        )
        return micro_batch.StepContext(
            config=self.sdpo_config,
            accelerator=self.accelerator,
            model=model,
            unwrapped=self._unwrapped,
            teacher=self._teacher,
            temperature=self.temperature,
            transform=self._transform,
            router_loss_coef=self.router_aux_loss_coef if self.aux_loss_enabled else None,
            policy_term=self._policy_term,
            distillation_weight=distillation_weight,
            reference=anchor if self.sdpo_config.anchor_weight > 0.0 else None,
            observers=observers,
            head_in_float32=self.args.cast_lm_head_to_fp32,
            embedding_noise=self.args.neftune_noise_alpha is not None,
        )

    def _check_model(
        self, context: micro_batch.StepContext, tokens: TokenBatch
    ) -> tuple[micro_batch.StepContext, bool]:
        """The context, and whether to fuse, after a forward that shows what the model is.

        All processes call it.
        """
        if self._forward_mode is None:
            self._forward_mode = find_forward_mode(context, tokens)
            if self._forward_mode.reads_padding:
                warn_of_padding(self._unwrapped)
        if self._forward_mode.reads_padding and context.in_lockstep:
            _validate.check_rows_alone(self.args, self._unwrapped, mode=self._mode)
        return self._forward_mode.of(context), self._forward_mode.fused

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """The Trainer's, with the mean loss over all its tokens in place of that over batches and processes."""
        if not self.sdpo_config.enabled:
            return super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        self._eval_loss = EvaluationLoss()
        self._forget_metrics("eval")
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        _validate.check_batches_seen("eval_dataset", self._eval_loss.batches)
        output.metrics[f"{metric_key_prefix}_loss"] = self._eval_loss.mean(self._sum)
        return output

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, ...]:
        method = super()._get_per_token_logps_and_entropies
        arguments = inspect.signature(method).bind(model, input_ids, *args, **kwargs).arguments
        others = {name for name, value in arguments.items() if value is not None and value is not False}
        # Unsloth's loss expects the conventions of its own version.
        if self.sdpo_config.enabled and not _IS_UNSLOTH and others <= _LOG_PROB_ARGUMENTS:
            log_probs = micro_batch.completion_log_probs(
                partial(self._check_model, self._step_context(self.model)),
                model,
                self._unwrapped if model is self.model else self.accelerator.unwrap_model(model),
                input_ids,
                arguments["attention_mask"],
                length=arguments["logits_to_keep"],
                batch_size=arguments.get("batch_size"),
            )
            return log_probs, None, None
        with nullcontext() if _IS_UNSLOTH else torch_kernel(input_ids.device):
            return method(model, input_ids, *args, **kwargs)

    # --- training loop -----------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As `GRPOTrainer.train`; `True` resumes from the last complete checkpoint.

        Args:
            resume_from_checkpoint: a folder, or `True`.
            *args: as for `GRPOTrainer.train`.
            **kwargs: as for `GRPOTrainer.train`.

        Raises:
            ValueError: the checkpoint is incomplete, or its teacher is not this run's; see `teacher_on_resume`.
        """
        if self.sdpo_config.enabled:
            resume_from_checkpoint = self._resume_from(resume_from_checkpoint)
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            if self.sdpo_config.enabled and self._optimizer_hook is not None:
                self._optimizer_hook.remove()

    def _begin_training(self) -> None:
        self._forget_unfinished_step()
        step, history = self.state.global_step, self.state.log_history
        self._records.begin(step, options=self._options, history=history)
        for store in self._stores.values():
            store.on_train_begin(self._unwrapped)
        self._optimizer_hook = drop_gradients(self.optimizer, unless=lambda: self._window.has_signal)

    def _forget_unfinished_step(self) -> None:
        """Of an earlier `train` that an exception ended; a checkpoint's state is loaded after this."""
        self._window, self._counted = StepWindow(), None
        # The prompts begin anew, and so does the generation batch.
        self._step += -self._step % self._schedule.generate_every
        self._ticks.generation_batches = self._step // self._schedule.generate_every
        self._forget_metrics("train")
        step_entropy.forget_unfinished_step(self)
        self._feedback.forget()

    def _forget_metrics(self, mode: str) -> None:
        self._metrics[mode].clear()
        self._pending_metrics.clear()  # of reward functions
        self._sums[mode] = MetricSums()

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch; at the end of an optimizer step its gradient gets the true denominator."""
        with memory_advice(self), ExitStack() as stack:
            stack.callback(setattr, self, "_step_stack", None)
            self._step_stack = stack
            loss = super().training_step(*args, **kwargs)
        if not self.sdpo_config.enabled:
            return loss
        loss, correction = self._window.end_micro_batch(loss, ends_step=self.accelerator.sync_gradients)
        if correction is not None:
            shards.scale_gradients(self.model, correction)
        if self.accelerator.sync_gradients:
            skipped = float(not self._window.has_signal)
            self._metrics["train"][_STEP_WITHOUT_SIGNAL].append(skipped)
            if self.sdpo_config.grpo_weight_final is not None:
                self._metrics["train"]["self_distillation/grpo_weight"].append(self._part_weights[0])
        return loss

    def _update_teacher(self) -> None:
        ended = self._step // self._schedule.generate_every
        for _ in range(self._ticks.due(has_signal=self._window.has_signal, generation_batches=ended)):
            self._teacher.tick(self._unwrapped)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """TRL's logging, with the means of the metrics since the last time; a user's own log is logged as it is."""
        if self.sdpo_config.enabled and not is_log_of_trainer(logs):
            log_alone(self, logs, *args, **kwargs)  # perhaps of one process
            self._records.write_own(self.state.global_step, logs)
            return
        if self.sdpo_config.enabled:
            mode = self._mode
            means = self._sums[mode].means(self._sum)
            # Also after steps without a metric of their own, but not at the end of a run, whose steps were logged.
            stepped = mode == "train" and bool(self._metrics["train"].get(_STEP_WITHOUT_SIGNAL))
            distance = self._teacher.distance(self._unwrapped) if stepped else None
            if distance is not None:
                means["self_distillation/teacher_distance"] = distance.item()
            self._diagnostics.observe_means(means)
            for name, value in means.items():
                self._metrics[mode][name].append(value)
            self._records.fill_table(self._logs["extra"], self._taken_columns)
        super().log(logs, *args, **kwargs)
        if self.sdpo_config.enabled:
            # Evaluations by hand may be of any data, not comparable with those of the run.
            if self.is_in_train:
                self._diagnostics.observe_logs(logs)
            warnings = self._diagnostics.take_warnings()
            self._records.write(self.state.global_step, logs, warnings, mode=mode)

    # --- model card --------------------------------------------------------------------------------------

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's model card, with the paper of SDPO, the options of this run and the version of this library.

        Args:
            *args: as for `GRPOTrainer.create_model_card`.
            **kwargs: as for `GRPOTrainer.create_model_card`.
        """
        super().create_model_card(*args, **kwargs)
        if self.sdpo_config.enabled and self.is_world_process_zero():
            card = Path(self.args.output_dir) / "README.md"
            model_card.add_options(card, self._options, version=__version__)

    # --- properties of this run --------------------------------------------------------------------------

    @property
    def sdpo_config(self) -> SDPOConfig:
        """The options of this run, which were checked when it was constructed."""
        return self._sdpo_config

    @property
    def _options(self) -> dict[str, Any]:
        return dataclasses.asdict(self.sdpo_config)

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    @property
    def _unwrapped(self) -> Any:
        wrapped, unwrapped = self._unwrapped_cache
        if wrapped is not self.model:
            unwrapped = self.accelerator.unwrap_model(self.model)
            self._unwrapped_cache = self.model, unwrapped
        return unwrapped

    @property
    def _may_fuse_lora(self) -> bool:
        """Whether the option is on, and nobody compiles the model or saves products of its forward."""
        saves_products = (self.args.gradient_checkpointing_kwargs or {}).get("context_fn") is not None
        return self.sdpo_config.fused_lora_forward and not (self.args.torch_compile or saves_products)

    @property
    def _may_be_reentrant(self) -> bool:
        """Whether nobody chose the kind of checkpointing, and the loss needs no value within a layer."""
        # Router logits are taken from within the layers, whose first forward would have no graph.
        return not (_IS_UNSLOTH or self.aux_loss_enabled) and checkpointing.may_be_reentrant(
            self.args, self.accelerator, self._unwrapped
        )

    @property
    def _part_weights(self) -> tuple[float, float]:
        """Of the policy loss and of the divergence in the present optimizer step."""
        if self._policy_term is None:
            return 0.0, 1.0
        last_step = self.state.max_steps - 1
        return step_policy.part_weights(self.sdpo_config, step=self.state.global_step, last_step=last_step)

    @property
    def _schedule(self) -> Schedule:
        return schedule_of(
            self.args,
            world_size=self.accelerator.num_processes,
            num_iterations=self.num_iterations,
            num_generations=self.num_generations,
        )

    @property
    def _pad_id(self) -> int:
        processing: Any = self.processing_class
        return getattr(processing, "tokenizer", processing).pad_token_id

    @property
    def _taken_columns(self) -> list[str]:
        """Names of columns of the completions table that reward functions write."""
        return [*self.reward_func_names, *self._extra_columns]

    def _gather(self, items: list[Any]) -> list[Any]:
        """The items of all processes, in their order."""
        return list(gather_object(items) if self.accelerator.num_processes > 1 else items)

    def _sum(self, tensor: Tensor) -> Tensor:
        """Over all processes."""
        return self.accelerator.reduce(tensor, reduction="sum")
