"""The reward function of the recipes about arithmetic: a score, and in words which step comes first."""

from __future__ import annotations

import re
from typing import Any


def judge(completions: list[Any], question: list[str], **_: Any) -> list[tuple[float, str | None]]:
    """One (score, feedback) pair per completion; `question` is a column of the dataset, such as "47 * 8 + 19"."""
    return [
        check(turns[-1]["content"] or "", asked) for turns, asked in zip(completions, question, strict=True)
    ]


def check(reply: str, question: str) -> tuple[float, str | None]:
    """Score 1 if the last number is right; the feedback on others names the product, not the result."""
    first, second, third = map(int, re.findall(r"\d+", question))
    numbers = re.findall(r"\d+", reply.replace(",", ""))
    if numbers and int(numbers[-1]) == first * second + third:
        return 1.0, None
    found = f"the last number is {numbers[-1]}" if numbers else "there is no number in it"
    return (
        0.0,
        f"This is not the result: {found}. Compute the product first: {first} * {second} = {first * second}.",
    )
