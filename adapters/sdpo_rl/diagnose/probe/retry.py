"""What the model writes when it sees the feedback or a demonstration, judged by the run's own reward functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


def why_not(trainer: Any) -> str | None:
    """Why completions cannot be sampled from the teacher's prompts; `None` if they can."""
    if getattr(trainer, "rollout_func", None) is not None:
        return "a rollout_func writes its own prompts"
    if getattr(trainer, "use_vllm", False) and getattr(trainer, "vllm_mode", "") == "server":
        return "a vLLM server samples all completions of a group from one prompt"
    if not hasattr(trainer, "_tokenize_prompts"):
        return "this GRPOTrainer has no _tokenize_prompts"
    return None


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
