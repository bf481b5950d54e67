"""The methods of the trainer that save a run and resume it.

The class derives from whatever `trl.GRPOTrainer` is when `SDPOTrainer` is first imported, so that a trainer that
was patched before (`PatchFastRL`) is inherited.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import trl
from torch import nn

from .. import __version__
from ..compat.adapters import trainable_preserved
from ..step.metrics import MetricSums
from ..teacher.ticks import TickSchedule
from . import checkpoint, options, progress

BASE: Any = trl.GRPOTrainer


class ResumableTrainer(BASE):
    """A `GRPOTrainer` whose checkpoints also have the SDPO options, the teacher and the progress of the run.

    `SDPOTrainer` derives from this class. It has the properties `sdpo_config`, `_options`, `_schedule` and
    `_unwrapped`, sets the attributes declared here at construction, unless `enabled=False`, and its `train` calls
    `_resume_from`.
    """

    _stores: checkpoint.Stores
    _ticks: TickSchedule
    _sums: dict[str, MetricSums]
    _diagnostics: Any
    _records: Any

    _resume = checkpoint.ResumePoint()

    def _resume_from(self, choice: Any) -> Any:
        """The `resume_from_checkpoint` to pass on to the Trainer; the run begins there.

        Args:
            choice: a folder, `True`, or anything else.

        Raises:
            ValueError: the checkpoint is incomplete, or its teacher is not this run's.
        """
        has_length = hasattr(self.train_dataset, "__len__")
        self._resume = checkpoint.resume_point(choice, self.args.output_dir, has_length=has_length)
        folder = self._resume.folder
        if isinstance(folder, str) and self.sdpo_config.teacher_on_resume == "restore":
            checkpoint.check_teachers(folder, self._stores, self._unwrapped, prepared=False)
        return folder

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)
        # Every epoch draws its order from one generator, so the epochs before the checkpoint are drawn again.
        for _ in range(self._resume.epochs_done):
            next(iter(sampler), None)
        return sampler

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        epochs, batches = super()._init_training_state(*args, **kwargs)
        if self._resume.stream_position is None:
            return epochs, batches
        epochs, steps = self._resume.stream_position
        return epochs, 0 if self.args.ignore_data_skip else steps * self.args.gradient_accumulation_steps

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """As `GRPOTrainer.save_model`; the SDPO options are in `sdpo_config.json` beside the model.

        Args:
            output_dir: folder; `None` is that of the run.
            *args: as for `GRPOTrainer.save_model`.
            **kwargs: as for `GRPOTrainer.save_model`.
        """
        if self.sdpo_config.enabled and self.args.should_save:  # before it may be pushed to the Hub
            folder = self.args.output_dir if output_dir is None else output_dir
            options.save(folder, self._options, version=__version__)
        super().save_model(output_dir, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.sdpo_config.enabled:
            folder = f"{self._get_output_dir(trial=trial)}/checkpoint-{self.state.global_step}"
            if self.args.should_save:
                checkpoint.mark_incomplete(folder)
            self.accelerator.wait_for_everyone()
            checkpoint.save_teachers(folder, self._stores, self._unwrapped, writes=self.args.should_save)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.sdpo_config.enabled:
            progress.save(output_dir, self._run_state(), process=self.accelerator.process_index)
            # The trainer's state is next and makes the folder complete, so every process must be done.
            self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.sdpo_config.enabled or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        with trainable_preserved(self._unwrapped), checkpoint.trainable_dtypes_preserved(self._unwrapped):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            checkpoint.load_adapter_among_others(resume_from_checkpoint, self._unwrapped)

    def _load_optimizer_and_scheduler(self, checkpoint_folder: str | None) -> None:
        given = options.learning_rates(self.lr_scheduler)
        super()._load_optimizer_and_scheduler(checkpoint_folder)
        if checkpoint_folder is not None and self.is_world_process_zero():
            restored = options.learning_rates(self.lr_scheduler)
            is_deepspeed = self.is_deepspeed_enabled
            options.warn_of_learning_rates(checkpoint_folder, given, restored, is_deepspeed=is_deepspeed)
            if self.sdpo_config.enabled:
                options.warn_of_max_steps(checkpoint_folder, self.args.max_steps, scheduled=self._scheduled())
            defaults = dataclasses.asdict(type(self.sdpo_config)())
            options.warn_of_differences(checkpoint_folder, self._options, defaults, version=__version__)
        if self.sdpo_config.enabled and checkpoint_folder is not None:
            on_resume = self.sdpo_config.teacher_on_resume
            checkpoint.continue_teachers(
                checkpoint_folder, self._stores, self._unwrapped, on_resume=on_resume
            )

    def _scheduled(self) -> list[str]:
        """Names of the values whose schedule has the length of the run."""
        schedule = self.args.lr_scheduler_type
        is_constant = str(getattr(schedule, "value", schedule)).startswith("constant")
        weight = [] if self.sdpo_config.grpo_weight_final is None else ["grpo_weight"]
        return [*([] if is_constant else ["learning_rate"]), *weight]

    def _load_rng_state(self, checkpoint_folder: str | None) -> None:
        super()._load_rng_state(checkpoint_folder)
        if self.sdpo_config.enabled and checkpoint_folder is not None:
            self._load_run_state(
                progress.load(
                    checkpoint_folder,
                    process=self.accelerator.process_index,
                    schedule=dataclasses.asdict(self._schedule),
                    device=self.accelerator.device,
                )
            )

    def _run_state(self) -> progress.RunState:
        return progress.RunState(
            schedule=dataclasses.asdict(self._schedule),
            step=self._step,
            student_moved=self._ticks.student_moved,
            batches=self._buffered_inputs if self._step % self._schedule.generate_every else None,
            running_loss=progress.running_loss(self),
            metrics=self._metrics["train"],
            sums=self._sums["train"].state(),
            diagnostics=self._diagnostics.state(),
            rollout_texts=[] if self._records.recorder is None else self._records.recorder.state(),
        )

    def _load_run_state(self, state: progress.RunState | None) -> None:
        if state is None:
            return
        self._step, self._ticks.student_moved = state.step, state.student_moved
        self._ticks.generation_batches = self._step // self._schedule.generate_every
        if state.batches is not None:
            self._buffered_inputs = state.batches
        progress.set_running_loss(self, state.running_loss)
        self._metrics["train"].update(state.metrics)
        self._sums["train"].load_state(state.sums)
        self._diagnostics.load_state(state.diagnostics)
        if self._records.recorder is not None:
            self._records.recorder.load_state(state.rollout_texts)
