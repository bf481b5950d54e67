"""The code and the documentation use the terms of PyTorch, Triton, PEFT and TRL; old names do not come back.

docs/glossary.md explains the few terms of this library.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("sdpo", "adapters", "property_tests", "examples", "docs")
# Old name: standard term. A name is also found as a part of an identifier.
OLD = {
    "affair": "responsibility",
    "door": "validation",
    "doors": "validation",
    "rooms": "modules",
    "twin": "counter-example",
    "twins": "counter-examples",
    "slope": "grad_logits",
    "slopes": "grad_logits",
    "lift": "loss scale",
    "lifts": "loss scales",
    "made again": "recomputed",
    "lie in one buffer": "shared buffer",
    "take_turns": "shared buffer",
    "lost_share": "accumulation bias",
    "one_product": "fused_lora_forward",
    "activations_kept": "checkpointing_disabled",
}
# Where an old name is the right word: {file: names}.
ALLOWED: dict[str, set[str]] = {
    "property_tests/test_normalization.py": {"lift"},  # torch's operator lift_fresh
}


# Between the words of a phrase: spaces, or a line break and the `#` of a comment.
GAP = r"[\s#]+"
PATTERNS = {name: re.compile(f"(?<![a-z]){name.replace(' ', GAP)}(?![a-z])", re.IGNORECASE) for name in OLD}


def old_names(text: str) -> list[tuple[int, str]]:
    """Line and name of every old name in a text, as a whole word or as a part of an identifier."""
    # The parts of a name in camel case become words, without a change of the line numbers.
    parts = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", text)
    return sorted(
        (parts.count("\n", 0, match.start()) + 1, name)
        for name, regex in PATTERNS.items()
        for match in regex.finditer(parts)
    )


def pages() -> list[Path]:
    files = [
        file for folder in FOLDERS for file in (ROOT / folder).rglob("*") if file.suffix in (".py", ".md")
    ]
    return [file for file in [*ROOT.glob("*.md"), *sorted(files)] if file != Path(__file__)]


@pytest.mark.parametrize("folder", [".", *FOLDERS])
def test_no_old_name_is_left(folder: str) -> None:
    found = [
        f"{name}:{line}: {old!r}, use {OLD[old]!r}"
        for file in pages()
        if (name := file.relative_to(ROOT).as_posix()).rpartition("/")[0].split("/")[0] == folder.strip(".")
        for line, old in old_names(file.read_text())
        if old not in ALLOWED.get(name, ())
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a wrong twin", ["twin"]),
        ("inside_slopes = head_slope", ["slope", "slopes"]),
        ("class SlopeBuffer: LIFT = 1", ["lift", "slope"]),
        ("# these logits are made\n# again", ["made again"]),
        ("self.take_turns", ["take_turns"]),
        ("sloped, uplift, twinned, indoors, mushrooms, unmade again, we take turns", []),
    ],
)
def test_a_planted_name_is_found(text: str, names: list[str]) -> None:
    assert sorted(name for _, name in old_names(text)) == names


def test_the_line_of_a_name_is_reported() -> None:
    assert old_names("first\nsecond\nthe slope") == [(3, "slope")]
