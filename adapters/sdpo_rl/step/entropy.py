"""What of GRPO's part depends on the student's entropy: the tokens that it selects, and the weight of the bonus."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .metrics import Metrics

# Less than any entropy, also one below 0 by rounding.
_NO_TOKEN = -1e9


def highest(entropy: Tensor, mask: Tensor, *, fraction: float, accelerator: Any) -> Tensor:
    """Tokens [B, T] bool of the mask with the highest entropies of all processes, which must all call it.

    As in TRL the threshold is the quantile 1 − `fraction` of the entropies of the micro-batch (arXiv 2506.01939).

    Args:
        entropy: [B, T] nats, detached.
        mask: [B, T] bool.
        fraction: of the tokens that are selected.
        accelerator: of the run.
    """
    own = accelerator.pad_across_processes(entropy[mask], dim=0, pad_index=_NO_TOKEN)
    found = accelerator.gather(own)
    found = found[found != _NO_TOKEN]
    if not len(found):
        return torch.zeros_like(mask)
    return mask & (entropy >= torch.quantile(found, 1.0 - fraction))


def bonus_coef(trainer: Any) -> float:
    """The weight of the mean entropy in the present step, by `GRPOConfig.entropy_coef` or TRL's controller of it.

    Args:
        trainer: a GRPOTrainer.
    """
    adaptive = getattr(trainer, "use_adaptive_entropy", False)
    if adaptive and trainer._last_world_entropy > trainer.args.entropy_target:
        return 0.0
    return float(getattr(trainer, "entropy_coef", 0.0))


def forget_unfinished_step(trainer: Any) -> None:
    """Of TRL's controller; what it learned from finished steps stays.

    Args:
        trainer: a GRPOTrainer.
    """
    if hasattr(trainer, "_entropy_window_stats"):
        trainer._entropy_window_stats = None


def update_bonus(trainer: Any, metrics: Metrics, *, ends_step: bool) -> None:
    """Count the entropies of a micro-batch; at the end of a step, move TRL's controller (arXiv 2505.22312).

    The weight grows where the mean entropy of the step's tokens is at most the target, and shrinks elsewhere. Its
    state is that of the trainer, which TRL saves and loads. All processes must call it.

    Args:
        trainer: a GRPOTrainer with an entropy bonus.
        metrics: of a micro-batch; without entropies where no model ran on it.
        ends_step: it was the last of its optimizer step.
    """
    args = trainer.args
    if args.use_adaptive_entropy:
        entropy = metrics.get("self_distillation/policy_entropy")
        if entropy is None:
            found = torch.zeros(2, device=trainer.accelerator.device)
        else:
            found = torch.stack([part.detach().float() for part in entropy])
        window = trainer._entropy_window_stats
        window = found if window is None else window + found
        trainer._entropy_window_stats = None if ends_step else window
        if ends_step:
            total, count = trainer.accelerator.reduce(window, reduction="sum").tolist()
            mean = total / max(count, 1.0)
            coef, delta = trainer.entropy_coef, args.entropy_coef_delta
            if mean <= args.entropy_target:
                trainer.entropy_coef = min(coef + delta, args.entropy_coef_max)
            else:
                trainer.entropy_coef = max(coef - delta, args.entropy_coef_min)
            trainer._last_world_entropy = mean
    if ends_step:
        trainer._metrics["train"]["entropy_coef"].append(trainer.entropy_coef)
