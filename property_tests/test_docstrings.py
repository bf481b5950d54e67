"""Every public function and class documents what it takes, returns and raises, and shows an example that runs."""

from __future__ import annotations

import importlib
import inspect
import itertools
import re
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("sdpo", "sdpo_rl")
SECTIONS = ("Args", "Returns", "Raises", "Gradient", "Source", "Examples")
# What GRPOTrainer documents is not documented again.
INHERITED = {"SDPOTrainer"}


def public(package: str) -> list[tuple[str, Any]]:
    home = importlib.import_module(package)
    return [(f"{package}.{name}", getattr(home, name)) for name in sorted(home.__all__)]


def sections(doc: str) -> dict[str, str]:
    """The text of each section of a docstring, by its heading; what comes first is "Summary"."""
    pattern = rf"^(?:{'|'.join(SECTIONS)}):"
    found, name = {"Summary": ""}, "Summary"
    for line in inspect.cleandoc(doc).splitlines():
        if re.match(pattern, line):
            name, _, line = line.partition(":")
        found[name] = found.get(name, "") + line + "\n"
    return found


def documented_arguments(text: str) -> list[str]:
    """Names with an entry in an Args section: those at its outermost indentation."""
    return re.findall(r"^ {4}\*{0,2}(\w+)(?: \([^)]*\))?:", text, re.M)


ENTRY = re.compile(r" *\*{0,2}\w+(, \w+)*: ")


def paragraphs(doc: str) -> list[list[str]]:
    """Paragraphs of prose up to the example; an entry of a section is one, a literal block is none."""
    found: list[list[str]] = [[]]
    literal = False
    for line in inspect.cleandoc(doc).partition("\nExamples:")[0].splitlines():
        literal = literal and not (line.strip() and not line.startswith(" "))
        if literal or not line.strip() or re.fullmatch(r"\w+:", line):
            found.append([])
        elif ENTRY.match(line):
            found.append([line])
        else:
            found[-1].append(line)
        literal = literal or line.endswith("::")
    return [lines for lines in found if lines]


def badly_wrapped(doc: str) -> list[str]:
    """Lines with another indentation than their paragraph, or so short that the next word would fit."""
    found = []
    for lines in paragraphs(doc):
        indents = [len(line) - len(line.lstrip()) for line in lines]
        hanging = indents[0] + 4 if ENTRY.match(lines[0]) and indents[0] else indents[0]
        found += [line for line, indent in zip(lines[1:], indents[1:], strict=True) if indent != hanging]
        found += [
            line
            for line, following in itertools.pairwise(lines)
            if not line.endswith((".", ":")) and len(line) + 1 + len(following.split()[0]) < 80
        ]
    return list(dict.fromkeys(found))


def parameters(value: Any) -> list[str]:
    if inspect.isclass(value) and issubclass(value, tuple):
        return list(value._fields)  # type: ignore[attr-defined]
    names = [name for name in inspect.signature(value).parameters if name not in ("self", "cls")]
    return [name for name in names if not name.startswith("_")]


def body_of(function: Any) -> str:
    """Source of a function without its docstring."""
    return inspect.getsource(function).replace(function.__doc__ or "", "")


def complaints(value: Any, *, tensors: bool) -> list[str]:
    """What is missing in the docstring of a function or class; `tensors`: it must say what carries gradient."""
    doc = value.__doc__ or ""
    found, wanted = sections(doc), parameters(value)
    lines = [] if found["Summary"].strip() else ["no summary"]
    first = inspect.cleandoc(doc).splitlines()[0] if doc else ""
    if not first.endswith((".", "::")):
        lines.append(f"the summary is not one sentence on one line: {first!r}")
    named = documented_arguments(found.get("Args", ""))
    if inspect.isclass(value) and value.__name__ in INHERITED:
        wanted = [name for name in wanted if name in named]
    lines += [f"Args lacks {name}" for name in wanted if name not in named]
    lines += [f"Args names {name}, which is no parameter" for name in named if name not in wanted]
    is_tuple = inspect.isclass(value) and issubclass(value, tuple)
    needed = ["Source"] if is_tuple else ["Source", "Examples"]
    if inspect.isfunction(value):
        if str(inspect.signature(value).return_annotation) != "None":
            needed.append("Returns")
        texts_alone = str(inspect.signature(value).return_annotation).startswith(("list", "None"))
        if tensors and not texts_alone and "Tensor" in str(inspect.signature(value)):
            needed.append("Gradient")
        if re.search(r"\braise\b|\bcheck_\w+\(", body_of(value)):
            needed.append("Raises")
    lines += [f"no {name}" for name in needed if name not in found]
    ordered = [name for name in SECTIONS if name in found]
    if [name for name in found if name != "Summary"] != ordered:
        lines.append(f"the sections are not in the order {', '.join(ordered)}")
    lines += [f"badly wrapped: {line!r}" for line in badly_wrapped(doc)]
    if "Examples" in found and ">>>" not in found["Examples"] and ">>>" not in doc:
        lines.append("the example has no doctest")
    return lines


