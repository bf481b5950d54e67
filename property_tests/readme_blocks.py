"""README.md and docs/: the Python blocks run, in order, one namespace per page; what the pages name exists.

    pytest property_tests/readme_blocks.py

Blocks run in an empty directory. A fence that says ```py in place of ```python is
only compiled.
"""

from __future__ import annotations

import ast
import re
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^```(py|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")
FILE = re.compile(
    r"`((?:sdpo|adapters|property_tests|examples|rollout|step|teacher|resume|compat|diagnose)/[\w./]*)`"
)
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "DEBT.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]


def blocks(page: Path) -> list[tuple[int, str, str]]:
    """First line, language as the fence names it, and code of each block."""
    text = page.read_text()
    return [(text.count("\n", 0, m.start(2)) + 1, m[1], m[2]) for m in FENCE.finditer(text)]


def anchors(text: str) -> set[str]:
    """The fragments of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path, text: str) -> list[str]:
    """Links of a page to missing files or headings, and files it names in backticks that do not exist."""
    broken = []
    for path, anchor in LINK.findall(text):
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            broken.append(f"{path}#{anchor}")
    roots = (ROOT, ROOT / "adapters" / "sdpo_rl")
    return broken + [name for name in FILE.findall(text) if not any((root / name).exists() for root in roots)]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_the_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    for line, language, code in blocks(page):
        # Empty lines in front, so that a traceback points into the page.
        compiled = compile("\n" * (line - 1) + code, str(page), "exec")
        if language == "python":
            exec(compiled, module.__dict__)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_named_files_exist(page: Path) -> None:
    assert broken_links(page, page.read_text()) == []


def test_a_broken_link_is_found() -> None:
    exist = "[c](docs/method.md#a-training-step) `sdpo/topk.py`"
    text = f"[a](docs/none.md) [b](docs/method.md#none) {exist} `step/none.py`"
    assert broken_links(ROOT / "README.md", text) == ["docs/none.md#", "docs/method.md#none", "step/none.py"]


def messages(folder: Path) -> list[str]:
    """The string literals of a package; `{}` for what an f-string inserts."""
    found = []
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "{}" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def unknown_messages(quotes: list[str]) -> list[str]:
    """Quoted messages, with `...` for what varies, that no string of the trainer contains."""
    known = messages(ROOT / "adapters" / "sdpo_rl")
    return [
        quote
        for quote in quotes
        if not any(all(part.strip() in text for part in quote.split("...")) for text in known)
    ]


def test_the_unsloth_guide_quotes_messages_that_exist() -> None:
    section = (ROOT / "docs" / "unsloth.md").read_text().partition("## Troubleshooting")[2]
    quotes = re.findall(r"^\| `([^`]*)` \|", section, re.MULTILINE)
    assert len(quotes) == 6
    assert unknown_messages([*quotes, "the model must be unloaded"]) == ["the model must be unloaded"]
