"""Runs a function that a model wrote against tests, in a process of its own with limits.

Two barriers. The source must be one function without imports, classes and names with underscores in front, and sees
a few harmless builtins. And the process that runs it has little time, memory and output, no files to write, no
environment, and is killed with its children. A module of `house_style.py`; nothing to run.
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
OUTPUT = 4096  # bytes read from the process
MAX_CHARACTERS = 2000  # of a source

# Attributes that lead from a value to the frames and modules around it begin so.
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


# Runs in the child. It reads source, name and cases, and writes one line.
_CHILD = """
import ast, builtins, json, resource, sys
job = json.load(sys.stdin)
cases = ast.literal_eval(job["cases"])
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
def check():
    space = {"__builtins__": allowed, "__name__": "reply"}
    exec(compile(job["source"], "<reply>", "exec"), space)
    for arguments, expected in cases:
        call = f"{job['name']}({', '.join(map(repr, arguments))})"
        value = space[job["name"]](*arguments)
        if type(value) is not type(expected) or value != expected:
            return f"AssertionError: {call} returned {repr(value)[:80]}, expected {expected!r}"
try:
    message = check()
except BaseException as error:
    text = " ".join(str(error).split())[:120].encode("utf-8", "replace").decode()
    message = f"{line_of(error)}{type(error).__name__}: {text}"
answer.write(json.dumps(message))
answer.flush()
"""


def run_tests(source: str, name: str, cases: Sequence[Case]) -> Outcome:
    """Run a function against tests.

    Args:
        source: Python source of one function.
        name: the function's name.
        cases: the tests.

    Returns:
        Whether all tests passed, and otherwise one line about the first failure.

    Examples:
        >>> run_tests("def twice(x):\\n    return x + x", "twice", [Case([2], 4)])
        Outcome(passed=True, message=None)
        >>> run_tests("def twice(x):\\n    return x", "twice", [Case([2], 4)]).message
        'AssertionError: twice(2) returned 2, expected 4'
    """
    problem = refuse(source, name)
    if problem is not None:
        return Outcome(False, problem)
    job = {
        "source": source,
        "name": name,
        "cases": repr([tuple(case) for case in cases]),
        "builtins": BUILTINS,
        "seconds": SECONDS,
        "memory": MEMORY,
    }
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
        except subprocess.TimeoutExpired:
            return Outcome(False, f"TimeoutError: no result within {2 * SECONDS} seconds")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
    if child.returncode == -signal.SIGXCPU or not output:
        return Outcome(False, f"TimeoutError: no result within {SECONDS} seconds, or memory ran out")
    message = json.loads(output[:OUTPUT])
    return Outcome(message is None, message)


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
