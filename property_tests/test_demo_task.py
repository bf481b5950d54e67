"""The demo's task: its machine, its interpreter, its prompts and the control with shuffled feedback."""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable
from itertools import pairwise

import pytest
from demo_cases import CHANGED, attempts, machines, rejects, tasks
from hypothesis import assume, given
from hypothesis import strategies as st
from programs import EXAMPLES

sys.path.insert(0, str(EXAMPLES / "demo"))

import machine
import pretrain
import run

seeds = st.integers(0, 2**32)


# --- the machine -------------------------------------------------------------------------------------------------


def _check_bijection(primitive: Callable[[str], str]) -> None:
    assert sorted(map(primitive, machine.REGISTERS)) == machine.REGISTERS


@pytest.mark.parametrize("name", sorted(machine.PRIMITIVES))
def test_a_primitive_is_a_bijection_of_the_registers(name: str) -> None:
    _check_bijection(machine.PRIMITIVES[name])
    rejects(_check_bijection, lambda r: r[0] + machine.PRIMITIVES[name](r)[1:] if r < "500" else r[:2] + "0")


# The same eight maps as arithmetic on the three digits a, b, c.
ARITHMETIC: dict[str, Callable[[int, int, int], tuple[int, int, int]]] = {
    "rev": lambda a, b, c: (c, b, a),
    "rotl": lambda a, b, c: (b, c, a),
    "rotr": lambda a, b, c: (c, a, b),
    "swap": lambda a, b, c: (b, a, c),
    "inc": lambda a, b, c: ((a + 1) % 10, (b + 1) % 10, (c + 1) % 10),
    "dec": lambda a, b, c: ((a + 9) % 10, (b + 9) % 10, (c + 9) % 10),
    "comp": lambda a, b, c: (9 - a, 9 - b, 9 - c),
    "half": lambda a, b, c: ((a + 5) % 10, (b + 5) % 10, (c + 5) % 10),
}


