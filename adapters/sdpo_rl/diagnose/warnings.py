"""Known ways in which a run goes wrong, said aloud once each."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..config import SDPOConfig

logger = logging.getLogger("sdpo_rl")

_OFTEN = 0.25
_COLLAPSE = 0.25
_BASELINE_BATCHES = 5
_LOW_MASS = 0.9


class Diagnostics:
    """Watches a run's own metrics and warns when they show a known failure."""

    def __init__(self, config: SDPOConfig) -> None:
        self._config = config
        self._empty = 0
        self._lengths: list[float] = []
        self._said: set[str] = set()

    def state(self) -> dict[str, Any]:
        """What was seen and said so far, as JSON knows it."""
        return {"empty": self._empty, "lengths": list(self._lengths), "said": sorted(self._said)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self._empty, self._lengths, self._said = state["empty"], list(state["lengths"]), set(state["said"])

    def observe_batch(self, metrics: Mapping[str, float], completion_lengths: Sequence[int]) -> None:
        """Look at one generation batch."""
        self._empty = self._empty + 1 if metrics["self_distillation/empty_target_batch"] else 0
        if self._empty and self._empty % self._config.diagnostics_patience == 0:
            logger.warning(
                "No row had a teacher signal for %d generation batches: no completion reached "
                "success_reward_threshold=%g with a peer to learn from, and no feedback came. Nothing is being "
                "learned; lower the threshold, raise num_generations, or return feedback from a reward function.",
                self._empty,
                self._config.success_reward_threshold,
            )
        if metrics["self_distillation/truncated_reprompt_fraction"] > _OFTEN:
            self._once(
                "truncated",
                f"{metrics['self_distillation/truncated_reprompt_fraction']:.0%} of the rows had their "
                "demonstration or feedback cut; raise max_reprompt_length or shorten the feedback.",
            )
        if metrics["self_distillation/dropped_reprompt_fraction"] > 0:
            self._once(
                "dropped",
                "Some prompts are so long that no demonstration or feedback fits beside them; these rows teach "
                "nothing. Raise max_reprompt_length or lower max_completion_length.",
            )
        self._lengths.append(sum(completion_lengths) / max(len(completion_lengths), 1))
        if len(self._lengths) > _BASELINE_BATCHES:
            baseline = sum(self._lengths[:_BASELINE_BATCHES]) / _BASELINE_BATCHES
            if self._lengths[-1] < _COLLAPSE * baseline:
                self._once(
                    "collapse",
                    f"Completions shrank from {baseline:.0f} to {self._lengths[-1]:.0f} tokens. If their quality "
                    "fell too, lower the learning rate or the teacher_update_rate.",
                )
            del self._lengths[_BASELINE_BATCHES:]

    def observe_means(self, means: Mapping[str, float]) -> None:
        """Look at what is about to be logged.

        Raises:
            FloatingPointError: the divergence is not a number, so that no zero is logged in its place.
        """
        divergence = means.get("self_distillation/divergence")
        if divergence is not None and not math.isfinite(divergence):
            raise FloatingPointError(
                f"the divergence became {divergence}; the model's weights or logits are no longer finite. Lower "
                "the learning rate, check gradient clipping, and resume from the last checkpoint"
            )
        mass = means.get("self_distillation/student_topk_mass")
        if mass is not None and mass < _LOW_MASS:
            self._once(
                "mass",
                f"The top {self._config.k} tokens hold {mass:.0%} of the student's probability; "
                "raise k, or set support='full'.",
            )

    def _once(self, key: str, message: str) -> None:
        if key not in self._said:
            self._said.add(key)
            logger.warning(message)
