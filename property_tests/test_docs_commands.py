"""The commands that the pages print: their programs, make targets and options exist."""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
from pathlib import Path

import pytest
from readme_blocks import PAGES, ROOT
from trl import GRPOConfig, ModelConfig

from sdpo_rl import SDPOConfig
from sdpo_rl.cli import _COMMANDS
from sdpo_rl.cli.recipe import RunArguments

BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
FIELDS = {
    field.name
    for part in (RunArguments, GRPOConfig, ModelConfig, SDPOConfig)
    for field in dataclasses.fields(part)
}
# Options that one command has beside the fields of a recipe.
OWN = {
    "preview": {"rows"},
    "probe": {"json", "batches", "answer_column"},
    "doctor": {"quiet"},
    "report": {"output"},
}
RULES = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
TARGETS = set(RULES)


def commands(page: Path) -> list[str]:
    """The lines of all bash blocks, one for each command."""
    text = "\n".join(BLOCK.findall(page.read_text())).replace("\\\n", " ")
    lines = [re.split(r"\s#", line)[0].strip() for line in text.splitlines() if not line.startswith("#")]
    return [command.strip() for line in lines for command in line.split("&&") if command.strip()]


def options_of(program: Path) -> set[str]:
    """The options of a program, which one of its own modules may declare."""
    sources = [program, *program.parent.glob("*.py")]
    calls = (node for source in sources for node in ast.walk(ast.parse(source.read_text())))
    return {
        str(call.args[0].value)
        for call in calls
        if isinstance(call, ast.Call)
        and getattr(call.func, "attr", "") == "add_argument"
        and call.args
        and isinstance(call.args[0], ast.Constant)
    }


def problem(command: str) -> str | None:
    """What in a command does not exist; `None` if all does."""
    words = [word for word in shlex.split(command) if not re.fullmatch(r"\w+=\S*", word)]
    options = {word.partition("=")[0] for word in words if word.startswith("--")}
    if words[:1] == ["make"]:
        return None if set(words[1:]) <= TARGETS else f"no make target {words[1:]}"
    if "sdpo_rl" in words or words[:1] == ["sdpo"]:
        start = words.index("sdpo_rl") if "sdpo_rl" in words else 0
        name, own = (
            words[start + 1],
            {word.partition("=")[0] for word in words[start:] if word.startswith("--")},
        )
        if name not in _COMMANDS:
            return f"no command {name}"
        fields = FIELDS | {"config"} if name in ("train", "preview", "probe") else set()
        unknown = {option.removeprefix("--") for option in own} - fields - OWN.get(name, set())
        return f"no option {sorted(unknown)}" if unknown else None
    program = next((word for word in words if word.endswith(".py") and "/" in word), None)
    if program is None:
        return None
    found = ROOT / program.removeprefix("../")
    if not found.is_file():
        return f"no program {program}"
    if words[0] not in ("python", ".venv/bin/python"):
        return None
    unknown = options - options_of(found)
    return f"no option {sorted(unknown)} of {program}" if unknown else None


@pytest.mark.parametrize(
    "page", [page for page in PAGES if commands(page)], ids=lambda page: str(page.relative_to(ROOT))
)
def test_what_the_commands_of_a_page_name_exists(page: Path) -> None:
    problems = {command: found for command in commands(page) if (found := problem(command))}
    assert problems == {}


@pytest.mark.parametrize(
    "command",
    [
        "make demos",
        "sdpo tain --config recipe.yaml",
        "sdpo train --config recipe.yaml --learning-rat 1",
        "sdpo report output --rows 3",
        "accelerate launch -m sdpo_rl train --confg recipe.yaml",
        "python examples/no.py",
        "python examples/benchmarks/step.py --row 3",
    ],
)
def test_a_wrong_command_is_found(command: str) -> None:
    assert problem(command) is not None


def test_every_make_target_has_one_rule() -> None:
    # Of two, make takes the last and warns.
    assert [target for target in TARGETS if RULES.count(target) > 1] == []
