"""One generation batch of a trainer without training: what is sampled, how it is scored, what the teacher reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..rollout.prompts import Prompt, completion_text
from ..rollout.reasons import reasons_without_signal
from .unchanged import unchanged


@dataclass(frozen=True)
class GenerationRow:
    """One completion of a generation batch.

    Attributes:
        row: its place among the rows of all processes; rows `group * num_generations` onwards are one group.
        prompt: the prompt, a string or messages.
        prompt_ids: the student's prompt, P tokens.
        completion: its text; of several turns a transcript.
        completion_ids: T tokens, those of tool results included.
        rewards: by reward function; NaN: it did not judge the row.
        score: what is compared with `success_reward_threshold`; NaN: no function judged the row.
        succeeded: whether the score reaches it.
        feedback: a text that is not blank, or `None`.
        demonstration_rows: whose completions the teacher was given, as places among the rows of all processes.
        demonstrations: their texts before any cut.
        teacher_prompt_ids: the reprompt as the teacher reads it, tokens; empty without a signal.
        has_demonstration: a demonstration is in the reprompt.
        uses_feedback: the feedback is in the reprompt.
        is_cut: a demonstration or the feedback was cut to fit.
        cut_texts: the demonstrations and the feedback as they stand in a reprompt that was cut; otherwise none.
        teacher_prompt_limit: largest number of tokens of the reprompt.
        whole_length: tokens of the reprompt before any cut; 0 without one.
        reason_without_signal: why the row has no distillation loss; `None`: it has one.
    """

    row: int
    prompt: Prompt
    prompt_ids: list[int]
    completion: str
    completion_ids: list[int]
    rewards: dict[str, float]
    score: float
    succeeded: bool
    feedback: str | None
    demonstration_rows: list[int]
    demonstrations: list[str]
    teacher_prompt_ids: list[int]
    has_demonstration: bool
    uses_feedback: bool
    is_cut: bool
    cut_texts: list[str]
    teacher_prompt_limit: int
    whole_length: int
    reason_without_signal: str | None


@dataclass(frozen=True)
class GenerationBatch:
    """This process's rows of a generation batch.

    Attributes:
        rows: in their order, before TRL shuffles them.
        group_size: completions of one prompt.
        inputs: the tensors that the loss is computed from, of B rows in the same order: `prompt_ids` and
            `prompt_mask` [B, P], `completion_ids`, `completion_mask` and `loss_mask` [B, T], `teacher_prompt_ids`
            and `teacher_prompt_mask` [B, P'], `row_mask` [B], and what else TRL and the options add.
        metrics: statistics of the batch over all processes, by name.
    """

    rows: list[GenerationRow]
    group_size: int
    inputs: Mapping[str, Any]
    metrics: Mapping[str, float]


def generation_batch(trainer: Any) -> GenerationBatch:
    """Sample and score the first generation batch of the training data, and leave the trainer as it was.

    Prompts, generation (vLLM's too), rewards, feedback and reprompts are those of training. Training afterwards
    gives the same numbers, bit for bit, as without this call: the model, the teacher, the optimizer, the order of
    the data, metrics, logs and random numbers are unchanged. Not restored is what reward functions, tools and
    environments keep for themselves, and what a vLLM engine draws. Nothing here has a gradient.

    With several processes all of them call it, and each gets its own rows.

    Args:
        trainer: an `SDPOTrainer`, before training or during it.

    Returns:
        This process's rows and the inputs of their loss.

    Raises:
        TypeError: another kind of trainer.
        ValueError: `enabled=False`, a dataset with fewer prompts than a generation batch, or a model that FSDP or
            DeepSpeed moves to its device when training begins.

    Source: a choice of this library.

    Examples:
        >>> generation_batch(3)
        Traceback (most recent call last):
            ...
        TypeError: trainer: expected an SDPOTrainer, got int; pass the trainer that is going to train
    """
    check_trainer(trainer)
    with unchanged(trainer):
        trainer.model.train()  # as in training: the mode decides the number of generations
        (inputs,) = training_rows(trainer, batches=1)
        return scored_batch(trainer, inputs)


def scored_batch(trainer: Any, inputs: list[dict[str, Any]]) -> GenerationBatch:
    """Sample and score completions for rows of the training data; the trainer is left as training leaves it.

    Args:
        trainer: an `SDPOTrainer`, its model in training mode.
        inputs: this process's rows of one generation batch.
    """
    with torch.no_grad():
        rollout, context, output = trainer._scored_rollout(inputs)
    rank, group_size = trainer.accelerator.process_index, trainer.num_generations
    reasons = reasons_without_signal(
        rollout,
        context,
        trainer.sdpo_config,
        has_loss=output["completion_mask"].any(dim=1).tolist(),
        group_size=group_size,
        rank=rank,
    )
    names = trainer.reward_func_names
    rows, first_row, prompts = [], rank * len(rollout.prompts), context.prompts
    successes = (rollout.scores >= trainer.sdpo_config.success_reward_threshold).tolist()
    for row, reason in enumerate(reasons):
        place = first_row + row
        rows.append(
            GenerationRow(
                row=place,
                prompt=rollout.prompts[row],
                prompt_ids=_attended(output["prompt_ids"][row], output["prompt_mask"][row]),
                completion=completion_text(rollout.completions[row]),
                # Not by the mask, which is 0 for a completion that was cut and masked.
                completion_ids=output["completion_ids"][row, : rollout.completion_lengths[row]].tolist(),
                rewards=dict(zip(names, rollout.rewards[place].tolist(), strict=True)),
                score=rollout.scores[place].item(),
                succeeded=successes[place],
                feedback=rollout.feedback[row],
                demonstration_rows=context.demonstration_rows[row],
                demonstrations=context.demonstrations[row],
                teacher_prompt_ids=prompts.ids[row],
                has_demonstration=prompts.has_demonstration[row],
                uses_feedback=prompts.uses_feedback[row],
                is_cut=prompts.truncated[row],
                cut_texts=prompts.cut_texts[row],
                teacher_prompt_limit=prompts.limits[row],
                whole_length=prompts.whole_lengths[row],
                reason_without_signal=reason,
            )
        )
    return GenerationBatch(rows, group_size, output, context.metrics)


def check_trainer(trainer: Any) -> None:
    """The trainer can make a generation batch without training.

    Args:
        trainer: an `SDPOTrainer`.

    Raises:
        TypeError: another kind of trainer.
        ValueError: `enabled=False`, or a model that is not on its device yet.
    """
    if not hasattr(trainer, "_scored_rollout"):
        raise TypeError(
            f"trainer: expected an SDPOTrainer, got {type(trainer).__name__}; pass the trainer that is going to "
            "train"
        )
    if not trainer.sdpo_config.enabled:
        raise ValueError("sdpo_config: expected enabled=True, got False; without it there is no teacher")
    device = trainer.accelerator.device
    if (stored := next(trainer.model.parameters()).device).type != device.type:
        raise ValueError(
            f"trainer: expected a model on {device}, got one on {stored}, which is moved when training begins; "
            "use one process without FSDP and DeepSpeed, or call it in a callback during training"
        )


def training_rows(trainer: Any, *, batches: int) -> list[list[dict[str, Any]]]:
    """This process's rows of the first generation batches of the first epoch, at most so many.

    Args:
        trainer: an `SDPOTrainer`.
        batches: generation batches.

    Raises:
        ValueError: the dataset has fewer prompts than one of them.
    """
    loaders = trainer.accelerator._dataloaders
    known = len(loaders)
    loader = trainer.get_train_dataloader()
    found = iter(loader)
    try:
        # The loader repeats a batch for every step that learns from it.
        repeats = trainer._schedule.generate_every
        inputs = [list(rows) for rows in islice(found, 0, repeats * batches, repeats)]
    finally:
        # Accelerate counts a loader as active until it is exhausted, and keeps all that it has made.
        found.close()
        loader.end()
        del loaders[known:]
    if not inputs:
        raise ValueError(
            f"train_dataset: expected at least {trainer.args.generation_batch_size // trainer.num_generations} "
            "prompts, those of a generation batch, got fewer; add rows, or lower the batch size"
        )
    return inputs


def _attended(ids: Tensor, mask: Tensor) -> list[int]:
    return [int(i) for i in ids[mask.bool()].tolist()]