def _check_arithmetic(primitives: dict[str, Callable[[str], str]]) -> None:
    for value in range(1000):
        digits = (value // 100, value // 10 % 10, value % 10)
        for name, compute in ARITHMETIC.items():
            a, b, c = compute(*digits)
            assert primitives[name](f"{value:03d}") == f"{100 * a + 10 * b + c:03d}"


def test_primitives_are_their_arithmetic_on_every_register() -> None:
    assert set(ARITHMETIC) == set(machine.PRIMITIVES)
    _check_arithmetic(machine.PRIMITIVES)
    with_carry = {"inc": lambda r: f"{(int(r) + 111) % 1000:03d}"}
    rejects(_check_arithmetic, machine.PRIMITIVES | with_carry)


def test_the_habit_uses_every_primitive_once_and_meanings_are_distinct() -> None:
    assert sorted(machine.HABIT.values()) == sorted(machine.PRIMITIVES)
    assert all(len(set(meanings)) == 3 for meanings in machine.MEANINGS.values())


def _check_change(change: Callable[[int], machine.Machine], seed: int) -> None:
    changed = change(seed)
    assert sum(changed[o] != machine.HABIT[o] for o in machine.HABIT) == 6
    assert all(changed[o] in machine.MEANINGS[o] for o in machine.MEANINGS)
    assert changed == change(seed)


@given(seeds)
def test_a_changed_machine_differs_from_the_habit_in_six_opcodes(seed: int) -> None:
    _check_change(machine.changed_machine, seed)
    rejects(_check_change, lambda seed: machine.changed_machine(seed, changes=5), seed)
    rejects(_check_change, lambda seed: machine.changed_machine(seed) | {"A": "swap", "B": "comp"}, seed)


def _check_trace(
    answer: Callable[[machine.Task, machine.Machine], str], task: machine.Task, meanings: machine.Machine
) -> None:
    first, *rest = answer(task, meanings).split("\n")
    assert first == task.register
    assert "".join(line[0] for line in rest) == task.program
    for before, after in pairwise([first, *rest]):
        assert after[1:] == machine.PRIMITIVES[meanings[after[0]]](before[-3:])


@given(tasks, machines)
def test_a_trace_applies_one_meaning_per_line(task: machine.Task, meanings: machine.Machine) -> None:
    _check_trace(machine.Task.answer, task, meanings)


def test_a_trace_that_starts_over_or_follows_the_habit_is_rejected() -> None:
    def from_the_register(task: machine.Task, meanings: machine.Machine) -> str:
        lines = [o + machine.PRIMITIVES[meanings[o]](task.register) for o in task.program]
        return "\n".join([task.register, *lines])

    task = machine.Task("ACB", "314")
    changed = {o: meanings[1] for o, meanings in machine.MEANINGS.items()}
    _check_trace(machine.Task.answer, task, changed)
    rejects(_check_trace, from_the_register, task, changed)
    rejects(_check_trace, lambda task, _: task.answer(machine.HABIT), task, changed)


# --- the interpreter ---------------------------------------------------------------------------------------------

Interpret = Callable[[str, str], machine.Verdict]


def _check_verdict(interpret: Interpret, completion: str, answer: str) -> None:
    score, feedback = interpret(completion, answer)
    assert (score == 1.0) == (completion == answer) == (feedback == "")
    if completion == answer:
        return
    assert score == 0.0
    match = re.fullmatch(r"line (\d+): expected (end|[A-H]?\d{3}) got (end|junk|[A-H]?\d{3})", feedback)
    assert match is not None
    right, wrong = answer.split("\n"), completion.split("\n") if completion else []
    line = int(match[1]) - 1
    assert right[:line] == wrong[:line]  # everything before the named line is right
    assert right[line : line + 1] != wrong[line : line + 1]  # and the named line is not
    assert match[2] == (right[line] if line < len(right) else "end")
    if line >= len(wrong):
        assert match[3] == "end"
    else:
        assert match[3] in (wrong[line], "junk")
        assert match[2] != match[3]


def _last_wrong_line(completion: str, answer: str) -> machine.Verdict:
    pairs = list(zip(answer.split("\n"), completion.split("\n"), strict=False))
    wrong = [n for n, (want, got) in enumerate(pairs) if want != got]
    if len(wrong) < 2:
        return machine.interpret(completion, answer)
    want, got = pairs[wrong[-1]]
    return machine.Verdict(0.0, f"line {wrong[-1] + 1}: expected {want} got {got}")


@given(attempts())
def test_feedback_names_the_first_wrong_line(attempt: tuple[str, str]) -> None:
    _check_verdict(machine.interpret, *attempt)


@given(tasks, machines, machines)
def test_naming_the_last_wrong_line_or_counting_from_zero_is_rejected(
    task: machine.Task, meanings: machine.Machine, others: machine.Machine
) -> None:
    answer, attempt = task.answer(meanings), task.answer(others)
    wrong = sum(a != b for a, b in zip(answer.split("\n"), attempt.split("\n"), strict=True))
    assume(wrong >= 2)
    rejects(_check_verdict, _last_wrong_line, attempt, answer)

    def from_zero(completion: str, answer: str) -> machine.Verdict:
        score, feedback = machine.interpret(completion, answer)
        return machine.Verdict(score, re.sub(r"\d+", lambda m: str(int(m[0]) - 1), feedback, count=1))

    rejects(_check_verdict, from_zero, attempt, answer)


def test_feedback_of_chosen_completions() -> None:
    answer = machine.Task("ACB", "314").answer(machine.HABIT)
    assert answer == "314\nA413\nC524\nB245"
    for completion, feedback in {
        "314\nA413\nC685\nB856": "line 3: expected C524 got C685",
        "314\nA413": "line 3: expected C524 got end",
        "": "line 1: expected 314 got end",
        "314\nA413\nC52": "line 3: expected C524 got junk",
        "314\nA413\nC524\nB245\nB452": "line 5: expected end got B452",
        "314\nA413\nC524\nB245\nend": "line 5: expected end got junk",
    }.items():
        assert machine.interpret(completion, answer) == (0.0, feedback)


# --- training and held-out prompts -------------------------------------------------------------------------------


def _check_prompts(prompts: list[str]) -> None:
    assert not any(machine.held_out(prompt[-3:]) for prompt in prompts)


@given(seeds)
def test_no_held_out_register_is_in_a_training_prompt(seed: int) -> None:
    rng = random.Random(seed)
    asked = [machine.draw_task(rng).prompt for _ in range(20)]
    everywhere = [f"run A on {rng.choice(machine.REGISTERS)}" for _ in range(200)]
    rejects(_check_prompts, everywhere)
    asked += [make(rng)[0].split("\n")[0] for make in (pretrain.skills_document, pretrain.habit_document)]
    rows = run.training_prompts(machine.HABIT, seed, count=20)
    asked += [prompt[0]["content"] for prompt in rows["prompt"]]
    _check_prompts(asked)


def test_the_held_out_set_is_fixed_distinct_and_a_fifth_of_the_registers() -> None:
    chosen = machine.held_out_tasks()
    assert chosen == machine.held_out_tasks()
    assert len(set(chosen)) == 200
    assert all(machine.held_out(task.register) for task in chosen)
    assert set(machine.TRAIN_REGISTERS).isdisjoint(machine.HELD_OUT_REGISTERS)
    assert 150 < len(machine.HELD_OUT_REGISTERS) < 250


# --- the shuffled control ----------------------------------------------------------------------------------------


def _rollout(seed: int) -> tuple[list[list[dict[str, str]]], list[str]]:
    """A batch of the demo's shape, some completions right and some by habit, and its answers."""
    rng = random.Random(seed)
    drawn = [task for task in (machine.draw_task(rng) for _ in range(run.PROMPTS)) for _ in range(run.GROUP)]
    texts = [task.answer(rng.choice([machine.HABIT, CHANGED])) for task in drawn]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    return completions, [task.answer(CHANGED) for task in drawn]


def _check_control(reward: Callable[..., list[machine.Verdict]], seed: int) -> None:
    completions, answers = _rollout(seed)
    honest = run.interpreter(completions, answers)
    shuffled = reward(completions, answers)
    assert [verdict.score for verdict in shuffled] == [verdict.score for verdict in honest]
    assert sorted(verdict.feedback for verdict in shuffled) == sorted(verdict.feedback for verdict in honest)
    assert all(verdict.feedback == "" for verdict in shuffled if verdict.score == 1.0)
    groups: dict[str, set[int]] = {}  # feedback -> the groups whose failures it names
    for row, verdict in enumerate(honest):
        groups.setdefault(verdict.feedback, set()).add(row // run.GROUP)
    for row, verdict in enumerate(shuffled):
        if verdict.score == 0.0:
            assert groups[verdict.feedback] != {row // run.GROUP}


@given(seeds)
def test_the_control_only_exchanges_feedback_between_failures(seed: int) -> None:
    assume(sum(verdict.score == 0.0 for verdict in run.interpreter(*_rollout(seed))) >= 2 * run.GROUP)
    _check_control(run.shuffling_interpreter, seed)
    rejects(_check_control, run.interpreter, seed)
