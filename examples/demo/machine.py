"""The demo's task: a machine with three digits and eight opcodes, and prompts that never say what they do.

A *register* holds three decimal digits. A *program* is one to three opcodes. Every opcode has three possible
meanings, and a *machine* fixes one of them for each: there are 3 ** 8 = 6561 machines. The question is

    run ACB on 314

and the only right answer is the whole trace, the register first and then one line per opcode:

    314
    A413
    C524
    B245

A wrong answer gets a score of 0 and one sentence from the interpreter about the first wrong line,

    line 3: expected C524 got C685

which is the information that a scalar reward leaves out. A module of `run.py` and `pretrain.py`; nothing to run.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Mapping
from itertools import zip_longest
from typing import NamedTuple


def _each_digit(change: Callable[[int], int]) -> Callable[[str], str]:
    return lambda register: "".join(str(change(int(digit)) % 10) for digit in register)


# Eight bijections of the thousand registers.
PRIMITIVES: dict[str, Callable[[str], str]] = {
    "rev": lambda r: r[::-1],
    "rotl": lambda r: r[1:] + r[0],
    "rotr": lambda r: r[-1] + r[:-1],
    "swap": lambda r: r[1] + r[0] + r[2],
    "inc": _each_digit(lambda d: d + 1),
    "dec": _each_digit(lambda d: d - 1),
    "comp": _each_digit(lambda d: 9 - d),
    "half": _each_digit(lambda d: d + 5),
}

# The three meanings of each opcode. The first column is the habit; it uses every primitive once.
MEANINGS: dict[str, tuple[str, str, str]] = {
    "A": ("rev", "rotl", "inc"),
    "B": ("rotl", "swap", "dec"),
    "C": ("inc", "comp", "rotr"),
    "D": ("dec", "half", "rev"),
    "E": ("swap", "rotr", "comp"),
    "F": ("half", "inc", "rotl"),
    "G": ("comp", "dec", "swap"),
    "H": ("rotr", "rev", "half"),
}

Machine = Mapping[str, str]  # opcode -> the name of its primitive

HABIT: Machine = {opcode: meanings[0] for opcode, meanings in MEANINGS.items()}


def draw_machine(rng: random.Random, weights: tuple[float, float, float] = (1, 1, 1)) -> Machine:
    """A random machine: each opcode has its first, second or third meaning with these weights."""
    return {opcode: rng.choices(meanings, weights)[0] for opcode, meanings in MEANINGS.items()}


def changed_machine(seed: int, changes: int = 6) -> Machine:
    """The habit, except that `changes` opcodes (random by `seed`) have one of their other two meanings."""
    rng = random.Random(f"machine {seed}")
    changed = rng.sample(sorted(MEANINGS), changes)
    return dict(HABIT) | {opcode: rng.choice(MEANINGS[opcode][1:]) for opcode in changed}


def what_changed(machine: Machine) -> str:
    """The opcodes that differ from the habit, as text: `A rev → inc, C inc → rotr`."""
    return ", ".join(f"{o} {HABIT[o]} → {machine[o]}" for o in HABIT if machine[o] != HABIT[o])


class Task(NamedTuple):
    """One question: run `program` on `register`."""

    program: str
    register: str

    @property
    def prompt(self) -> str:
        """The question. It does not say which machine runs it."""
        return f"run {self.program} on {self.register}"

    def answer(self, machine: Machine) -> str:
        """The trace of this program on `machine`, the only text that scores 1."""
        register, lines = self.register, [self.register]
        for opcode in self.program:
            register = PRIMITIVES[machine[opcode]](register)
            lines.append(opcode + register)
        return "\n".join(lines)


class Verdict(NamedTuple):
    """What the interpreter returns for one completion: the pair that an SDPO reward function gives."""

    score: float
    feedback: str


def interpret(completion: str, answer: str) -> Verdict:
    """Score 1.0 and no feedback if the completion is the answer, else 0.0 and a text on the first wrong line."""
    if completion == answer:
        return Verdict(1.0, "")
    expected, got = answer.split("\n"), [_legible(line) for line in completion.split("\n") if completion]
    # The shorter text is padded with "end", so that two different texts differ in some line.
    lines = enumerate(zip_longest(expected, got, fillvalue="end"), start=1)
    line, (want, have) = next((line, pair) for line, pair in lines if pair[0] != pair[1])
    return Verdict(0.0, f"line {line}: expected {want} got {have}")


def _legible(line: str) -> str:
    return line if re.fullmatch("[A-H]?[0-9]{3}", line) else "junk"


def held_out(register: str) -> bool:
    """Whether prompts on this register are for evaluation only: about one in five, by the register's MD5."""
    return hashlib.md5(register.encode()).digest()[0] % 5 == 0


REGISTERS = [f"{value:03d}" for value in range(1000)]
TRAIN_REGISTERS = [register for register in REGISTERS if not held_out(register)]
HELD_OUT_REGISTERS = [register for register in REGISTERS if held_out(register)]


def draw_task(rng: random.Random, registers: list[str] = TRAIN_REGISTERS) -> Task:
    """A program of one to three opcodes (each length equally likely) on one of `registers`."""
    program = "".join(rng.choices(sorted(MEANINGS), k=rng.randint(1, 3)))
    return Task(program, rng.choice(registers))


def held_out_tasks(count: int = 200) -> list[Task]:
    """The fixed, distinct questions on which every curve is evaluated."""
    rng = random.Random("held out")
    tasks: dict[Task, None] = {}
    while len(tasks) < count:
        tasks[draw_task(rng, HELD_OUT_REGISTERS)] = None
    return list(tasks)
