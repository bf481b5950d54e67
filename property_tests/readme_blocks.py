"""The Python blocks of README.md and docs/ run, in order, one namespace per page, in an empty directory.

    pytest property_tests/readme_blocks.py

A fence that says ```python no-run is only compiled.
"""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^```python([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[int, str, str]]:
    """First line, fence options and code of each block."""
    text = page.read_text()
    return [(text.count("\n", 0, m.start(2)) + 1, m[1].strip(), m[2]) for m in FENCE.finditer(text)]


PAGES = [page for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if blocks(page)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    for line, options, code in blocks(page):
        assert options in ("", "no-run"), f"{page.name}:{line}: unknown fence option {options!r}"
        # Empty lines in front, so that a traceback points into the page.
        compiled = compile("\n" * (line - 1) + code, str(page), "exec")
        if options != "no-run":
            exec(compiled, module.__dict__)
