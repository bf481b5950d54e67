"""Strategies for tasks, machines and attempts, and a changed machine, for the tests of the demo."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
from hypothesis import strategies as st
from programs import EXAMPLES

sys.path.insert(0, str(EXAMPLES / "demo"))

import language
import machine

CHANGED = machine.changed_machine(0)
opcodes = st.sampled_from(sorted(machine.MEANINGS))
registers = st.sampled_from(machine.REGISTERS)
tasks = st.builds(machine.Task, st.text(opcodes, min_size=1, max_size=3), registers)
machines = st.fixed_dictionaries({o: st.sampled_from(m) for o, m in machine.MEANINGS.items()})


@st.composite
def attempts(draw: st.DrawFn) -> tuple[str, str]:
    """An attempt (the answer, another machine's trace, a damaged one, or nonsense), and the answer."""
    task = draw(tasks)
    answer, other = task.answer(draw(machines)), task.answer(draw(machines))
    at = draw(st.integers(0, len(other)))
    noise = "".join(draw(st.lists(st.sampled_from(language.WORDS), max_size=6)))
    return draw(
        st.sampled_from([answer, other, other[:at], other[:at] + noise, noise, answer + noise])
    ), answer


def rejects(check: Callable[..., None], *counter_example: object) -> None:
    """The check fails on a counter-example."""
    with pytest.raises(AssertionError):
        check(*counter_example)
