"""What the model writes when it sees the feedback or a demonstration, judged by the run's own reward functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


def why_not(trainer: Any, ids: Sequence[Sequence[int]]) -> str | None:
    """Why completions cannot be sampled from the teacher's prompts; `None` if they can.

    All processes give the same answer.

    Args:
        trainer: an `SDPOTrainer`.
        ids: tokens of the prompt of each of this process's rows.
    """
    if getattr(trainer, "rollout_func", None) is not None:
        return "a rollout_func writes its own prompts"
    if not hasattr(trainer, "_tokenize_prompts"):
        return "this GRPOTrainer has no _tokenize_prompts"
    if not getattr(trainer, "use_vllm", False):
        return None
    if trainer.vllm_mode == "server":
        return "a vLLM server samples all completions of a group from one prompt"
    return _too_long_for_vllm(trainer, ids)


def _too_long_for_vllm(trainer: Any, ids: Sequence[Sequence[int]]) -> str | None:
    """vLLM refuses a prompt of its whole length, and cuts completions that do not fit beside theirs."""
    accelerator = trainer.accelerator
    longest = torch.tensor([max(map(len, ids))], device=accelerator.device)
    needed = int(accelerator.gather(longest).max()) + trainer.args.max_completion_length
    limit = trainer.vllm_generation.llm.llm_engine.model_config.max_model_len
    if needed <= limit:
        return None
    return f"the teacher's prompts and completions need {needed} tokens, vllm_max_model_length is {limit}"


@contextmanager
def prompts_replaced(trainer: Any, ids: Sequence[Sequence[int]]) -> Iterator[list[bool]]:
    """The trainer's next generation starts from these tokens, one list for each row; rows and columns stay.

    Reward functions and tools get the prompts as they were.

    Args:
        trainer: an `SDPOTrainer`.
        ids: tokens of each row's prompt.

    Yields:
        A list that is no longer empty when the tokens were used.
    """
    used: list[bool] = []
    tokenize = trainer._tokenize_prompts

    def given(prompts: Any) -> Any:
        _, *rest = tokenize(prompts)
        used.append(True)
        return ([list(row) for row in ids], *rest)

    trainer._tokenize_prompts = given  # an attribute of the instance, before the method of its class
    try:
        yield used
    finally:
        del trainer._tokenize_prompts
