"""Runs a function that a model wrote against tests, in a process of its own with limits.

Two barriers. The source must be one function without imports, classes and names with underscores in front, and sees
a few harmless builtins. And the process that runs it has little time, memory and output, no files to write, no
environment, and is killed with its children. It does not have the expected values: it returns what the function
returned, and the comparison is here. A module of `house_style.py` and `kit_task.py`; nothing to run.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

SECONDS = 2  # of processor time; twice as many of wall-clock time
MEMORY = 256 * 2**20  # bytes of address space
OUTPUT = 4096  # characters of a value that the process returns
MAX_CHARACTERS = 2000  # of a source

# Attributes that lead from a value to the frames and modules around it begin so. `str.format` still reads them, as
# text, so the process must hold nothing that a function should not know.
FORBIDDEN_PREFIXES = ("_", "gi_", "cr_", "ag_", "tb_", "f_", "co_")

BUILTINS = [
    "abs",
    "all",
    "any",
    "bool",
    "dict",
    "divmod",
    "enumerate",
    "filter",
    "float",
    "int",
    "isinstance",
    "len",
    "list",
    "map",
    "max",
    "min",
    "pow",
    "range",
    "repr",
    "reversed",
    "round",
    "set",
    "sorted",
    "str",
    "sum",
    "tuple",
    "zip",
    "ArithmeticError",
    "AssertionError",
    "AttributeError",
    "Exception",
    "IndexError",
    "KeyError",
    "StopIteration",
    "TypeError",
    "ValueError",
    "ZeroDivisionError",
]


class Case(NamedTuple):
    """One test: the arguments of a call, and the value it must return; both as Python literals."""

    arguments: list[Any]
    expected: Any


class Outcome(NamedTuple):
    """What the tests say."""

    passed: bool
    message: str | None  # one line: the first failure


# Runs in the child. It reads source, name and arguments, and writes a line with each value or with an error.
_CHILD = """
import ast, builtins, json, resource, sys
job = json.load(sys.stdin)
calls = ast.literal_eval(job["calls"])
for limit, value in (("CPU", job["seconds"]), ("AS", job["memory"]), ("FSIZE", 0), ("NOFILE", 8), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + limit), (value, value))
answer = sys.stdout

class Discard:
    def write(self, text): return len(text)
    def flush(self): pass

sys.stdout = sys.stderr = Discard()
allowed = {name: getattr(builtins, name) for name in job["builtins"] if hasattr(builtins, name)}
def line_of(error):
    frame, line = error.__traceback__, None
    while frame:
        if frame.tb_frame.f_code.co_filename == "<reply>":
            line = frame.tb_lineno
        frame = frame.tb_next
    return "" if line is None else f"line {line}: "
def tell(**found):
    print(json.dumps(found), file=answer, flush=True)
try:
    space = {"__builtins__": allowed, "__name__": "reply"}
    exec(compile(job["source"], "<reply>", "exec"), space)
    for arguments in calls:
        tell(value=repr(space[job["name"]](*arguments))[:job["output"]])
except BaseException as error:
    text = " ".join(str(error).split())[:120].encode("utf-8", "replace").decode()
    tell(error=f"{line_of(error)}{type(error).__name__}: {text}")
