"""The part of the trainer that writes and reads checkpoints: the Trainer's own, and beside them the teacher."""

from __future__ import annotations

from typing import Any

from torch import nn

from . import checkpoint, progress

_Trainer: Any = object


class Resuming(_Trainer):
    """A trainer whose resumed run equals the uninterrupted one."""

    _epochs_done = 0

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As `GRPOTrainer.train`. `True` resumes from the last checkpoint that is complete.

        Raises:
            ValueError: the checkpoint is incomplete, or its teacher is not this run's; see `teacher_on_resume`.
        """
        if self.sdpo_config.enabled:
            self._epochs_done = 0
            resume_from_checkpoint = checkpoint.resolve(resume_from_checkpoint, self.args.output_dir)
            if isinstance(resume_from_checkpoint, str):
                self._epochs_done = checkpoint.epochs_done(resume_from_checkpoint)
                if self.sdpo_config.teacher_on_resume == "restore":
                    checkpoint.check_teacher(resume_from_checkpoint, self._teacher, self._unwrapped)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)
        # Every pass draws its order from one generator, so the passes before the checkpoint are drawn again.
        for _ in range(self._epochs_done):
            next(iter(sampler), None)
        return sampler

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.sdpo_config.enabled:
            folder = f"{self._get_output_dir(trial=trial)}/checkpoint-{self.state.global_step}"
            if self.args.should_save:
                checkpoint.begin(folder)
            self.accelerator.wait_for_everyone()
            checkpoint.save_teacher(folder, self._teacher, self._unwrapped, writes=self.args.should_save)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.sdpo_config.enabled:
            progress.save(output_dir, self)
            # The trainer's state comes next and makes the folder complete, so every rank must be done.
            self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.sdpo_config.enabled or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        with checkpoint.dtypes_kept(self._unwrapped):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            checkpoint.load_adapter_beside_others(resume_from_checkpoint, self._unwrapped)

    def _load_optimizer_and_scheduler(self, checkpoint_folder: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint_folder)
        if self.sdpo_config.enabled and checkpoint_folder is not None:
            if self.sdpo_config.teacher_on_resume == "restart":
                self._teacher.restart(self._unwrapped)
            else:
                checkpoint.load_teacher(checkpoint_folder, self._teacher, self._unwrapped)

    def _load_rng_state(self, checkpoint_folder: str | None) -> None:
        super()._load_rng_state(checkpoint_folder)
        if self.sdpo_config.enabled and checkpoint_folder is not None:
            progress.load(checkpoint_folder, self)
