"""What the log of a run warns about: known ways in which it fails."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..config import SDPOConfig
from ..rollout.endings import prompt_endings
from ..rollout.prompts import Prompt, Renderer
from .monitors import Monitors

logger = logging.getLogger("sdpo_rl")

# Fraction of the rows with a truncated reprompt, above which there is a warning.
_MANY_TRUNCATED = 0.25
# Mean completion length relative to that of the first batches, below which completions have collapsed.
_COLLAPSED_LENGTH = 0.25
_BASELINE_BATCHES = 5
# Probability of the top-K tokens under the student, below which the support misses too much.
_LOW_TOPK_MASS = 0.9


def no_signal(
    metrics: Mapping[str, float],
    config: SDPOConfig,
    *,
    best_score: float | None,
    writes_prompts: bool = False,
) -> tuple[str, str]:
    """Why no row has a teacher signal, and what to change.

    Args:
        metrics: of a generation batch without one.
        config: of the run.
        best_score: of the batches without one; `None`: no completion was judged.
        writes_prompts: the run has a `teacher_prompt_func`.
    """
    is_too_long = metrics["self_distillation/dropped_reprompt_fraction"] > 0
    if writes_prompts and is_too_long:
        return (
            "the prompts of teacher_prompt_func are too long",
            "return prompts of at most max_reprompt_length tokens, or lower max_completion_length",
        )
    if writes_prompts:
        return (
            "teacher_prompt_func returned None for every completion that has a token with a loss, or none has one",
            "return prompts, or raise max_completion_length where all completions are cut",
        )
    has_feedback = metrics.get("self_distillation/feedback_available_fraction", 0.0) > 0
    threshold = config.success_reward_threshold
    if is_too_long:
        return (
            "no demonstration or feedback fits beside the prompts",
            "raise max_reprompt_length, lower max_completion_length, or remove long prompts",
        )
    if has_feedback and not config.include_environment_feedback:
        return (
            f"no completion reached success_reward_threshold={threshold:g} beside another completion of its "
            "prompt, and the feedback is not used",
            "set include_environment_feedback=True",
        )
    if has_feedback or _reaches(best_score, threshold):
        return (
            "there was feedback or a success, but no token of these completions counts: they are empty, or cut at "
            "max_completion_length and masked",
            "raise max_completion_length, or set mask_truncated_completions=False",
        )
    if best_score is None:
        return (
            "no reward function judged a completion, and there was no feedback",
            "give each row a text in the dataset's column 'feedback', or pass reward functions that judge or "
            "return feedback",
        )
    return (
        f"no completion reached success_reward_threshold={threshold:g} beside another completion of its prompt "
        f"(the best score was {best_score:g}), and there was no feedback",
        "lower the threshold, name the functions of success in success_reward_funcs, raise num_generations, or "
        "return feedback from a reward function",
    )


def _reaches(score: float | None, threshold: float) -> bool:
    # As a tensor, like the choice of demonstrations: 0.7 rounded to float32 is less than the double 0.7.
    return score is not None and bool(torch.tensor(score) >= threshold)


def truncated_reprompts(fraction: float) -> str | None:
    """What to change where many rows had their demonstration or feedback cut.

    Args:
        fraction: of the rows.
    """
    if fraction <= _MANY_TRUNCATED:
        return None
    return (
        f"{fraction:.0%} of the rows had their demonstration or feedback cut; raise max_reprompt_length, or "
        "shorten the feedback."
    )


def low_mass(mass: float, k: int) -> str | None:
    """What to change where the support misses much of the student.

    Args:
        mass: the student's probability of its top tokens.
        k: their number.
    """
    if mass >= _LOW_TOPK_MASS:
        return None
    return f"The top {k} tokens have {mass:.0%} of the student's probability; raise k, or set support='full'."


def different_endings(prompts: Sequence[Prompt], renderer: Renderer, config: SDPOConfig) -> str | None:
    """What to change where the chat template ends the teacher's prompts otherwise than the student's.

    Args:
        prompts: of a generation batch.
        renderer: of the student's prompts.
        config: its `apply_chat_template_kwargs` are used.
    """
    arguments = config.template_kwargs
    if not arguments:
        return None
    for student, teacher in prompt_endings(prompts, renderer, arguments):
        if student != teacher:
            return (
                f"apply_chat_template_kwargs={arguments}: the student's prompt ends with {student!r}, the "
                f"teacher's with {teacher!r}, so the teacher expects another beginning of the completion, whatever "
                "the feedback says. Set them in GRPOConfig.chat_template_kwargs, for both sides, or remove them."
            )
    return None


def warn_of_padding(model: Any) -> None:
    """Warn of a model whose outputs depend on padding: training takes longer, and samples may be worse."""
    logger.warning(
        "%s reads the padding before a row, although the attention mask hides it: rows of different lengths run "
        "one after the other here, but GRPOTrainer still samples them from one padded batch. Prompts of one "
        "length avoid that.",
        type(model).__name__,
    )


class Diagnostics:
    """Reads the metrics of a run, and warns when they show a known failure.

    Args:
        config: its limits are named in the messages.
        writes_prompts: the run has a `teacher_prompt_func`.
    """

    def __init__(self, config: SDPOConfig, *, writes_prompts: bool = False) -> None:
        self._config = config
        self._writes_prompts = writes_prompts
        self._empty_batches = 0  # in succession
        self._best_score: float | None = None  # in these
        # A best score below the threshold, and the batches in succession that have it.
        self._ceiling: tuple[float, int] = (0.0, 0)
        self._lengths: list[float] = []  # mean completion lengths of the first batches
        self._warned: set[str] = set()
        self._new: dict[str, str] = {}  # messages since `take_warnings`, by name
        self._monitors = Monitors()

    def state(self) -> dict[str, Any]:
        """The observations and warnings so far, in JSON's types."""
        return {
            "empty_batches": self._empty_batches,
            "best_score": self._best_score,
            "ceiling": list(self._ceiling),
            "lengths": list(self._lengths),
            "warned": sorted(self._warned),
            "new": dict(self._new),
            "monitors": self._monitors.state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `state()`."""
        self._empty_batches, self._best_score = state["empty_batches"], state["best_score"]
        score, batches = state.get("ceiling", (0.0, 0))  # checkpoints of earlier versions have none
        self._ceiling = (float(score), int(batches))
        self._lengths, self._warned = list(state["lengths"]), set(state["warned"])
        self._new = dict(state["new"])
        if missing := self._monitors.load_state(state["monitors"]):
            logger.warning(
                "The checkpoint is of an earlier version. For the warnings of a collapse these values are "
                "collected anew from here on: %s. The values of the start of the run are kept.",
                ", ".join(missing),
            )

    def take_warnings(self) -> dict[str, str]:
        """The messages since the last call, by name."""
        new, self._new = self._new, {}
        return new

    def observe_prompts(self, prompts: Sequence[Prompt], renderer: Renderer) -> None:
        """Check the prompts of one generation batch; `renderer` is that of the student's."""
        if message := different_endings(prompts, renderer, self._config):
            self._warn_once("endings", message)

    def observe_batch(self, metrics: Mapping[str, float], completion_lengths: Sequence[int]) -> None:
        """Check one generation batch: its metrics, and the tokens of each completion."""
        if metrics["self_distillation/empty_target_batch"]:
            self._empty_batches += 1
            scores = (self._best_score, metrics.get("self_distillation/best_score"))
            self._best_score = max((score for score in scores if score is not None), default=None)
        else:
            self._empty_batches, self._best_score = 0, None
        if self._empty_batches and self._empty_batches % self._config.diagnostics_patience == 0:
            cause, fix = no_signal(
                metrics, self._config, best_score=self._best_score, writes_prompts=self._writes_prompts
            )
            effect = "Nothing is learned"
            if self._config.has_policy_loss:  # whose advantages need no teacher
                effect = "Only GRPO's part of the loss trains"
            self._warn(
                "no_signal",
                f"No row had a teacher signal for {self._empty_batches} generation batches: {cause}. {effect}; "
                f"{fix}.",
            )
        if not metrics["self_distillation/empty_target_batch"]:  # "no_signal" names the score of the others
            self._observe_best_score(metrics.get("self_distillation/best_score"))
        truncated = metrics["self_distillation/truncated_reprompt_fraction"]
        if message := truncated_reprompts(truncated):
            self._warn_once("truncated", message)
        if metrics["self_distillation/dropped_reprompt_fraction"] > 0:
            found = "Some prompts are so long that no demonstration or feedback fits beside them"
            if self._writes_prompts:
                found = "Some prompts of teacher_prompt_func are too long"
            self._warn_once(
                "dropped",
                f"{found}; these rows have no loss. Raise max_reprompt_length, or lower max_completion_length "
                "where the model's context is the limit.",
            )
        self._lengths.append(sum(completion_lengths) / max(len(completion_lengths), 1))
        if len(self._lengths) > _BASELINE_BATCHES:
            *first, last = self._lengths
            baseline = sum(first) / _BASELINE_BATCHES
            if last < _COLLAPSED_LENGTH * baseline:
                self._warn_once(
                    "collapse",
                    f"Completions shrank from {baseline:.0f} to {last:.0f} tokens. If they became worse too, lower "
                    "the learning rate or the teacher_update_rate.",
                )
            self._lengths = first

    def _observe_best_score(self, score: float | None) -> None:
        """Warn where the best completions of all batches have the same score, below that of a success.

        Hard tasks have a best score of 0 for long. A larger one that does not change may be the most there is.
        """
        threshold = self._config.success_reward_threshold
        if score is None or score <= 0.0 or _reaches(score, threshold):
            self._ceiling = (0.0, 0)
            return
        last, batches = self._ceiling
        self._ceiling = (score, batches + 1 if score == last else 1)
        if self._ceiling[1] >= self._config.diagnostics_patience:
            self._warn_once(
                "ceiling",
                f"The best score of each of the last {self._ceiling[1]} generation batches with a signal was "
                f"{score:g}, below success_reward_threshold={threshold:g}: no completion counts as a success. If "
                f"{score:g} is the most that a completion can get, lower the threshold, or name the functions of "
                "success in success_reward_funcs.",
            )

    def observe_means(self, means: Mapping[str, float]) -> None:
        """Check the means that are about to be logged.

        Raises:
            FloatingPointError: the divergence is not finite; the Trainer would log a loss of 0 in its place.
        """
        divergence = means.get("self_distillation/divergence")
        if divergence is not None and not math.isfinite(divergence):
            raise FloatingPointError(
                f"the divergence became {divergence}; the model's weights or logits are no longer finite. Lower "
                "the learning rate, check gradient clipping, and resume from the last checkpoint"
            )
        mass = means.get("self_distillation/student_topk_mass")
        if mass is not None and (message := low_mass(mass, self._config.k)):
            self._warn_once("mass", message)

    def observe_logs(self, logs: Mapping[str, Any]) -> None:
        """Check an entry of the log, of training or of an evaluation, for the signs of a collapse."""
        for name, message in self._monitors.observe(logs).items():
            self._warn_once(name, message)

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            self._warn(key, message)

    def _warn(self, key: str, message: str) -> None:
        self._new[key] = message
        # Not as a format: the message may have a percent sign.
        logger.warning("%s", message)