"""

# What `ast.literal_eval` raises where a text is no literal, or has too many brackets.
NO_LITERAL = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)


def run_tests(source: str, name: str, cases: Sequence[Case]) -> Outcome:
    """Run a function against tests.

    Args:
        source: Python source of one function.
        name: the function's name.
        cases: the tests.

    Returns:
        Whether all tests passed, and otherwise one line about the first failure.

    Raises:
        ValueError: there is no test, or one that no function could pass.

    Examples:
        >>> run_tests("def twice(x):\\n    return x + x", "twice", [Case([2], 4)])
        Outcome(passed=True, message=None)
        >>> run_tests("def twice(x):\\n    return x", "twice", [Case([2], 4)]).message
        'AssertionError: twice(2) returned 2, expected 4'
    """
    _check_cases(cases)
    problem = refuse(source, name)
    if problem is not None:
        return Outcome(False, problem)
    job = {
        "source": source,
        "name": name,
        "calls": repr([case.arguments for case in cases]),
        "builtins": BUILTINS,
        "seconds": SECONDS,
        "memory": MEMORY,
        "output": OUTPUT,
    }
    late = f"TimeoutError: no result within {SECONDS} seconds, or memory ran out"
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={},
        cwd="/",
        start_new_session=True,
    ) as child:
        try:
            output, _ = child.communicate(json.dumps(job).encode(), timeout=2 * SECONDS)
        except subprocess.TimeoutExpired as error:
            output = error.output or b""
            late = f"TimeoutError: no result within {2 * SECONDS} seconds"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
    # What follows the last end of a line is incomplete: the process was killed.
    lines = [json.loads(line) for line in output.split(b"\n")[:-1]]
    for case, line in zip(cases, lines, strict=False):
        if "error" in line:
            return Outcome(False, line["error"])
        if not _returned(line["value"], case.expected):
            call = f"{name}({', '.join(map(repr, case.arguments))})"
            returned = f"returned {line['value'][:80]}, expected {case.expected!r}"
            return Outcome(False, f"AssertionError: {call} {returned}")
    return Outcome(False, late) if len(lines) < len(cases) else Outcome(True, None)


def is_same(value: Any, expected: Any) -> bool:
    """Whether two literals are equal, with the same types at every depth.

    Examples:
        >>> is_same([1, 2], [1, 2]), is_same([True, 2.0], [1, 2])
        (True, False)
    """
    return bool(_typed(value) == _typed(expected))


def _typed(value: Any) -> tuple[type, Any]:
    parts = value
    if isinstance(value, dict):
        parts = frozenset((_typed(key), _typed(part)) for key, part in value.items())
    elif isinstance(value, set):
        parts = frozenset(map(_typed, value))
    elif isinstance(value, list | tuple):
        parts = tuple(map(_typed, value))
    return type(value), parts


def _returned(text: str, expected: Any) -> bool:
    try:
        return is_same(ast.literal_eval(text), expected)
    except NO_LITERAL:
        return False


def _check_cases(cases: Sequence[Case]) -> None:
    if not cases:
        raise ValueError(
            "cases: expected at least one test, got none; pass the arguments of a call and its value"
        )
    for case in cases:
        try:
            ast.literal_eval(repr(tuple(case)))
        except NO_LITERAL:
            raise ValueError(
                f"cases: expected Python literals, got {case!r:.200}; "
                "pass numbers that are finite, texts, and lists, tuples, sets and dictionaries of them"
            ) from None
        if (length := len(repr(case.expected))) > OUTPUT:
            raise ValueError(
                f"cases: expected a value of at most {OUTPUT} characters, got {length}; test a shorter one"
            )


def refuse(source: str, name: str) -> str | None:
    """Why a source is not run; `None` if it is."""
    if len(source) > MAX_CHARACTERS:
        return f"SyntaxError: more than {MAX_CHARACTERS} characters"
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"SyntaxError: {getattr(error, 'msg', None) or 'the reply cannot be parsed'}"
    match tree.body:
        case [ast.FunctionDef(name=found, decorator_list=[])] if found == name:
            pass
        case _:
            return f"SyntaxError: the reply is not one function named {name}"
    for node in ast.walk(tree):
        # A match statement reads attributes whose names are not in attribute nodes.
        if isinstance(
            node, ast.Import | ast.ImportFrom | ast.ClassDef | ast.Global | ast.Nonlocal | ast.Match
        ):
            return f"SyntaxError: line {node.lineno}: {type(node).__name__} is not allowed"
        for name_of in ("id", "attr", "arg", "name"):
            value = getattr(node, name_of, None)
            if isinstance(value, str) and value.startswith(FORBIDDEN_PREFIXES):
                return f"SyntaxError: the name {value:.40} is not allowed"
    return None
