"""The reward function of code_feedback.yaml: runs the tests of a column in a sandbox; a failure is the feedback.

The sandbox is that of `private_api`: one function without imports, in a process with limits. Code of a model that
you do not trust belongs in a container without a network.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "private_api"))
from sandbox import Case, run_tests


def judge(
    completions: list[Any], name: list[str], tests: list[str], **_: Any
) -> list[tuple[float, str | None]]:
    """One (score, feedback) pair per completion.

    Args:
        completions: replies with a function, fenced or not.
        name: column with the function's name.
        tests: column with its tests, as JSON: a list of [arguments, expected value].
    """
    verdicts = []
    for turns, function, listed in zip(completions, name, tests, strict=True):
        reply = turns[0]["content"]
        block = re.search(r"```(?:python)?\n(.*?)```", reply, re.DOTALL)
        source = (block[1] if block else reply).strip()
        outcome = run_tests(source, function, [Case(*test) for test in json.loads(listed)])
        verdicts.append((float(outcome.passed), outcome.message))
    return verdicts
