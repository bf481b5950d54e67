"""Every public function and class documents what it takes, returns and raises, and shows an example that runs."""

from __future__ import annotations

import importlib
import inspect
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("sdpo", "sdpo_rl")
SECTIONS = ("Args", "Returns", "Raises", "Gradient", "Source", "Example")
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


def parameters(value: Any) -> list[str]:
    if inspect.isclass(value) and issubclass(value, tuple):
        return list(value._fields)  # type: ignore[attr-defined]
    names = [name for name in inspect.signature(value).parameters if name not in ("self", "cls")]
    return [name for name in names if not name.startswith("_")]


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
    needed = ["Source"] if is_tuple else ["Source", "Example"]
    if inspect.isfunction(value):
        if str(inspect.signature(value).return_annotation) != "None":
            needed.append("Returns")
        texts_alone = str(inspect.signature(value).return_annotation).startswith(("list", "None"))
        if tensors and not texts_alone and "Tensor" in str(inspect.signature(value)):
            needed.append("Gradient")
    lines += [f"no {name}" for name in needed if name not in found]
    if "Example" in found and ">>>" not in found["Example"] and ">>>" not in doc:
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
        for method, function in vars(value).items()
        if inspect.isfunction(function) and not method.startswith("_") and not function.__doc__
    ]
    assert bare == []


def planted(x: Any, *, k: int) -> None:
    """A function.

    Args:
        x: [N] a tensor.
        z: no parameter.
    """


def good(x: Any, *, k: int) -> int:
    """A function of one line.

    Args:
        x: [N] a tensor, of which
            more: is said here.
        k: a number.

    Returns:
        A number.

    Source: nowhere.

    Example:
        >>> 1
        1
    """
    return k


def test_the_check_finds_what_is_missing() -> None:
    assert complaints(good, tensors=True) == []
    assert complaints(planted, tensors=True) == [
        "Args lacks k", "Args names z, which is no parameter", "no Source", "no Example",
    ]  # fmt: skip


def test_the_version_is_that_of_the_distribution() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert [importlib.import_module(package).__version__ for package in PACKAGES] == [version, version]


def test_help_begins_with_what_to_call() -> None:
    import sdpo

    start = (sdpo.__doc__ or "").partition("Example:")[0]
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