CASES = [case for package in PACKAGES for case in public(package)]


@pytest.mark.parametrize(("name", "value"), CASES, ids=[name for name, _ in CASES])
def test_it_is_documented(name: str, value: Any) -> None:
    assert complaints(value, tensors=name.startswith("sdpo.")) == []


def test_public_methods_are_documented() -> None:
    bare = [
        f"{name}.{method}"
        for name, value in CASES
        if inspect.isclass(value)
        for method, function in inspect.getmembers(value, inspect.isfunction)
        if function.__module__.split(".")[0] in PACKAGES
        and not method.startswith("_")
        and not function.__doc__
    ]
    assert bare == []


def good(x: Any, *, k: int) -> int:
    """A function of one line.

    Its formula is in a literal block::

        a = x[k]
            .sum()

    Args:
        x: [N] a tensor, of which
            more: is said here.
        k: a number.

    Returns:
        A number.

    Raises:
        ValueError: k is not positive.

    Gradient: none.

    Source: nowhere.

    Examples:
        >>> 1
        1
    """
    if k < 1:
        raise ValueError(k)
    return k


def of_tensors(x: Tensor) -> Tensor:
    return x


def returns_nothing(x: Any) -> None:
    return None


class Pair(NamedTuple):
    first: int
    second: int


GOOD = inspect.cleandoc(good.__doc__ or "")
PLANTED: dict[str, tuple[Any, str, list[str]]] = {
    "a parameter": (good, GOOD.replace("    k: a number.\n", ""), ["Args lacks k"]),
    "a stale name": (
        good,
        GOOD.replace("    k: a number.\n", "    k: a number.\n    z: another.\n"),
        ["Args names z, which is no parameter"],
    ),
    "a renamed one": (
        good,
        GOOD.replace("    k: a", "    n: a"),
        ["Args lacks k", "Args names n, which is no parameter"],
    ),
    "Returns": (good, GOOD.replace("Returns:\n    A number.\n\n", ""), ["no Returns"]),
    "Raises": (good, GOOD.replace("Raises:\n    ValueError: k is not positive.\n\n", ""), ["no Raises"]),
    "Source": (good, GOOD.replace("Source: nowhere.\n\n", ""), ["no Source"]),
    "Examples": (good, GOOD.partition("Examples:")[0], ["no Examples"]),
    "a doctest": (good, GOOD.partition(">>>")[0] + "text", ["the example has no doctest"]),
    "everything": (
        good,
        "",
        ["no summary", "the summary is not one sentence on one line: ''", "Args lacks x"],
    ),
    "a summary of one line": (
        good,
        GOOD.replace("A function of one line.", "A function\nof two lines."),
        ["the summary is not one sentence on one line: 'A function'"],
    ),
    "the order": (
        good,
        GOOD.replace("Source: nowhere.\n\n", "").replace("Args:", "Source: nowhere.\n\nArgs:", 1),
        ["the sections are not in the order Args, Returns, Raises, Gradient, Source, Examples"],
    ),
    "a line's indentation": (
        good,
        GOOD.replace("Its formula is", f"Its formula, {'at great length, ' * 5}\n    is as it\nstands"),
        ["badly wrapped: '    is as it'"],
    ),
    "a full line": (
        good,
        GOOD.replace("Its formula is", "Its formula\nis"),
        ["badly wrapped: 'Its formula'"],
    ),
    "Gradient": (
        of_tensors,
        "Tensors.\n\nArgs:\n    x: [N].\n\nReturns:\n    [N].\n\nSource: nowhere.\n\nExamples:\n    >>> 1\n    1",
        ["no Gradient"],
    ),
    "a field": (Pair, "Two ints.\n\nArgs:\n    first: one.\n\nSource: nowhere.", ["Args lacks second"]),
}


@pytest.mark.parametrize("missing", PLANTED)
def test_the_check_finds_what_is_missing(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value, doc, expected = PLANTED[missing]
    monkeypatch.setattr(value, "__doc__", doc)
    assert complaints(value, tensors=True)[: len(expected)] == expected


def test_the_check_accepts_a_good_docstring(monkeypatch: pytest.MonkeyPatch) -> None:
    assert complaints(good, tensors=True) == []
    monkeypatch.setattr(
        returns_nothing,
        "__doc__",
        "Nothing.\n\nArgs:\n    x: anything.\n\nSource: nowhere.\n\nExamples:\n    >>> 1\n    1",
    )
    assert complaints(returns_nothing, tensors=True) == []


def test_the_version_is_that_of_the_distribution() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert [importlib.import_module(package).__version__ for package in PACKAGES] == [version, version]


def test_help_begins_with_what_to_call() -> None:
    import sdpo

    start = (sdpo.__doc__ or "").partition("Examples:")[0]
    for name in (
        "select_demonstrations",
        "build_reprompts",
        "ema",
        "distillation_loss",
        "self_distillation_loss",
    ):
        assert name in start
    mentioned = re.findall(r"``(\w+)``", start)
    assert [name for name in mentioned if not hasattr(sdpo, name)] == []
